"""Returns freed heap memory to the operating system (glibc's malloc_trim), which lowers peak memory between phases."""

from __future__ import annotations

import ctypes
import sys


def trim_heap() -> None:
    """Returns freed memory to the system; does nothing where the C library is not glibc.

    glibc keeps what was freed: gigabytes, after many tensors of a few megabytes.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # musl has no malloc_trim, and keeps little
        libc.malloc_trim(0)
