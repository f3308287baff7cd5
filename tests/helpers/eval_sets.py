"""Small evaluation sets in the official layouts, and qvlm-eval on them in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from qvlm_export.cli.evaluate import app
from tools.tiny import make_eval_sets

FORM = ("--form", "v1.3")  # the bare questions, which the tiny model was trained on


def make_sets(folder: Path, count: int) -> Path:
    """All four, with `count` questions each."""
    make_eval_sets.make_all(folder, count)
    return folder


def run_eval(*arguments: object) -> Result:
    """`qvlm-eval arguments…`"""
    return CliRunner().invoke(app, list(map(str, arguments)))


def eval_json(*arguments: object, code: int = 0) -> dict[str, Any]:
    """The result of a run that ends with `code`."""
    result = run_eval(*arguments, "--json")
    assert result.exit_code == code, (result.stderr, result.exception)
    content: dict[str, Any] = json.loads(result.stdout)
    return content


def of_task(sets: Path, task: str) -> tuple[object, ...]:
    """--task and --data."""
    return ("--task", task, "--data", sets / task)
