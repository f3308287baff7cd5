"""W8A8 linears fall back to W8A16, and W4A8 ones to W4A16, where 8 bits cannot hold their shared input."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import export_to, write_calibration
from small_export import make_sample, open_small, schemes_of
from torch import nn

from qvlm_export.calibrate.blockwise.blocks import make_blocks
from qvlm_export.calibrate.blockwise.job import CalibrationJob
from qvlm_export.calibrate.blockwise.resume import CalibrationWork
from qvlm_export.calibrate.calibrators import block_search
from qvlm_export.calibrate.calibrators.block_search import MAX_ACTIVATION_ERROR, BlockSearch
from qvlm_export.calibrate.calibrators.search import calibrate_search
from qvlm_export.calibrate.checkpoint.calibrated import CalibratedCheckpoint, CalibratedWriter
from qvlm_export.calibrate.checkpoint.scheme import W8A8, LinearScheme
from qvlm_export.calibrate.quantization.config import FAST

W8A16 = LinearScheme(8, None, None)


class Block(nn.Module):
    """A residual block whose linear reads an input with a value `outlier` times larger than the others, at a few tokens.

    Its weight is small there, so that the large value matters little for the output.
    """

    def __init__(self, outlier: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.outlier = outlier
        self.linear_1 = nn.Linear(64, 32, bias=False)
        with torch.no_grad():
            self.linear_1.weight[:, 0] /= outlier

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = torch.cat([x, x.flip(-1)], -1)
        inner[:, ::20, 0] *= self.outlier
        output: torch.Tensor = x + self.linear_1(inner)
        return output


def search(outlier: float, schemes: Mapping[str, LinearScheme], *, strict: bool = False) -> tuple[BlockSearch, float]:
    """A finished search, and the mean relative error of its output."""
    inputs = [torch.randn(4, 100, 32, generator=torch.Generator().manual_seed(1))]
    found = BlockSearch(Block(outlier), schemes, lambda module, x: module(x), FAST, strict=strict)
    with torch.no_grad():
        (exact,), (rounded,) = found.search(inputs, inputs)
    return found, float(((rounded - exact).square().sum(-1) / exact.square().sum(-1)).mean())


def test_an_input_beyond_8_bits_stays_float_with_4_bit_weights_too() -> None:
    found, error = search(300.0, {"linear_1": LinearScheme(4, 8, 64)})
    _, strict_error = search(300.0, {"linear_1": LinearScheme(4, 8, 64)}, strict=True)
    assert found.quantized_linears()["linear_1"].scheme == LinearScheme(4, None, 64)
    assert found.fallbacks() == ["linear_1"]
    assert error < strict_error / 2


def test_an_input_that_8_bits_cannot_hold_stays_float() -> None:
    found, error = search(300.0, {"linear_1": W8A8})
    kept, strict_error = search(300.0, {"linear_1": W8A8}, strict=True)
    assert found.quantized_linears()["linear_1"].scheme == W8A16
    assert found.quantized_linears()["linear_1"].input_scale is None
    assert found.fallbacks() == ["linear_1"]
    assert found.activation_errors["linear_1"] > MAX_ACTIVATION_ERROR
    assert kept.quantized_linears()["linear_1"].scheme == W8A8
    assert kept.fallbacks() == []
    assert error < strict_error / 20
    # What the measure promises is what the rounded input costs; the rest is by rounded weights.
    assert found.activation_errors["linear_1"] == pytest.approx(strict_error - error, rel=0.3)


def test_an_ordinary_input_keeps_its_scheme() -> None:
    found, _ = search(1.0, {"linear_1": W8A8})
    assert found.quantized_linears()["linear_1"].scheme == W8A8
    assert 0 < found.activation_errors["linear_1"] < MAX_ACTIVATION_ERROR


@pytest.mark.parametrize("scheme", [LinearScheme(4, None, 64), LinearScheme(4, 4, 64), LinearScheme(6, 6, None)])
def test_schemes_without_8_bit_activations_have_no_fallback(scheme: LinearScheme) -> None:
    found, _ = search(300.0, {"linear_1": scheme})
    assert found.quantized_linears()["linear_1"].scheme == scheme
    assert found.activation_errors == {}


def test_linears_that_fall_back_are_equalized_and_rounded_as_if_they_had_never_been_to_read_8_bits(
    llava: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_search, "MAX_ACTIVATION_ERROR", 0.0)
    checkpoint = open_small(llava())
    samples = [make_sample(checkpoint, words=9, images=1, seed=seed) for seed in range(2)]
    found = []
    for bits in (8, None):
        schemes = {name: LinearScheme(4, bits, 64) for name in schemes_of(checkpoint, "int4")}
        job = CalibrationJob(make_blocks(checkpoint.hf_config), checkpoint.source, schemes, samples)
        writer = CalibratedWriter(tmp_path / f"{bits}")
        writer.finish(checkpoint.config_json, calibrate_search(job, writer, lambda *_: None, FAST))
        calibrated = CalibratedCheckpoint(tmp_path / f"{bits}")
        found.append({name: calibrated.linear(name) for name in schemes})
    for fallen, never in zip(*(linears.values() for linears in found), strict=True):
        assert fallen.scheme == never.scheme == LinearScheme(4, None, 64)
        np.testing.assert_array_equal(fallen.codes, never.codes)
        np.testing.assert_array_equal(fallen.scale, never.scale)


def test_a_resumed_calibration_keeps_what_fell_back(
    llava: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_search, "MAX_ACTIVATION_ERROR", 0.0)
    checkpoint = open_small(llava())
    samples = [make_sample(checkpoint, words=9, images=1, seed=seed) for seed in range(2)]
    schemes, whole = schemes_of(checkpoint, "int8"), dict[str, LinearScheme]()
    for name in ("whole", "resumed"):
        for attempt in range(1 if name == "whole" else 2):
            work = CalibrationWork(tmp_path / name / "work")
            job = CalibrationJob(make_blocks(checkpoint.hf_config), checkpoint.source, schemes, samples, work)
            writer = CalibratedWriter(tmp_path / name / "calibrated")
            if attempt < (name == "resumed"):
                with pytest.raises(KeyboardInterrupt):
                    calibrate_search(job, writer, interrupt_after(3), FAST)
                continue
            summary = calibrate_search(job, writer, lambda *_: None, FAST)
            writer.finish(checkpoint.config_json, summary)
        found = CalibratedCheckpoint(tmp_path / name / "calibrated").schemes
        assert set(found.values()) == {W8A16}
        whole = whole or found
        assert found == whole


def interrupt_after(blocks: int) -> Callable[[int, int, str], None]:
    def progress(done: int, _: int, __: str) -> None:
        if done >= 40 * blocks:
            raise KeyboardInterrupt

    return progress


def test_graphs_and_manifest_hold_what_fell_back_unless_strict(
    llava: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_search, "MAX_ACTIVATION_ERROR", 0.0)
    options = ("--backend", "onnx", "--scheme", "int8", "--effort", "fast", "--calib-data", write_calibration(tmp_path))
    for strict, scheme in (((), "W8A16"), (("--strict",), "W8A8")):
        export_to(llava(), tmp_path / "x" / "x.plan", *options, "--max-length", "128", *strict)
        manifest = json.loads((tmp_path / "x" / "x.json").read_text())
        assert set(manifest["linears"].values()) == {scheme}
        blocks = manifest["calibration"]["blocks"]
        assert all(bool(block["fallbacks"]) == (not strict) for block in blocks)
