"""Run a program that a model wrote, and say whether it passes its tests, without believing a word it says.

Each program gets namespaces of its own (bubblewrap): no network, an unprivileged uid, a read-only interpreter, an empty
tmpfs, no environment, no /proc, limits on time, memory, processes, files and output. The harness sends it the LEFT sides
of the tests alone; their values come back as plain data under a nonce and are compared out here with the right sides,
which the sandbox never held. So a forged report earns what a right answer earns, and only if it is one.
"""

import ast
import json
import os
import secrets
import shutil
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

from mar.records import UserError

OUTCOMES = ("passed", "failed", "timeout", "infrastructure_error")  # the last: not the program's doing, so not judged
WALL_S, CPU_S, MEMORY, PROCESSES, OUTPUT, TMP = 6.0, 4, 512 << 20, 16, 1 << 16, 16 << 20
MAX_SOURCE = 20_000  # characters; longer programs fail unread
SANDBOXES = ("bubblewrap", "unsafe")
FIRST_UID = 1 << 30  # of uids that belong to nobody
Run = Callable[[str, tuple[str, ...], str], str]
Tests = tuple[str, tuple[tuple[str, str], ...]]  # (set-up, ((left, right), ...))

# What runs inside. Values are written as [kind, content]; a subclass counts as its base, anything else as its type's name.
RUNNER = r"""
import sys, os, json, resource
job = json.loads(sys.stdin.buffer.read())
if job["uid"]:
    os.setgroups([]), os.setgid(job["uid"]), os.setuid(job["uid"])
for name, limit in job["limits"].items():
    resource.setrlimit(getattr(resource, name), (limit, limit))
channel, null = os.dup(1), os.open("/dev/null", os.O_RDWR)
for fd in (0, 1, 2):
    os.dup2(null, fd)
def plain(x):
    if x is None or x is True or x is False:
        return ["v", x]
    for kind, base in (("i", int), ("f", float), ("s", str), ("c", complex), ("b", bytes)):
        if isinstance(x, base):
            base_x = base.__pos__(x) if kind in "if" else x
            return [kind, hex(base_x) if kind == "i" else base_x.hex() if kind in "fb" else str(x) if kind == "c" else str.__str__(x)]
    for kind, base in (("l", list), ("t", tuple), ("e", (set, frozenset))):
        if isinstance(x, base):
            return [kind, [plain(y) for y in x]]
    if isinstance(x, dict):
        return ["d", [[plain(k), plain(v)] for k, v in x.items()]]
    return ["o", type(x).__name__]
def run(write=os.write, dumps=json.dumps):
    nonce = job["nonce"].encode()
    write(channel, nonce + b"ready\n")
    space = {"__name__": "__main__"}
    for source in (job["setup"], job["program"]):
        exec(compile(source, "<program>", "exec"), space)
    exec(compile(job["setup"], "<setup>", "exec"), space)
    values = [plain(eval(left, space)) for left in job["lefts"]]
    write(channel, nonce + dumps(values).encode() + b"\n")
run()
os._exit(0)
"""


def _bwrap() -> list[str]:
    """The command line up to the interpreter: a root of nothing but Python and the libraries that it needs."""
    root = Path(sys.base_prefix)
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    bound = "--perms 0755 --dir /py --perms 0755 --dir /py/bin --perms 0755 --dir /dev --perms 0755 --dir /usr --ro-bind".split()
    bound += [f"{root}/lib", "/py/lib"]
    words = "bwrap --unshare-ipc --unshare-pid --unshare-net --unshare-uts --die-with-parent --new-session --clearenv --cap-drop ALL"
    # Linux exempts root's uid from the limit on processes, in user namespaces too: as root the runner takes a uid of its own
    words += (
        " --cap-add CAP_SETUID --cap-add CAP_SETGID"
        if os.geteuid() == 0
        else " --unshare-user --disable-userns --uid 65534 --gid 65534"
    )
    bound += ["--ro-bind", os.path.realpath(sys.executable), "/py/bin/python"]
    hidden = root / "lib" / stdlib.name / "site-packages"
    bound += ["--tmpfs", f"/py/lib/{stdlib.name}/site-packages"] if hidden.is_dir() else []
    for library in ("/lib", "/lib64", "/usr/lib"):
        bound += ["--ro-bind-try", library, library]
    for device in ("null", "urandom"):
        bound += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]
    end = f"--perms 1777 --size {TMP} --tmpfs /tmp --chdir /tmp --remount-ro / --setenv LD_LIBRARY_PATH /py/lib --setenv PYTHONHOME /py"
    return [*words.split(), *bound, *end.split(), "/py/bin/python"]


