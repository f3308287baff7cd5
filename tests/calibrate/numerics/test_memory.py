"""trim_heap returns freed memory to the operating system."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
from paths import ROOT

from qvlm_export.calibrate.numerics.memory import trim_heap

PIECES, BYTES = 4000, 100_000  # each smaller than what malloc maps, and returns to the system, separately
PROGRAM = f"""
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
def test_freed_memory_is_no_longer_resident():
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(process.stdout) > 0.9 * PIECES * BYTES


def test_it_does_nothing_on_other_systems(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr("ctypes.CDLL", None)
    trim_heap()
