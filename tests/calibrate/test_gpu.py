"""`--device cuda` on a real GPU: the same calibration as on the CPU, up to differences from the order of summation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from commands import export_to, write_calibration

from qvlm_export.calibrate.checkpoint.calibrated import CalibratedCheckpoint

pytestmark = pytest.mark.gpu
# Shares of codes that may differ: a value halfway between two codes may fall to either, which changes what is rounded later.
MAX_DIFFERENT_CODES = {"rtn": 0.002, "fast": 0.02}


@pytest.mark.parametrize("effort", MAX_DIFFERENT_CODES)
def test_calibration_on_a_gpu_agrees_with_the_cpu(llava: Callable[..., Path], tmp_path: Path, effort: str) -> None:
    results = {}
    for device in ("cpu", "cuda"):
        out, data = tmp_path / device / "x.plan", write_calibration(tmp_path)
        export_to(llava(), out, "--backend", "onnx", "--calib-data", data, "--effort", effort, "--device", device)
        results[device] = CalibratedCheckpoint(out.parent / "x.calibrated")
    for name in results["cpu"].schemes:
        cpu, cuda = results["cpu"].linear(name), results["cuda"].linear(name)
        assert np.mean(cpu.codes != cuda.codes) <= MAX_DIFFERENT_CODES[effort], name
        assert np.allclose(cpu.scale, cuda.scale, rtol=0.02)
        assert cpu.input_scale == pytest.approx(cuda.input_scale, rel=0.02)


def test_errors_of_full_effort_on_a_gpu_are_those_on_the_cpu(llava: Callable[..., Path], tmp_path: Path) -> None:
    """Every block's error with Kronecker-factored rounding is within a quarter of that on the CPU."""
    errors = {}
    for device in ("cpu", "cuda"):
        out, data = tmp_path / device / "x.plan", write_calibration(tmp_path)
        export_to(llava(), out, "--backend", "onnx", "--calib-data", data, "--effort", "full", "--device", device)
        errors[device] = [b["error"] for b in CalibratedCheckpoint(out.parent / "x.calibrated").summary["blocks"]]
    assert errors["cuda"] == pytest.approx(errors["cpu"], rel=0.25)
