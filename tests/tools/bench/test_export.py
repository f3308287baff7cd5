"""Benchmarks of whole exports and of one block: they measure the process that ran."""

from __future__ import annotations

import sys

import pytest
from matplotlib.axes import Axes

from tools.bench import block, export

SCRIPT = """
import json, os
memory = bytearray(200 * 2**20)
with open({path!r}, "wb") as file:
    file.write(bytes(30 * 2**20))
    os.fsync(file.fileno())
total = 0
for i in range(3_000_000):
    total += i
print(json.dumps({{"total": total}}))
"""


def test_time_memory_and_storage_of_a_command_are_measured(tmp_path):
    cost = export.measured([sys.executable, "-c", SCRIPT.format(path=str(tmp_path / "written"))])
    assert cost["output"] == {"total": sum(range(3_000_000))}
    assert cost["peak_bytes"] > 200 * 2**20
    assert 0 < cost["cpu_seconds"] <= cost["wall_seconds"] * 1.2 + 0.2
    assert cost["written_bytes"] <= 31 * 2**20


def test_a_failing_command_ends_the_benchmark():
    with pytest.raises(SystemExit, match="ended with code 3"):
        export.measured([sys.executable, "-c", "raise SystemExit(3)"])


def test_plot_has_a_line_for_each_kind_of_processor_sorted_by_size(tmp_path, monkeypatch):
    rows = [{"effort": "rtn", "parameters": n * 10**9, "cpu_seconds": 30.0 * n, "peak_bytes": n * 2**30} for n in (13, 1, 7)]
    machines = ["2 cores, x86_64", "2 cores, x86_64", "2 cores, x86_64, AVX512"]
    drawn, plot = [], Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda *args, label: drawn.append((label, args[1])) or plot(*args, label=label))
    export.plot([row | {"machine": m} for row, m in zip(rows, machines, strict=True)], tmp_path / "plot.png")
    assert drawn[::2] == [("rtn", [1, 13]), ("rtn, AVX512", [7])]
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_block_benchmark_searches_one_block_and_reports_its_cost(monkeypatch):
    monkeypatch.setitem(block.GEOMETRIES, "small", block.replace(block.GEOMETRIES["100m"], **SMALL))
    monkeypatch.setattr(block, "WIDTH", 64)
    row = block.bench("small", "fast", samples=2, tokens=40)
    assert row["flops"] > row["single_flops"] > 0
    assert 0 < row["error"] < 0.1
    assert row["cpu_seconds"] >= 0


SMALL = {"hidden_size": 128, "intermediate_size": 128, "heads": 4, "kv_heads": 4}