def check_sandbox(kind: str) -> None:
    """UserError where programs cannot be contained; `unsafe` runs them in the open and has to be asked for by name."""
    if kind == "bubblewrap" and (shutil.which("bwrap") is None or _run("", "", ("1 + 1",), kind)[1] != [2]):
        raise UserError(
            "model-written programs need a sandbox and bubblewrap does not run here: install the package bubblewrap, or say "
            "data.sandbox=unsafe to run them without one"
        )


def _value(node: Any) -> Any:
    """The value that `plain` wrote. Raises ValueError, TypeError or RecursionError on anything else."""
    kind, content = node
    if kind in ("l", "t", "e"):
        return {"l": list, "t": tuple, "e": set}[kind](map(_value, content))
    if kind == "d":
        return {_value(key): _value(value) for key, value in content}
    if kind == "v" and content in (None, True, False):
        return content
    if kind == "o":
        return object()  # equal to nothing
    readers: dict[str, Callable[[str], Any]] = {"i": lambda h: int(h, 16), "f": float.fromhex, "s": str}
    return (readers | {"c": complex, "b": bytes.fromhex})[kind](content)


def _run(setup: str, program: str, lefts: Sequence[str], kind: str) -> tuple[str, list[Any]]:
    """(outcome, values of the left sides). `passed` here means only that they came back."""
    nonce = secrets.token_hex(16)
    limits = {
        "RLIMIT_CPU": CPU_S,
        "RLIMIT_AS": MEMORY,
        "RLIMIT_NPROC": PROCESSES,
        "RLIMIT_FSIZE": TMP,
        "RLIMIT_CORE": 0,
    }
    if kind == "unsafe":
        del limits["RLIMIT_NPROC"]  # it would count all processes of this user
    uid = FIRST_UID + secrets.randbelow(1 << 20) if kind != "unsafe" and os.geteuid() == 0 else 0
    job = {"nonce": nonce, "setup": setup, "program": program, "lefts": list(lefts), "limits": limits, "uid": uid}
    command = [sys.executable] if kind == "unsafe" else _bwrap()
    environment = {"PATH": os.environ.get("PATH", "")}
    try:
        process = subprocess.Popen(
            [*command, "-I", "-S", "-B", "-c", RUNNER],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, start_new_session=True,
        )  # fmt: skip
    except OSError:
        return "infrastructure_error", []
    assert process.stdin and process.stdout
    late = threading.Event()

    def stop() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(WALL_S, stop)
    timer.start()
    try:
        process.stdin.write(json.dumps(job).encode())
        process.stdin.close()
        written = process.stdout.read(OUTPUT + 1)
    except OSError:
        written = b""
    finally:
        process.kill()
        timer.cancel()
        process.wait()
        process.stdout.close()
    ready, report = f"{nonce}ready\n".encode(), written.removeprefix(f"{nonce}ready\n".encode())
    if not written.startswith(ready):
        return "infrastructure_error", []
    if late.is_set():
        return "timeout", []
    try:
        if len(written) > OUTPUT or not report.startswith(nonce.encode()) or report.count(b"\n") != 1:
            return "failed", []
        values = [_value(node) for node in json.loads(report[len(nonce) :])]
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return "failed", []
    return ("passed" if len(values) == len(lefts) else "failed"), values


