"""What the process does with memory that PyTorch frees on a CPU."""

import ctypes

# of mallopt(3)
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Let glibc keep large blocks for the next step; another C library is left as it is.

    By default each large tensor is mapped and unmapped, and a fresh page costs more time than the arithmetic on it. The
    process keeps its peak memory in return. It has no effect on results.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, -1)
