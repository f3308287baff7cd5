"""docs/entropy.md agrees with its data, and tools/study/entropy.py redraws figure and table from that."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from paths import ROOT
from small_export import calibrate

from qvlm_export.calibrate.blockwise.blocks import make_blocks
from qvlm_export.calibrate.checkpoint.scheme import LinearScheme
from qvlm_export.checkpoints.checkpoint import Checkpoint, open_checkpoint
from tools.study import entropy as study_entropy

DOCS = ROOT / "docs"


def test_page_shows_the_tables_of_its_data() -> None:
    page = (DOCS / "entropy.md").read_text(encoding="utf-8")
    tables = [part for part in page.split("\n\n") if part.startswith("| proxy")]
    names = ("entropy", "entropy-hard", "entropy-smol", "entropy-smol-equalized")
    contents = [json.loads((DOCS / f"{name}.json").read_text(encoding="utf-8")) for name in names]
    assert tables == ["\n".join(study_entropy.table_lines(content["correlations"])) for content in contents]
    for content in contents[-2:]:
        assert "\n".join(study_entropy.gain_lines(content["pairs"])) in page


def test_redraw_does_not_measure_and_prints_the_table_of_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(DOCS / "entropy.json", tmp_path)
    monkeypatch.setattr(study_entropy, "measure", None)
    monkeypatch.setattr(sys, "argv", ["entropy.py", "--out", str(tmp_path / "entropy"), "--redraw"])
    study_entropy.main()
    assert "| entropy | -0.10 [-0.28, 0.14] / -0.33 |" in capsys.readouterr().out
    assert (tmp_path / "entropy.png").exists()
    assert (tmp_path / "entropy.json").read_bytes() == (DOCS / "entropy.json").read_bytes()


def test_figure_and_table_show_the_same_preceding_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = json.loads((DOCS / "entropy-hard.json").read_text(encoding="utf-8"))
    figures = []
    monkeypatch.setattr(study_entropy.plt, "close", figures.append)
    study_entropy.plot(content["pairs"], content["correlations"], tmp_path / "drawn.png")
    monkeypatch.undo()
    axis = figures[0].axes[0]
    assert axis.get_ylabel().endswith("float prefix")
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["W4A4: r = -0.18", "W6A6: r = -0.20"]
    assert axis.lines[0].get_ydata().tolist() == [r["float"]["DED"] for r in content["pairs"] if r["scheme"] == "W4A4"]
    study_entropy.plt.close(figures[0])


def test_after_equalization_the_float_model_is_the_calibrated_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(str(ROOT / "qvlm_export" / "tiny"))
    scheme = LinearScheme(8, None, None)
    calibrated = calibrate(checkpoint, dict.fromkeys(make_blocks(checkpoint.hf_config).quantizable(), scheme), tmp_path)
    studied: list[Checkpoint] = []
    monkeypatch.setattr(study_entropy, "study", lambda checkpoint, *_, **__: studied.append(checkpoint) or [])
    monkeypatch.setattr(study_entropy, "correlations", lambda _: {})
    args = ["entropy.py", "--out", str(tmp_path / "entropy"), "--calibrated", str(tmp_path), "--samples", "2"]
    monkeypatch.setattr(sys, "argv", args)
    monkeypatch.setattr(study_entropy, "plot", lambda *_: None)
    study_entropy.main()
    name = next(iter(calibrated.schemes))
    assert np.array_equal(studied[0].source.load(f"{name}.weight"), calibrated.linear(name).dequantized())