def split_tests(statements: Sequence[str]) -> Tests | None:
    """Set-up, and (left, right) of every `assert left == right`; a bare `assert f(x)` wants True. None for other tests."""
    setup, pairs = [], []
    try:
        for statement in ast.parse("\n".join(statements)).body:
            if not isinstance(statement, ast.Assert):
                setup.append(ast.unparse(statement))
                continue
            test, right = statement.test, "True"
            if isinstance(test, ast.Compare):
                if len(test.ops) != 1 or not isinstance(test.ops[0], ast.Eq):
                    return None
                right, test = ast.unparse(test.comparators[0]), test.left
            elif isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
                test, right = test.operand, "False"
            elif isinstance(test, ast.Call) and ast.unparse(test.func) == "math.isclose":
                return None
            pairs.append((ast.unparse(test), right))
    except (SyntaxError, ValueError):
        return None
    return ("\n".join(setup), tuple(pairs)) if pairs else None


@lru_cache(maxsize=4096)
def _expected(setup: str, rights: tuple[str, ...], kind: str) -> list[Any] | None:
    """The values of the right sides, worked out without the program; None: they could not be."""
    try:
        return [ast.literal_eval(right) for right in rights]
    except (ValueError, TypeError, SyntaxError):
        pass
    outcome, values = _run(setup, "", rights, kind)
    return values if outcome == "passed" else None


def run_program(source: str, statements: tuple[str, ...], kind: str = "bubblewrap") -> str:
    """One of OUTCOMES: whether a program passes its tests. Never raises on what the model wrote."""
    tests = split_tests(statements)
    if tests is None:
        return "infrastructure_error"
    if len(source) > MAX_SOURCE:
        return "failed"
    setup, pairs = tests
    lefts, rights = zip(*pairs, strict=True)
    expected = _expected(setup, rights, kind)
    if expected is None:
        return "infrastructure_error"
    outcome, values = _run(setup, source, lefts, kind)
    return outcome if outcome != "passed" or values == expected else "failed"


def run_programs(
    jobs: Iterable[tuple[str, tuple[str, ...]]], kind: str = "bubblewrap", run: Run = run_program
) -> list[str]:
    """`run` of every (source, tests), as many at a time as there are cores; one bad program costs its own time."""
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return list(pool.map(lambda job: run(job[0], job[1], kind), jobs))


def program_of(answer: str) -> str:
    """The source in an answer: what stands inside one Markdown fence, where there is one."""
    lines = answer.strip().splitlines()
    fenced = len(lines) > 2 and lines[0].startswith("```") and lines[-1].strip() == "```"
    return "\n".join(lines[1:-1]) if fenced else answer.strip()


class _Anonymous(ast.NodeTransformer):
    """Names that the program itself binds are numbered in order of appearance; docstrings and annotations go."""

    def __init__(self, bound: set[str]) -> None:
        self.bound: set[str] = bound
        self.numbers: dict[str, str] = {}

    def visit(self, node: ast.AST) -> ast.AST:
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            node.body = body[1:]  # type: ignore[attr-defined]
        for name in ("annotation", "returns", "type_comment"):
            if getattr(node, name, None) is not None and not isinstance(node, ast.AnnAssign):
                setattr(node, name, None)
        for name in ("name", "asname", "id", "arg"):
            if getattr(node, name, None) in self.bound:
                setattr(node, name, self.numbers.setdefault(getattr(node, name), f"v{len(self.numbers)}"))
        return self.generic_visit(node)


def program_key(answer: str) -> str:
    """The same for programs that differ in layout, comments, docstrings and the names they bind only (METHOD 5: distinct)."""
    source = program_of(answer)
    try:
        tree = ast.parse(source[:MAX_SOURCE])
        nodes = list(ast.walk(tree))
        bound = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        bound |= {n.arg for n in nodes if isinstance(n, ast.arg)} | {getattr(n, "asname", None) or "" for n in nodes}
        bound |= {getattr(n, "name", None) or "" for n in nodes if not isinstance(n, ast.alias)}
        return ast.dump(_Anonymous(bound - {""}).visit(tree))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return " ".join(source.split())
