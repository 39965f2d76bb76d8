"""How the C library keeps the memory of the large tensors that a search on a CPU makes and leaves."""

import ctypes
import os
import platform
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_LARGEST = 2**25  # the most that glibc takes for the mmap threshold

_limit = 0  # bytes: the present setting


def give_back_tensors(above: int) -> bool:
    """Let a tensor of more than `above` bytes have pages of its own, which go back to the system when it is freed.

    glibc does so at first, but raises the limit to the size of each freed block, up to 32 MB. From then on large
    tensors lie in the threads' heaps, between others. The gap that one leaves is too small for the next one, which
    has a few columns more. The limit should be above the size of what each step makes anew, because fresh pages
    take longer than a heap's.

    The setting holds for the whole process; of several calls the highest limit holds. Nothing is done without
    glibc, or if the user has set its allocator up by the environment (any `MALLOC_...` or `GLIBC_TUNABLES`).

    Returns:
        Whether it was set.
    """
    global _limit  # because the setting is global, too
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return False
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return False
    _limit = max(_limit, min(above, _LARGEST))
    library = ctypes.CDLL(None)
    return bool(library.mallopt(_M_MMAP_THRESHOLD, _limit) and library.mallopt(_M_TRIM_THRESHOLD, 2 * _limit))
