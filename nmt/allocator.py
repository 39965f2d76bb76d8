"""How the C library keeps the memory of the large tensors that a search on a CPU makes and leaves."""

import ctypes
import os
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_LARGEST = 2**25  # what glibc takes for the second


def give_back_tensors(above: int) -> bool:
    """Let a tensor of more than `above` bytes have pages of its own, which go back to the system when it is freed.

    glibc does so at first, but raises the limit to the size of whatever is freed, up to 32 MB. From then on large
    tensors lie in the threads' heaps, between others, and what one leaves is too small for the next one, which has
    a few columns more. The limit should be above what each step makes anew, because fresh pages take longer to
    come than a heap's.

    The setting holds for the whole process. Without glibc, or where the user has set its allocator up by the
    environment, nothing is done.

    Returns:
        Whether it was set.
    """
    if platform.libc_ver()[0] != "glibc" or any(
        name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ
    ):
        return False
    limit = min(above, _LARGEST)
    library = ctypes.CDLL(None)
    return bool(
        library.mallopt(_M_MMAP_THRESHOLD, limit)
        and library.mallopt(_M_TRIM_THRESHOLD, min(2 * limit, 2**31 - 1))
    )
