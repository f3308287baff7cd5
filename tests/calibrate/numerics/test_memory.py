"""Freed memory goes back to the operating system, and large tensors lie on huge pages."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

from qvlm_export.calibrate.numerics.memory import HUGE_PAGES, request_huge_pages, trim_heap

PIECES, BYTES = 4000, 100_000  # each smaller than what malloc maps, and returns to the system, separately
PROGRAM = f"""
import os
from pathlib import Path
import numpy as np
from qvlm_export.calibrate.numerics.memory import HUGE_PAGES, request_huge_pages, trim_heap

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


# A tensor of 64 MiB takes 32 faults on pages of 2 MiB, and 16,384 on pages of 4 KiB.
FAULTS = """
import resource
from qvlm_export.calibrate.numerics.memory import request_huge_pages
request_huge_pages()
import torch
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
before = faults()
tensor = torch.ones(2**24)
print(faults() - before)
"""
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(
    not SETTING.exists() or "[madvise]" not in SETTING.read_text(), reason="only where programs choose huge pages"
)
@pytest.mark.parametrize(("variables", "huge"), [({}, True), ({"THP_MEM_ALLOC_ENABLE": "0"}, False)])
def test_large_tensors_lie_on_huge_pages_unless_the_environment_says_otherwise(variables, huge):
    process = subprocess.run(
        [sys.executable, "-c", FAULTS],
        env={**{k: v for k, v in os.environ.items() if k not in HUGE_PAGES}, "PYTHONPATH": str(ROOT), **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (int(process.stdout) < 8192) == huge


def test_what_the_environment_says_about_huge_pages_stays(monkeypatch):
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    request_huge_pages()
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "0"
