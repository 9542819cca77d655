"""Every change that a piece of work makes to files, seen from outside by ptrace, and death before
any one of them. Linux.

The kernel stops the traced child at the entry of each system call, so calls of Python, of torch's
C++ and of other threads are all seen, and a SIGKILL at that moment means that the call never
happens. Not covered: pages written through mmap (nothing here maps a file for writing).
"""

import ctypes
import os
import platform
import signal
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# Number and name of the system calls that change files or make a change durable.
WORDS = {
    "x86_64": """1 write 2 open 18 pwrite64 20 writev 40 sendfile 74 fsync 75 fdatasync 76 truncate
        77 ftruncate 82 rename 83 mkdir 84 rmdir 85 creat 86 link 87 unlink 257 openat 258 mkdirat
        263 unlinkat 264 renameat 285 fallocate 296 pwritev 316 renameat2 326 copy_file_range""",
    "aarch64": """64 write 68 pwrite64 66 writev 71 sendfile 82 fsync 83 fdatasync 45 truncate
        46 ftruncate 34 mkdirat 35 unlinkat 38 renameat 47 fallocate 56 openat 70 pwritev
        276 renameat2 285 copy_file_range""",
}
_PAIRS = WORDS.get(platform.machine(), "").split()
NAMES = dict(zip(map(int, _PAIRS[::2]), _PAIRS[1::2], strict=True))
OPENS = {"open", "creat", "openat"}
RENAMES = {"rename", "renameat", "renameat2"}
SYNCS = {"fsync", "fdatasync"}
# Calls that name their file by a handle, and which argument that is.
BY_HANDLE = {
    "write": 0,
    "pwrite64": 0,
    "writev": 0,
    "pwritev": 0,
    "sendfile": 0,
    "copy_file_range": 2,
    "ftruncate": 0,
    "fallocate": 0,
    "fsync": 0,
    "fdatasync": 0,
}
# Calls that name their file relative to a folder's handle.
BY_FOLDER = {"openat", "mkdirat", "unlinkat", "renameat", "renameat2"}
WRITES = BY_HANDLE.keys() - SYNCS | OPENS | {"truncate"}
REMOVES = {"unlink", "unlinkat", "rmdir"}
# Requests of ptrace.
TRACEME = 0
SYSCALL = 24
SETOPTIONS = 0x4200
GET_SYSCALL_INFO = 0x420E
# Mark system calls, follow threads, die with the tracer.
OPTIONS = 0x1 | 0x8 | 0x100000
# A stop at the entry of a system call.
ENTRY = 1
# Wait for threads, too.
WALL = 0x40000000
AT_FDCWD = -100
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class _Info(ctypes.Structure):
    """The head of struct ptrace_syscall_info."""

    _fields_ = [
        ("op", ctypes.c_uint8),
        ("arch", ctypes.c_uint32),
        ("ip", ctypes.c_uint64),
        ("sp", ctypes.c_uint64),
        ("number", ctypes.c_uint64),
        ("arguments", ctypes.c_uint64 * 6),
    ]


@dataclass(frozen=True)
class Call:
    """One system call that changes files or makes a change durable.

    `target` is the new name of a rename.
    """

    name: str
    path: str
    target: str = ""


_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


def _ptrace(request: int, pid: int, address: int = 0, data: int = 0) -> None:
    if _libc.ptrace(request, pid, address, data) < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"ptrace({request:#x}): {os.strerror(error)}")


def _number(argument: int) -> int:
    return ctypes.c_int(argument & 0xFFFFFFFF).value


def _text(pid: int, address: int) -> str:
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        memory.seek(address)
        return memory.read(4096).split(b"\0")[0].decode()


def _at(pid: int, handle: int, address: int) -> str:
    folder = "cwd" if handle == AT_FDCWD else f"fd/{handle}"
    base = os.readlink(f"/proc/{pid}/{folder}")
    return os.path.normpath(os.path.join(base, _text(pid, address)))


