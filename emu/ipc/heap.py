"""The C heap of a process through which large packets go: what was freed is kept for the next ones.

By default glibc gives freed memory at the heap's end back at once, beyond 128 KiB, and takes blocks beyond that
straight from the system. A reader that copies 64 KiB packets out would then touch new pages for each of them, and on a
virtual machine such a page fault costs as much as copying the page several times.
"""

from __future__ import annotations

import ctypes
from typing import Final

KEPT_BYTES: Final = 8 << 20
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_LARGEST_BLOCK: Final = 2 << 20


def keep_freed_memory() -> None:
    """Keep up to `KEPT_BYTES` of freed memory in this process, and in those that it forks; no-op without `mallopt`."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_BLOCK)
