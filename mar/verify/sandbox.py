"""Model-written programs run here and nowhere else: bubblewrap around one interpreter each.

Inside there is no network, no /proc, nothing of the host but a read-only interpreter, an empty
environment, an unprivileged user, and limits on time and memory. No file can be made: even an
empty one holds memory of the kernel. A program is one process, and calls that hold memory outside
of its limits are refused (`syscall_filter.py`): RLIMIT_AS bounds all that it takes of the host, but
for what 32 pipes or pairs of sockets hold. What comes out is data, never a verdict
(`sandbox_child.py`).

This is no barrier against bugs of the kernel.
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
from mar.verify.syscall_filter import syscall_filter

WALL_S = 10.0
CPU_S = 6

MAX_BYTES = 1 << 20  # of the reply
MAX_HEAD = 1 << 16  # what the pipe holds
MAX_PROGRAM = 1 << 16  # characters
MAX_DEPTH = 60  # of containers in containers, in a value
# Values in sets and dicts of a reply. Equal hashes make a set of n take n * n comparisons, here,
# where no limit ends them: of so many, half a second.
MAX_HASHED = 4000

LIMITS = {
    "RLIMIT_CPU": CPU_S,
    "RLIMIT_AS": 256 << 20,
    "RLIMIT_FSIZE": MAX_BYTES,
    "RLIMIT_NPROC": 8,
    "RLIMIT_NOFILE": 32,
    # signals that wait, and timers
    "RLIMIT_SIGPENDING": 64,
    "RLIMIT_CORE": 0,
}

# stands in the command line for the number of the open file that holds the filter
FILTER_FD = "{filter}"

# where bubblewrap is started by root, each program gets a user of its own from here on
FIRST_UID = 1_000_000
NOBODY = "65534"

# tag -> what makes a value of the items that stand with it
CONSTRUCTORS: dict[str, Any] = {
    "list": list,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "dict": dict,
    "bytes": bytes,
    "bytearray": bytearray,
    "complex": lambda parts: complex(*parts),
    "float": float,
}
HASHED = ("set", "frozenset", "dict")

# what a program wrote instead of a reply, or half of it
BAD_REPLY = (ValueError, TypeError, LookupError, OverflowError, RecursionError)


@dataclass(frozen=True)
class Reply:
    """What came out of the sandbox.

    `outcome` is one of

        returned              the program and all expressions ran; `values` holds the results
        failed                it raised, died, or a result was not plain data, above 1 MiB, or with
                              more than 4,000 values in sets and dicts
        timeout               it was killed
        infrastructure_error  its first instruction was not reached, so no program can cause it
    """

    outcome: str
    values: tuple[Any, ...] = ()
    # digest of the program's structure; "" where it has none
    key: str = ""
    # what went wrong with an infrastructure error
    detail: str = ""


@lru_cache(maxsize=1)
def _can_disable_namespaces() -> bool:
    """Whether this bubblewrap can turn off user namespaces inside of its own."""
    said = subprocess.run(["bwrap", "--help"], capture_output=True, text=True, check=False)
    return "--disable-userns" in said.stdout


@lru_cache(maxsize=2)
def _command(unsafe: bool) -> tuple[str, ...]:
    """The command line of one sandbox, or of the bare interpreter."""
    python = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    sources = [Path(__file__).with_name(name) for name in ("program_form.py", "sandbox_child.py")]
    child = "\n".join(source.read_text(encoding="utf-8") for source in sources)
    interpreter = [python, "-s", "-S", "-P", "-B", "-c", child]
    if unsafe:
        return tuple(interpreter)

    words = ["bwrap", "--unshare-ipc", "--unshare-pid", "--unshare-net"]
    words += ["--unshare-uts", "--unshare-cgroup-try"]
    words += ["--die-with-parent", "--new-session", "--seccomp", FILTER_FD]
    words += ["--clearenv", "--setenv", "PYTHONHASHSEED", "0"]
    if os.geteuid() == 0:
        # no user namespace: a user id mapped from root's would not be counted by RLIMIT_NPROC.
        # The child changes to a user of its own
        words += ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        words += ["--unshare-user", "--uid", NOBODY]
        if _can_disable_namespaces():
            # for bubblewrap older than 0.8 the filter alone has to refuse them
            words += ["--disable-userns"]

    # of a distribution's own Python, whose prefix is /usr, the interpreter alone is shown
    prefix = os.path.realpath(sys.base_prefix)
    shown = python if prefix == "/usr" else prefix
    parents = [str(folder) for folder in reversed(Path(shown).parents[:-1])]
    for folder in ("/dev", "/usr", *parents):
        # a parent that bubblewrap makes on the way would be closed to all but root
        words += ["--dir", folder]
    for folder in ("/lib", "/lib64", "/usr/lib", "/usr/lib64", shown):
        words += ["--ro-bind-try", folder, folder]
    words += ["--dev-bind", "/dev/null", "/dev/null"]
    words += ["--dir", "/tmp", "--chdir", "/tmp", "--remount-ro", "/"]
    return (*words, *interpreter)


def require_sandbox(unsafe: bool = False) -> None:
    """UserError, in one sentence, where programs cannot be run."""
    if not unsafe and not shutil.which("bwrap"):
        raise UserError(
            "programs written by the model run only in bubblewrap, and there is no `bwrap` here: "
            "install the package bubblewrap (Linux), or accept that they can do whatever you can "
            "do and say reward.sandbox=unsafe"
        )
    reply = run_program("x = 1", ["x"], unsafe=unsafe)
    if reply.values != (1,):
        raise UserError(
            f"the sandbox does not start here ({reply.detail or reply.outcome}): "
            "reward.sandbox=unsafe runs without it"
        )


def run_program(
    program: str,
    expressions: Sequence[str],
    setup: str = "",
    unsafe: bool = False,
    wall_s: float | None = None,
) -> Reply:
    """Run a program, then trusted `setup`, and bring out the values of trusted `expressions`.

    It is killed after `wall_s` seconds (None: WALL_S). `unsafe`: without a sandbox.
    """
    if len(program) > MAX_PROGRAM:
        return Reply("failed")
    limits = dict(LIMITS)
    if unsafe:
        del limits["RLIMIT_NPROC"]  # it counts all processes of the user, which is ours then
    uid = 0  # none to change to
    if os.geteuid() == 0 and not unsafe:
        uid = FIRST_UID + int.from_bytes(os.urandom(3), "big")
    request = {
        "program": program,
        "setup": setup,
        "expressions": [*expressions],
        "uid": uid,
        "limits": limits,
    }
    head, body, late = _run_child(marshal.dumps(request), unsafe, wall_s or WALL_S)

    # see sandbox_child.main: `ready`, then the key, and only then the program runs
    before, ready, after = head.partition(b"ready\n")
    if not ready:
        said = " ".join(before.decode(errors="replace").split()[-40:])
        return Reply("infrastructure_error", detail="timeout" if late else said)
    key = ""
    if after[64:65] == b"\n":
        key = after[:64].decode()
    if late:
        return Reply("timeout", key=key)
    try:
        written = json.loads(body)
        if sum(_num_hashed(value) for value in written) > MAX_HASHED:
            return Reply("failed", key=key)
        values = tuple(_untagged(value) for value in written)
    except BAD_REPLY:
        return Reply("failed", key=key)
    return Reply("returned", values, key)


def _run_child(request: bytes, unsafe: bool, wall_s: float) -> tuple[bytes, bytes, bool]:
    """The beginnings of stderr and stdout, and whether the child had to be killed."""
    with (
        tempfile.TemporaryFile() as given,
        tempfile.TemporaryFile() as written,
        tempfile.TemporaryFile() as filter_file,
    ):
        given.write(request)
        given.seek(0)
        command = list(_command(unsafe))
        inherited = []
        if FILTER_FD in command:
            inherited = [filter_file.fileno()]
            filter_file.write(syscall_filter())
            filter_file.seek(0)
            command[command.index(FILTER_FD)] = str(filter_file.fileno())
        child = subprocess.Popen(
            command,
            stdin=given,
            stdout=written,
            stderr=subprocess.PIPE,
            start_new_session=True,
            pass_fds=inherited,
        )
        ended = os.pidfd_open(child.pid)
        readable, _, _ = select.select([ended], [], [], wall_s)
        os.close(ended)
        # bubblewrap takes all processes of its namespace with it
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        assert child.stderr
        with child.stderr as pipe:
            head = os.read(pipe.fileno(), MAX_HEAD)
        written.seek(0)
        body = written.read(MAX_BYTES)
    return head, body, not readable


def _num_hashed(value: Any, inside: bool = False) -> int:
    """How many values stand in sets and dicts, at any depth."""
    if not isinstance(value, list):
        return int(inside)
    kind, items = value
    if kind == "float":
        return int(inside)
    inside = inside or kind in HASHED
    return int(inside) + sum(_num_hashed(item, inside) for item in items)


def _untagged(value: Any, depth: int = 0) -> Any:
    """The value that `sandbox_child.tagged` wrote. Raises for anything else."""
    if depth > MAX_DEPTH:
        raise ValueError("nested too deeply")
    if isinstance(value, dict):
        raise TypeError("an untagged object")
    if not isinstance(value, list):
        return value
    kind, items = value
    constructor = CONSTRUCTORS[kind]
    if kind == "float":
        return constructor(items)
    return constructor([_untagged(item, depth + 1) for item in items])
