"""The page of the study of calibration sets: factors to data of the domain, and results of a run that was killed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tools.smol.scores import KINDS
from tools.study.self_calibration import DOMAIN, SCENES, SELF, make_page, read_results


def record(data: str, column: str, kl: float) -> dict[str, Any]:
    kinds = {kind: {"text": {"kl": kl, "tokens": 1000}} for kind in ("all", *KINDS)}
    counts = {"pictures": 34, "text_tokens": 8513, "fallbacks": 0, "seconds": 265.1}
    metrics = {"kl": kl, "kl_error": 0.002, "top1": 0.8, "perplexity": 29.7, "kinds": kinds}
    return {"data": data, "column": column, **metrics, **counts}


def test_page_gives_the_factor_to_data_of_the_domain() -> None:
    records = [record(DOMAIN, "W4A16", 0.1), record(SCENES, "W4A16", 0.2), record(SELF, "W4A16", 0.125)]
    page = make_page({(r["data"], r["column"]): r for r in records})
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ") and "±" in line]
    assert [row[0] for row in rows] == [f"| {DOMAIN}", f"| {SCENES}", f"| {SELF}"]
    assert [row[2] for row in rows] == ["1.00", "2.00", "1.25"]
    assert rows[2][3] == "80.0"
    assert "## W4A16" in page
    assert "## W8A8" not in page
    assert "all 1,000 tokens" in page
    assert "The rows of" not in page


def test_page_says_which_records_another_run_made() -> None:
    other = record(DOMAIN, "W4A16", 0.1) | {"origin": "of another page"}
    page = make_page({(r["data"], r["column"]): r for r in (other, record(SELF, "W4A16", 0.125))})
    assert f"The rows of {DOMAIN} are of another page." in page
    assert f"The rows of {SELF}" not in page


def test_half_a_line_of_results_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    assert read_results(path) == {}
    path.write_text(json.dumps(record(SELF, "W8A8", 0.01)) + "\n" + json.dumps(record(SELF, "W4A16", 0.1))[:40])
    assert list(read_results(path)) == [(SELF, "W8A8")]
