"""The system calls that a program in the sandbox may not make, as a filter for bubblewrap.

Limits of a process count its address space, and it can make no files. What holds memory of the
host outside of that is refused here: System V shared memory, queues and semaphores, files without
a name, sockets of a network (their buffers have megabytes), further processes (each would have
limits of its own), and namespaces, in which a new tmpfs could be mounted. Threads, pipes and pairs
of sockets are allowed. Refused calls fail with EPERM.
"""

import platform
import struct

from mar.errors import UserError

# machine -> its number for the kernel (linux/audit.h), and its place in REFUSED
MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}

# call -> its number on x86_64 and on aarch64; None: the machine does not have it
REFUSED: dict[str, tuple[int, int | None]] = {
    # System V IPC and message queues
    "shmget": (29, 194),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "semget": (64, 190),
    "semop": (65, 193),
    "semctl": (66, 191),
    "semtimedop": (220, 192),
    "msgget": (68, 186),
    "msgsnd": (69, 189),
    "msgrcv": (70, 188),
    "msgctl": (71, 187),
    "mq_open": (240, 180),
    # files without a name, and other memory of the kernel
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "userfaultfd": (323, 282),
    "vmsplice": (278, 75),
    "io_setup": (206, 0),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "socket": (41, 198),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "inotify_init": (253, None),
    "inotify_init1": (294, 26),
    "fanotify_init": (300, 262),
    # processes; a process by `clone` is below
    "fork": (57, None),
    "vfork": (58, None),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    # namespaces and mounts
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "open_by_handle_at": (304, 265),
}
CLONE = (56, 220)
CLONE3 = 435
CLONE_THREAD = 0x10000

# the second set of numbers of x86_64 starts here
X32 = 0x40000000

# where the number, the machine and the first argument stand in seccomp_data
NUMBER, MACHINE, FLAGS = 0, 4, 16

# operations of the filter (linux/bpf_common.h)
LOAD, RETURN = 0x20, 0x06
IF_EQUAL, IF_AT_LEAST, IF_ANY_BIT = 0x15, 0x35, 0x45

ALLOW = 0x7FFF0000
KILL = 0x80000000
EPERM = 0x00050000 | 1
# the C library then tries `clone`, whose flags a filter can read
ENOSYS = 0x00050000 | 38


def _step(operation: int, value: int, then: int = 0, otherwise: int = 0) -> bytes:
    """One instruction; a jump skips `then` or `otherwise` instructions."""
    return struct.pack("=HBBI", operation, then, otherwise, value)


def syscall_filter(machine: str | None = None) -> bytes:
    """The filter for this machine. UserError where its numbers are not known."""
    machine = machine or platform.machine()
    if machine not in MACHINES:
        raise UserError(
            f"the sandbox knows the system calls of {' and '.join(MACHINES)}, and this is "
            f"{machine}: reward.sandbox=unsafe runs without it"
        )
    audit, column = MACHINES[machine]
    steps = [
        _step(LOAD, MACHINE),
        _step(IF_EQUAL, audit, then=1),
        _step(RETURN, KILL),
        _step(LOAD, NUMBER),
        _step(IF_AT_LEAST, X32, otherwise=1),
        _step(RETURN, EPERM),
        _step(IF_EQUAL, CLONE3, otherwise=1),
        _step(RETURN, ENOSYS),
    ]
    for numbers in REFUSED.values():
        number = numbers[column]
        if number is not None:
            steps += [_step(IF_EQUAL, number, otherwise=1), _step(RETURN, EPERM)]
    steps += [
        _step(IF_EQUAL, CLONE[column], otherwise=3),
        _step(LOAD, FLAGS),
        _step(IF_ANY_BIT, CLONE_THREAD, then=1),
        _step(RETURN, EPERM),
        _step(RETURN, ALLOW),
    ]
    return b"".join(steps)
