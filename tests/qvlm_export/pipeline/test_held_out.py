"""Every export says how far its answers are from the float model's, and warns where that is too far."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import export_onnx, write_calibration

from qvlm_export.pipeline.preparation.prepare import ExportOptions, prepare_export

Llava = Callable[..., Path]


@pytest.mark.parametrize(
    ("effort", "words"),
    [
        ("rtn", ("add --effort fast, or keep", "layers.")),
        ("fast", ("take more calibration samples, or keep", "_proj")),
    ],
)
def test_a_poor_export_ends_with_a_warning(
    llava: Llava, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, effort: str, words: tuple[str, str]
) -> None:
    cure, named = words
    if effort == "fast":  # which is not that poor on the samples it was made from
        monkeypatch.setattr("qvlm_export.pipeline.stages.MIN_AGREEMENT", 1.1)
    out = tmp_path / "new" / "x.plan"
    result = export_onnx(llava(), out, "--scheme", "sim-w4a4", "--effort", effort, "--max-length", "128")
    assert result.exit_code == 0
    text = " ".join(result.stderr.split())
    assert "warning: on 2 calibration samples the quantized model has the float model's first choice for " in text
    assert cure in text
    accuracy = json.loads(out.with_suffix(".json").read_text())["calibration"]["accuracy"]
    assert (accuracy["samples"], accuracy["held_out"]) == (2, False)
    assert effort == "fast" or accuracy["agreement"] < 0.8 or accuracy["kl"] > 0.5
    assert len(accuracy["worst"]) == 3
    assert all(name in text for name in accuracy["worst"])
    assert any(named in name for name in accuracy["worst"])
    assert "none of which was held out; most is lost in " in out.with_name("x.report.html").read_text()


def test_a_good_export_does_not_warn(llava: Llava, tmp_path: Path) -> None:
    out = tmp_path / "new" / "x.plan"
    result = export_onnx(llava(), out, "--scheme", "int8", "--effort", "fast", "--max-length", "128")
    assert "warning" not in result.stderr
    accuracy = json.loads(out.with_suffix(".json").read_text())["calibration"]["accuracy"]
    assert accuracy["agreement"] > 0.8
    assert "accuracy" not in export_onnx(llava(), out, "--scheme", "fp16").stdout


@pytest.mark.parametrize(("lines", "calibrated", "checked"), [(64, 60, 4), (32, 28, 4), (31, 31, 4), (3, 3, 3), (1, 1, 1)])
def test_samples_are_held_out_where_there_are_enough(
    llava: Llava, tmp_path: Path, lines: int, calibrated: int, checked: int
) -> None:
    data = write_calibration(tmp_path, lines)
    options = ExportOptions(str(llava()), tmp_path / "x.plan", backend="onnx", calib_data=data, max_length=128)
    prepared = prepare_export(options)
    assert (len(prepared.samples), len(prepared.checked_samples)) == (calibrated, checked)
    assert any(a is b for a in prepared.samples for b in prepared.checked_samples) == (lines < 32)
