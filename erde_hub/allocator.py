"""Freed memory that stays with the process: what a CPU otherwise pays for every large activation.

The C library of most Linux systems hands each block above its thresholds (128 KiB at first, 32 MiB at most) back to
the kernel when it is freed, and asks for it again at the next layer. The kernel clears every page anew, page by page,
which can take longer than the layer. tcmalloc and jemalloc do not; this makes the system's own allocator do likewise.
"""

from __future__ import annotations

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
_LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Makes glibc keep freed blocks of up to 2 GiB for the next request, for the rest of this process.

    Networks then run faster on a CPU, the more so the larger the batch; results do not change. The memory of the
    process stays at its peak. Thresholds that the environment sets (``MALLOC_TRIM_THRESHOLD_``,
    ``MALLOC_MMAP_THRESHOLD_``, ``GLIBC_TUNABLES``) are left as they are. Nothing here needs torch.

    Returns:
        Whether it is in force: False on systems without glibc, and where the environment has its own say.

    References:
        mallopt(3), ``M_TRIM_THRESHOLD`` and ``M_MMAP_THRESHOLD``.
    """
    given = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_")
    if any(name in os.environ for name in given) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):  # musl has a mallopt that does nothing
        return False
    return all(library.mallopt(key, _LARGEST) == 1 for key in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD))
