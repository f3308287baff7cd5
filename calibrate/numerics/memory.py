"""Memory of the process: large pages for large tensors, and freed heap memory back to the operating system."""

from __future__ import annotations

import ctypes
import os
import sys

# Of torch: it asks Linux for transparent huge pages for tensors of 2 MiB and more.
HUGE_PAGES = {"THP_MEM_ALLOC_ENABLE": "1"}


def request_huge_pages() -> None:
    """Has torch put large tensors on huge pages, unless the environment says otherwise.

    Calibration makes many tensors of some 100 MiB, which Linux clears page by page each time: with pages of 2 MiB instead of
    4 KiB there are 512 times fewer page faults. torch reads the setting when it makes its first tensor, so this comes before
    torch is imported, and does nothing later.
    """
    for name, value in HUGE_PAGES.items():
        os.environ.setdefault(name, value)


def trim_heap() -> None:
    """Returns freed memory to the system; does nothing where the C library is not glibc.

    glibc keeps what was freed: gigabytes, after many tensors of a few megabytes.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # musl has no malloc_trim, and keeps little
        libc.malloc_trim(0)
