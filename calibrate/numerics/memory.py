"""Memory that was freed goes back to the system: what one phase needed does not lie under what the next one needs. libc."""

from __future__ import annotations

import ctypes
import sys


def trim_heap() -> None:
    """glibc keeps what was freed: gigabytes, after many tensors of a few megabytes. Elsewhere there is nothing to do."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # musl has none, and keeps little
        libc.malloc_trim(0)
