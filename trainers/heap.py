"""Memory of the CPU that tensors leave is kept for the next ones."""

import ctypes
import platform
import sys

# malloc.h: above this many bytes a block comes from the system, and goes back when it is freed;
# above this many free bytes the end of the heap goes back.
M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1
LIMITS = (2**30, 2**25)
"""The second one is the most that older versions take."""


def keep_freed_memory() -> None:
    """Let the C library keep what this process, and those it forks, free; only of Linux, glibc.

    Every pass frees and allocates the same activations. Fresh memory from the system is cleared,
    page by page: a good part of the time of a small network. Results do not change.
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    # To set the second limit only would make things worse.
    if any(libc.mallopt(M_MMAP_THRESHOLD, limit) for limit in LIMITS):
        libc.mallopt(M_TRIM_THRESHOLD, LIMITS[0])
