"""`--device cuda` on a real GPU: the same calibration as on the CPU, within what the order of sums explains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from commands import export_to, write_calibration

from qvlm_export.calibrate.checkpoint.calibrated import CalibratedCheckpoint

pytestmark = pytest.mark.gpu
# Shares of codes that may differ: a value in the middle of two codes falls either way, and what is rounded after it follows.
SHARES = {"rtn": 0.002, "fast": 0.02}


@pytest.mark.parametrize("effort", SHARES)
def test_calibration_on_a_gpu_agrees_with_the_cpu(llava: Callable[..., Path], tmp_path: Path, effort: str) -> None:
    found = {}
    for device in ("cpu", "cuda"):
        out, data = tmp_path / device / "x.plan", write_calibration(tmp_path)
        export_to(llava(), out, "--backend", "onnx", "--calib-data", data, "--effort", effort, "--device", device)
        found[device] = CalibratedCheckpoint(out.parent / "x.calibrated")
    for name in found["cpu"].schemes:
        one, other = found["cpu"].linear(name), found["cuda"].linear(name)
        assert np.mean(one.codes != other.codes) <= SHARES[effort], name
        assert np.allclose(one.scale, other.scale, rtol=0.02)
        assert one.input_scale == pytest.approx(other.input_scale, rel=0.02)


def test_rounding_for_the_answers_runs_on_a_gpu(llava: Callable[..., Path], tmp_path: Path) -> None:
    """No block ends further from the float model than on the CPU by more than a quarter."""
    errors = {}
    for device in ("cpu", "cuda"):
        out, data = tmp_path / device / "x.plan", write_calibration(tmp_path)
        export_to(llava(), out, "--backend", "onnx", "--calib-data", data, "--effort", "full", "--device", device)
        errors[device] = [b["error"] for b in CalibratedCheckpoint(out.parent / "x.calibrated").summary["blocks"]]
    assert errors["cuda"] == pytest.approx(errors["cpu"], rel=0.25)
