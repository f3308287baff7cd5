"""Progress bars: one for each stage with the time left, on stderr.

Log files get notes but no bars, and a quiet reporter prints nothing.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Stage(Protocol):
    """The running stage, as `Reporter.stage` hands it out."""

    def fraction(self, done: float) -> None:
        """Moves the stage's bar to `done`, a share between 0 and 1."""


class Reporter:
    """Shows the progress of stages, prints notes, and measures how long each stage takes.

    console: where to print; stderr when None. quiet: print nothing, unless `console` is given.
    seconds: wall time by stage. processor_seconds: CPU time by stage, of all threads and of child processes that have
    ended; other load on the machine hardly changes it.
    """

    def __init__(self, quiet: bool = False, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, quiet=quiet)
        self.seconds: dict[str, float] = {}
        self.processor_seconds: dict[str, float] = {}

    def note(self, text: str) -> None:
        """Prints a line for the user, above the bars."""
        self.console.print(text, highlight=False, markup=False)

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        """Shows and times one stage. Stages of the same name add up; one that raises leaves its bar where it was."""
        start, start_processor = time.monotonic(), _read_processor_seconds()
        columns = (TextColumn("{task.description:<12}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console, disable=not self.console.is_terminal) as bars:
            task = bars.add_task(name, total=1.0)
            yield _Bar(bars, task)
            bars.update(task, completed=1.0)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - start
        self.processor_seconds[name] = self.processor_seconds.get(name, 0.0) + _read_processor_seconds() - start_processor


def _read_processor_seconds() -> float:
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


class _Bar:
    def __init__(self, bars: Progress, task: int) -> None:
        self._bars, self._task = bars, task

    def fraction(self, done: float) -> None:
        self._bars.update(self._task, completed=min(done, 1.0))  # type: ignore[arg-type]
