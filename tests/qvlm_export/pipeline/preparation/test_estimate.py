"""The cost model of an export: seconds from counts and measured rates, memory, and the limit of `--memory`."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from commands import assert_refused, export_onnx, read_files

from qvlm_export.calibrate.blockwise.resume import MEMORY_BYTES
from qvlm_export.calibrate.calibrators.block_cost import Cost
from qvlm_export.calibrate.checkpoint.scheme import LinearScheme
from qvlm_export.calibrate.errors import UserError
from qvlm_export.engines.backend import choose_backend
from qvlm_export.engines.builder import rate
from qvlm_export.engines.graph.weight_sizes import Sizes
from qvlm_export.pipeline.preparation.estimate import (
    activation_memory_bytes,
    check_memory,
    estimate,
    format_duration,
    measure_build_rate,
    memory_needed,
)
from qvlm_export.pipeline.preparation.machine import BUILT_BYTES, Machine, measure_machine

Llava = Callable[..., Path]
W4A16 = LinearScheme(weight_bits=4, activation_bits=None, group_size=128)
MACHINE = Machine(2e11, 5e10, 1e11, 3e8, 5e8, 1e9, 1e9, 5e8, 2, built_bytes=1e8)
SIZES = {"vision": Sizes(10**9, 5 * 10**8), "language": Sizes(25 * 10**9, 65 * 10**8, 6 * 10**9)}


def test_seconds_are_counts_divided_by_rates():
    cost = Cost(flops=2e13, single_flops=1e12, shared_flops=3e12, rounded=1.2e10, elements=1e9)
    estimated = estimate(cost, {"a": W4A16}, SIZES, 10**9, MACHINE, builds=True)
    assert estimated.seconds["calibrate"] == pytest.approx(100 + 20 + 30 + 13 + 20 + 26 + 14)
    assert estimated.floor_seconds == pytest.approx(100 + 20 + 30)
    gib = 7e9 / 2**30
    assert estimated.seconds["graph"] == pytest.approx(12 + gib + 14, rel=0.01)
    assert estimated.seconds["check"] == pytest.approx(7 + 0.5 * gib, rel=0.01)
    assert estimated.seconds["build"] == pytest.approx(0.5 + 0.02 + 60 + 0.4 * 10, rel=0.01)
    assert estimated.memory_bytes == memory_needed(Cost(), 0) + 65 * 10**8  # the plan is mapped when it is checked
    assert "estimated: " in estimated.in_words()
    assert "engine build" in estimated.in_words()


def test_half_of_the_cpu_doubles_all_times_but_those_of_the_disk():
    cost = Cost(flops=2e13, single_flops=1e12, rounded=1.2e10)
    busy = replace(MACHINE, cpu_share=0.5)
    estimated = estimate(cost, {"a": W4A16}, SIZES, 10**9, busy, builds=False)
    assert estimated.seconds["calibrate"] == pytest.approx(2 * (100 + 20 + 20) + 26 + 14)
    assert estimated.floor_seconds == pytest.approx(100 + 20)
    assert estimated.seconds["graph"] == pytest.approx(2 * (12 + 7e9 / 2**30) + 14, rel=0.01)
    assert estimated.seconds["check"] == pytest.approx(2 * 14)


def test_cached_weights_are_not_read_and_fresh_memory_costs_time():
    """A quarter of the 25 + 1 GB of weights is cached. 5 GB are free, which two threads allocate at 1 GB/s together."""
    cold = estimate(Cost(), {"a": W4A16}, SIZES, 10**9, MACHINE, builds=False)
    warm = replace(MACHINE, cached_share=0.25, free_bytes=5 * 10**9, allocated_bytes=5e8)
    estimated = estimate(Cost(), {"a": W4A16}, SIZES, 10**9, warm, builds=False)
    assert cold.seconds["calibrate"] == pytest.approx(26 + 14)
    assert estimated.seconds["calibrate"] == pytest.approx(0.75 * 26 + 14 + 5)
    plenty = replace(warm, cached_share=1.0, free_bytes=10**12)  # only as much is allocated as is written
    assert estimate(Cost(), {"a": W4A16}, SIZES, 10**9, plenty, builds=False).seconds["calibrate"] == pytest.approx(14 + 7)


def test_measuring_the_disk_writes_no_more_than_a_quarter_of_its_free_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**25))
    sizes = [0]

    def fsync(descriptor: int) -> None:
        sizes.append(os.fstat(descriptor).st_size)

    monkeypatch.setattr(os, "fsync", fsync)
    weights = tmp_path / "weights"
    weights.write_bytes(bytes(2**20))
    assert measure_machine(tmp_path, [weights]).written_bytes > 0
    assert max(sizes) == 2**23


def test_the_cached_share_is_probed_at_random_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file whose pages cannot be probed counts as not cached."""
    weights = [tmp_path / "a", tmp_path / "b"]
    for path, size in zip(weights, (3 * 2**20, 2**20), strict=True):
        path.write_bytes(bytes(size))
    probed: list[int] = []

    def preadv(descriptor: int, buffers: list[bytearray], start: int, _flags: int) -> int:
        probed.append(start)
        if os.fstat(descriptor).st_size == 2**20:
            raise OSError(errno.EAGAIN, "Resource temporarily unavailable")
        return len(buffers[0])

    monkeypatch.setattr(os, "preadv", preadv)
    assert measure_machine(tmp_path, weights).cached_share == pytest.approx(0.75)
    assert all(0 <= start < 3 * 2**20 for start in probed)
    assert len(set(probed)) > 100


