"""Progress bars: full at the end of a stage on a terminal, absent from log files; and the seconds of stages."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from qvlm_export.pipeline.progress import Reporter

BAR = "━"


def console(*, terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=70, color_system=None)


def frames(shown: Console) -> list[str]:
    """Returns the completed part of the bar, for each time it was drawn."""
    assert isinstance(shown.file, io.StringIO)
    return re.findall(f"work +({BAR}*)", shown.file.getvalue())


def test_a_stage_ends_with_a_full_bar() -> None:
    shown = console(terminal=True)
    reporter = Reporter(console=shown)
    with reporter.stage("work") as stage:
        stage.fraction(5 / 6)
    assert frames(shown)[-1] == BAR * 40
    assert set(reporter.seconds) == {"work"}


def fail_halfway(reporter: Reporter) -> None:
    with reporter.stage("work") as stage:
        stage.fraction(0.5)
        raise ValueError("no")


def test_a_stage_that_fails_does_not_look_finished() -> None:
    shown = console(terminal=True)
    with pytest.raises(ValueError, match="no"):
        fail_halfway(Reporter(console=shown))
    assert frames(shown)[-1] == BAR * 20


def test_a_transfer_shows_bytes() -> None:
    shown = console(terminal=True)
    with Reporter(console=shown).stage("work", 3 * 2**30) as stage:
        stage.fraction(1 / 3)
    assert isinstance(shown.file, io.StringIO)
    assert "0.0/3.0 GiB" in shown.file.getvalue()
    assert "3.0/3.0 GiB" in shown.file.getvalue()


def test_a_log_file_gets_notes_but_no_bars() -> None:
    shown = console(terminal=False)
    reporter = Reporter(console=shown)
    with reporter.stage("work") as stage:
        stage.fraction(1.0)
    reporter.note("a word")
    assert isinstance(shown.file, io.StringIO)
    assert shown.file.getvalue().strip() == "a word"


def test_stages_of_the_same_name_add_up() -> None:
    reporter = Reporter(quiet=True)
    for _ in range(2):
        with reporter.stage("work"):
            pass
    first = reporter.seconds["work"]
    with reporter.stage("work"):
        pass
    assert reporter.seconds["work"] > first
