"""docs/entropy.md and what tools/study/entropy.py makes for it from the stored figures."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from paths import ROOT

from tools.study import entropy as study_entropy

DOCS = ROOT / "docs"


def test_the_page_has_the_tables_of_its_data() -> None:
    page = (DOCS / "entropy.md").read_text(encoding="utf-8")
    tables = [part for part in page.split("\n\n") if part.startswith("| proxy")]
    stored = [json.loads((DOCS / f"{name}.json").read_text(encoding="utf-8")) for name in ("entropy", "entropy-hard")]
    assert tables == ["\n".join(study_entropy.table_lines(content["correlations"])) for content in stored]


def test_a_redraw_measures_nothing_and_prints_the_page_s_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(DOCS / "entropy.json", tmp_path)
    monkeypatch.setattr(study_entropy, "measured", None)
    monkeypatch.setattr(sys, "argv", ["study_entropy.py", "--out", str(tmp_path / "entropy"), "--redraw"])
    study_entropy.main()
    assert "| entropy | -0.10 [-0.28, 0.14] / -0.33 |" in capsys.readouterr().out
    assert (tmp_path / "entropy.png").exists()
    assert (tmp_path / "entropy.json").read_bytes() == (DOCS / "entropy.json").read_bytes()


def test_the_figure_shows_the_prefix_of_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
