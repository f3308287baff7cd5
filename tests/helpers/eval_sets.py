"""Writes small evaluation sets in the official layouts and runs qvlm-eval on them in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from qvlm_export.cli.evaluate import app
from tools.tiny import make_eval_sets

FORM = ("--form", "v1.3")  # the plain questions, on which the tiny model was trained


def make_sets(folder: Path, count: int) -> Path:
    """Writes the sets of all four tasks with `count` questions each; returns the folder."""
    make_eval_sets.make_all(folder, count)
    return folder


def run_eval(*arguments: object) -> Result:
    """`qvlm-eval arguments…`"""
    return CliRunner().invoke(app, list(map(str, arguments)))


def eval_json(*arguments: object, code: int = 0) -> dict[str, Any]:
    """The JSON on stdout of a run of qvlm-eval that must end with exit code `code`."""
    result = run_eval(*arguments, "--json")
    assert result.exit_code == code, (result.stderr, result.exception)
    content: dict[str, Any] = json.loads(result.stdout)
    return content


def of_task(sets: Path, task: str) -> tuple[object, ...]:
    """The arguments --task and --data for a task."""
    return ("--task", task, "--data", sets / task)
