"""On a CPU, memory that was freed stays with the process."""

import ctypes
import sys

# The names of glibc's malloc.h.
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
# Blocks up to here are reused, in bytes.
LARGEST_REUSED = 1 << 30


def keep_freed_memory() -> None:
    """Let glibc reuse large blocks, in place of returning each to the system.

    A step on a CPU asks for the same tensors again and again. By default every block of more than
    32 MB is mapped anew, and the system clears each of its pages. The process then keeps the most
    memory that it ever had. Other C libraries are left as they are.
    """
    mallopt = None
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGEST_REUSED)
        mallopt(M_TRIM_THRESHOLD, 2 * LARGEST_REUSED - 1)