def test_a_machine_with_too_little_memory_is_refused(llava: Llava, absent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sysconf", lambda name: 4096 if name == "SC_PAGE_SIZE" else 2**16)  # 256 MiB
    assert_refused(export_onnx(llava(), absent), "calibration needs about 0.7 GiB", "has 0.2 GiB", "--effort rtn")
    with pytest.raises(
        UserError, match=r"the engine build needs about 1\.0 GiB .* has 0\.2 GiB; export with --backend onnx"
    ):
        check_memory(2**20, 2**30)
    check_memory(2**28, 2**28)


def test_a_float_export_has_no_calibration_in_its_estimate():
    estimated = estimate(Cost(), {}, SIZES, 10**9, MACHINE, builds=False)
    assert set(estimated.seconds) == {"graph", "check"}
    assert estimated.build_memory_bytes == 0


@pytest.mark.parametrize(("seconds", "words"), [(0.4, "0 s"), (90, "90 s"), (150, "2 min"), (7300, "2.0 h")])
def test_durations_as_text(seconds, words):
    assert format_duration(seconds) == words


def test_measured_rates_are_positive_and_no_file_is_left(tmp_path):
    weights = tmp_path / "weights"
    weights.write_bytes(bytes(2**20))
    machine = measure_machine(tmp_path / "not" / "there", [weights])
    assert all(value > 0 for name, value in vars(machine).items() if name != "cached_share")
    assert 0 <= machine.cached_share <= 1
    assert machine.flops >= 0.5 * machine.single_flops
    assert machine.cpu_share <= 1
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]


@pytest.mark.parametrize("int4", [True, False])
def test_the_build_rate_is_measured_for_large_exports_only(int4: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is measured with INT4 weights only where the export has them, as the GPU may not support INT4."""
    monkeypatch.setattr(rate, "WIDTH", 512)
    backend = choose_backend("tensorrt-rtx", ())
    parts = {"language": Sizes(2**31, 2**29, 2**28 if int4 else 0)}
    assert measure_build_rate(backend, parts) != BUILT_BYTES
    assert 1e6 < measure_build_rate(backend, parts) < 1e10
    small = {"language": Sizes(2**28, 2**26, 2**26)}
    assert measure_build_rate(backend, small) == measure_build_rate(choose_backend("onnx", ()), parts) == BUILT_BYTES


def test_memory_that_is_left_is_shared_by_inputs_and_outputs():
    cost = Cost(memory_bytes=2**30)
    needed = memory_needed(cost, 1)
    assert activation_memory_bytes(None, "rtn", cost, 1) == MEMORY_BYTES
    assert activation_memory_bytes(4, "rtn", cost, 1) == (4 * 2**30 - needed) // 2
    with pytest.raises(UserError, match=r"--memory 1: --effort fast needs about 1\.7 GiB.*--samples, or --effort rtn"):
        activation_memory_bytes(1, "fast", cost, 1)


def test_activations_on_disk_give_the_same_bytes(llava: Llava, tmp_path: Path) -> None:
    """`--memory` decides where activations are stored, not their values."""
    least = memory_needed(Cost(), 1) / 2**30 + 0.05  # leaves almost nothing for activations
    for folder, arguments in (("memory", ()), ("disk", ("--memory", f"{least:.3f}"))):
        result = export_onnx(llava(), tmp_path / folder / "x.plan", "--scheme", "int8", *arguments)
        assert result.exit_code == 0, result.stderr
    assert read_files(tmp_path / "memory") == read_files(tmp_path / "disk")


def test_too_little_memory_is_refused_before_any_work(llava: Llava, absent: Path) -> None:
    assert_refused(export_onnx(llava(), absent, "--memory", "0.1"), "--memory 0.1", "needs about 0.7 GiB", "--samples")
