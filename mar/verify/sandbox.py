"""Model-written programs run here and nowhere else: bubblewrap namespaces around one fresh interpreter per program.

Inside: no network, no /proc, no view of the host but a read-only interpreter, an empty small tmpfs, an empty environment, an
unprivileged user, and limits on time, memory, processes and file size. What comes out is data, never a verdict (sandbox_child.py).
Not a barrier against bugs of the kernel: there is no system call filter.
"""

import json
import marshal
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from mar.errors import UserError

WALL_S, CPU_S = 10.0, 6

MAX_BYTES = 1 << 20  # of the reply, of each file

MAX_HEAD = 1 << 16  # what the pipe holds

MAX_PROGRAM = 1 << 16  # characters

MAX_DEPTH = 60  # of nested containers in a value

LIMITS = {
    "RLIMIT_CPU": CPU_S,
    "RLIMIT_AS": 256 << 20,
    "RLIMIT_FSIZE": MAX_BYTES,
    "RLIMIT_NPROC": 8,
    "RLIMIT_NOFILE": 32,
    "RLIMIT_CORE": 0,
}

KINDS: dict[str, Any] = {
    **{kind.__name__: kind for kind in (list, tuple, set, frozenset, dict, bytes, bytearray)},
    "complex": lambda parts: complex(*parts),
    "float": float,
}


@dataclass(frozen=True)
class Reply:
    """`outcome` is returned, failed, timeout or infrastructure_error; `values` only of `returned`; `key` is the digest of the program's structure,
    "" where it has none; `detail` says what went wrong with an infrastructure error."""

    outcome: str
    values: tuple[Any, ...] = ()
    key: str = ""
    detail: str = ""


@lru_cache(maxsize=2)
def _command(unsafe: bool) -> tuple[str, ...]:
    python = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    child = Path(__file__).with_name("sandbox_child.py").read_text(encoding="utf-8")
    run = (python, "-s", "-S", "-P", "-B", "-c", child)
    if unsafe:
        return run
    prefix = os.path.realpath(sys.base_prefix)
    shown = prefix if prefix != "/usr" else python
    words = [
        "bwrap",
        "--unshare-ipc",
        "--unshare-pid",
        "--unshare-net",
        "--unshare-uts",
        "--unshare-cgroup-try",
    ]
    words += ["--die-with-parent", "--new-session", "--clearenv", "--setenv", "PYTHONHASHSEED", "0"]
    # root needs no user namespace, and a user id mapped from root's would not be counted by RLIMIT_NPROC
    keep = ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    words += (
        ["--cap-drop", "ALL", *keep] if os.geteuid() == 0 else ["--unshare-user", "--uid", "65534"]
    )
    for folder in ("/dev", "/usr", *map(str, reversed(Path(shown).parents[:-1]))):
        words += ["--dir", folder]  # a parent made by the way would be closed to all but root
    for folder in ("/lib", "/lib64", "/usr/lib", "/usr/lib64", shown):
        words += ["--ro-bind-try", folder, folder]
    words += [
        "--dev-bind",
        "/dev/null",
        "/dev/null",
        "--size",
        str(16 * MAX_BYTES),
        "--perms",
        "1777",
        "--tmpfs",
        "/tmp",
    ]
    return (*words, "--chdir", "/tmp", "--remount-ro", "/", *run)


def require_sandbox(unsafe: bool = False) -> None:
    """UserError, in one sentence, where programs cannot be run."""
    if not unsafe and not shutil.which("bwrap"):
        raise UserError(
            "programs written by the model run only in bubblewrap, and there is no `bwrap` here: install the package bubblewrap "
            "(Linux), or accept that they can do whatever you can do and say reward.sandbox=unsafe"
        )
    reply = run_program("x = 1", ["x"], unsafe=unsafe)
    if reply.values != (1,):
        raise UserError(
            f"the sandbox does not start here ({reply.detail or reply.outcome}): reward.sandbox=unsafe runs without it"
        )


def run_program(
    program: str,
    expressions: Sequence[str],
    setup: str = "",
    unsafe: bool = False,
    wall_s: float | None = None,
) -> Reply:
    """Run a program, then trusted `setup`, and bring the values of trusted `expressions` out as plain data.

    `failed`: the program raised, died, or returned something that is not plain or above 1 MiB; `timeout`: it was killed after
    `wall_s` seconds; `infrastructure_error`: its first instruction was never reached, so no program can cause it.
    """
    if len(program) > MAX_PROGRAM:
        return Reply("failed")
    uid = (
        1_000_000 + int.from_bytes(os.urandom(3), "big") if os.geteuid() == 0 and not unsafe else 0
    )
    limits = {name: value for name, value in LIMITS.items() if not unsafe or name != "RLIMIT_NPROC"}
    request = {
        "program": program,
        "setup": setup,
        "expressions": [*expressions],
        "uid": uid,
        "limits": limits,
    }
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as written:
        given.write(marshal.dumps(request))
        given.seek(0)
        child = subprocess.Popen(
            _command(unsafe),
            stdin=given,
            stdout=written,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        ended = os.pidfd_open(child.pid)
        late = not select.select([ended], [], [], wall_s or WALL_S)[0]
        os.close(ended)
        os.killpg(
            child.pid, signal.SIGKILL
        )  # bubblewrap takes all processes of its namespace with it
        child.wait()
        assert child.stderr
        with child.stderr as pipe:
            head = os.read(pipe.fileno(), MAX_HEAD)
        written.seek(0)
        body = written.read(MAX_BYTES)
    before, reached, after = head.partition(b"ready\n")
    if not reached:
        detail = "timeout" if late else " ".join(before.decode(errors="replace").split()[-40:])
        return Reply("infrastructure_error", detail=detail)
    digest = after[:64].decode() if after[64:65] == b"\n" else ""
    if late:
        return Reply("timeout", key=digest)
    try:
        return Reply("returned", tuple(_plain(value) for value in json.loads(body)), digest)
    except (
        ValueError,
        TypeError,
        LookupError,
        OverflowError,
        RecursionError,
    ):  # what a program wrote, or half of it
        return Reply("failed", key=digest)


def _plain(value: Any, depth: int = 0) -> Any:
    """The value of tagged JSON. Raises on whatever `sandbox_child.tagged` does not write."""
    if depth > MAX_DEPTH:
        raise ValueError("nested too deeply")
    if isinstance(value, list):
        kind, items = value
        return KINDS[kind](
            items if kind == "float" else [_plain(item, depth + 1) for item in items]
        )
    if isinstance(value, dict):
        raise TypeError("an untagged object")
    return value
