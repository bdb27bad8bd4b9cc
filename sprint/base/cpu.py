"""What becomes of freed memory, which on a CPU decides how fast tensors are made. Nothing here touches a GPU run."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -3, -4, -8  # of glibc's malloc.h
RETURNED = 2**20  # bytes: freed tensors of this size and more go back, where that is asked for


def keep_freed_memory() -> bool:
    """Have glibc keep freed blocks for the next tensor instead of giving them back to the system at once.

    Otherwise every large tensor is paged in, page by page, each time it is made.  -> whether it took
    """
    return _mallopt({M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1, M_ARENA_MAX: 1})


def return_freed_memory() -> bool:
    """Have glibc give every large freed block back at once: what is resident is what is alive, and no holes beside it.

    Slower, but for networks of which a copy more or less decides whether they fit.  -> whether it took
    """
    return _mallopt({M_MMAP_THRESHOLD: RETURNED})


def _mallopt(options: dict[int, int]) -> bool:
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(option, value) for option, value in options.items())
