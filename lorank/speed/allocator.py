"""Freed memory stays with the process, so that a step on a CPU does not fetch the pages of the step before again.

glibc returns the memory of a large tensor to the system as soon as it is freed. The next operation fetches as much again, and
the system clears and maps it page by page, 4 KiB each: in a step of the 60M Llama with CoLA on 4 x 256 tokens, some 140,000
times, which take a tenth of its time. `keep_freed_memory` ends this. With small batches of small models, whose memory glibc
keeps anyway, it gains nothing (`benchmarks/step.py --give-back`). The peak stays as it is, but for holes between tensors. Memory
on accelerators has PyTorch's own allocator.
"""

import ctypes
import os
import platform

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Names of glibc's settings in malloc.h: free bytes at which it gives back, and size of blocks that it fetches one by one."""
MOST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let glibc keep what the process frees. It does nothing with another C library, or if a variable MALLOC_... or
    GLIBC_TUNABLES of the environment decides about it.

    Returns:
        Whether it was done.
    """
    decided = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    library = None if decided else _glibc()
    return library is not None and all(library.mallopt(name, MOST) for name in (MMAP_THRESHOLD, TRIM_THRESHOLD))


def give_back() -> None:
    """Return free memory to the system now, so that what a process holds is what it uses."""
    if (library := _glibc()) is not None:
        library.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
