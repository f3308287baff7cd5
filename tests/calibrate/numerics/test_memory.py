"""Freed memory goes back to the system."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
from paths import ROOT

from qvlm_export.calibrate.numerics.memory import trim_heap

PIECES, BYTES = 4000, 100_000  # smaller than what malloc asks the system for by itself
IN_ITS_OWN_PROCESS = f"""
import os
from pathlib import Path
import numpy as np
from qvlm_export.calibrate.numerics.memory import trim_heap

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

pieces = [np.ones({BYTES}, np.uint8) for _ in range({PIECES})]
pieces[:-1] = []  # the last one holds the end of the heap
before = resident()
trim_heap()
print(before - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has a heap to trim")
def test_what_was_freed_is_not_resident_any_more():
    ran = subprocess.run(
        [sys.executable, "-c", IN_ITS_OWN_PROCESS],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(ran.stdout) > 0.9 * PIECES * BYTES


def test_elsewhere_there_is_nothing_to_do(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr("ctypes.CDLL", None)
    trim_heap()