def _call(pid: int) -> Call | None:
    """The call that a stopped process is about to make.

    None if it is not one of NAMES, or if its file is only read.
    """
    info = _Info()
    _ptrace(GET_SYSCALL_INFO, pid, ctypes.sizeof(info), ctypes.addressof(info))
    name = NAMES.get(info.number, "")
    arguments = info.arguments
    if info.op != ENTRY or not name:
        return None
    if name in BY_HANDLE:
        handle = _number(arguments[BY_HANDLE[name]])
        return Call(name, os.readlink(f"/proc/{pid}/fd/{handle}"))
    if name in BY_FOLDER:
        path = _at(pid, _number(arguments[0]), arguments[1])
        flags = arguments[2]
    else:
        path = _at(pid, AT_FDCWD, arguments[0])
        flags = arguments[1]
    if name in RENAMES:
        if name in BY_FOLDER:
            target = _at(pid, _number(arguments[2]), arguments[3])
        else:
            target = _at(pid, AT_FDCWD, arguments[1])
        return Call(name, path, target)
    only_reads = name in OPENS and name != "creat" and not flags & WRITING
    return None if only_reads else Call(name, path)


def run(
    work: Callable[[], object], below: Path, kill_at: int | None = None
) -> tuple[list[Call], int]:
    """Do `work` in a forked child.

    Returns its calls on files below a folder, in order, and how it ended (-9: killed). With
    `kill_at` n it is killed when it is about to make the n-th of them (from 0); that call is the
    last of the list and does not happen.
    """
    pid = os.fork()
    if pid == 0:
        try:
            _ptrace(TRACEME, 0)
            os.kill(os.getpid(), signal.SIGSTOP)
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    if not os.WIFSTOPPED(status):
        raise OSError("this system does not let a process be traced")
    _ptrace(SETOPTIONS, pid, 0, OPTIONS)
    _ptrace(SYSCALL, pid)
    calls: list[Call] = []
    while True:
        thread, status = os.waitpid(-1, WALL)
        if not os.WIFSTOPPED(status):
            if thread == pid:
                return calls, os.waitstatus_to_exitcode(status)
            continue
        stopped_by = os.WSTOPSIG(status)
        deliver = 0
        if stopped_by == signal.SIGTRAP | 0x80:
            call = _call(thread)
            if call and (call.path.startswith(str(below)) or call.target.startswith(str(below))):
                calls.append(call)
                if len(calls) - 1 == kill_at:
                    os.kill(pid, signal.SIGKILL)
                    continue
        elif stopped_by not in (signal.SIGTRAP, signal.SIGSTOP):
            deliver = stopped_by
        _ptrace(SYSCALL, thread, 0, deliver)


def disorder(calls: list[Call], temporary: Path, target: Path) -> list[str]:
    """What a power cut could spoil in a save.

    `target` has to appear by one rename of `temporary`, after an fsync of everything that was
    written and of the folder itself; the folder above is synced next; and only then is anything
    published removed.
    """
    renames = []
    for i, call in enumerate(calls):
        names = (call.path, call.target)
        if call.name in RENAMES and names == (str(temporary), str(target)):
            renames.append(i)
    if len(renames) != 1:
        return [f"{len(renames)} renames of {temporary.name} to {target.name}"]
    published = renames[0]

    # Files under the names that they have when the target is published.
    moved = {call.path: call.target for call in calls[:published] if call.name in RENAMES}
    last_write: dict[str, int] = {}
    last_sync: dict[str, int] = {}
    for i, call in enumerate(calls):
        path = moved.get(call.path, call.path)
        if call.name in WRITES:
            last_write[path] = i
        elif call.name in SYNCS and i < published:
            last_sync[path] = i
    # The folder changes until the last of its files is written.
    last_write[str(temporary)] = max(last_write.values())

    found = []
    for path, i in last_write.items():
        if i > published:
            found.append(f"{path} is written after the rename")
        elif last_sync.get(path, -1) < i:
            found.append(f"{path} is not synced between its last write and the rename")

    durable = len(calls)
    for i, call in enumerate(calls):
        if i > published and (call.name, call.path) == ("fsync", str(target.parent)):
            durable = i
            break
    for call in calls[:durable]:
        if call.name in REMOVES and not Path(call.path).is_relative_to(temporary):
            found.append(f"{call.path} is removed before {target.name} is durable")
    return found


def unsynced(calls: list[Call]) -> set[str]:
    """The files whose last write no fsync followed: what a power cut may empty.

    Under the names that they have after `calls`.
    """
    dirty: set[str] = set()
    for call in calls:
        if call.name in WRITES:
            dirty.add(call.path)
        elif call.name in SYNCS:
            dirty.discard(call.path)
        elif call.name in RENAMES:
            for path in sorted(dirty):
                if Path(path).is_relative_to(call.path):
                    dirty.remove(path)
                    dirty.add(path.replace(call.path, call.target, 1))
    return dirty
