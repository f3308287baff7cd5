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
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


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
    def stage(self, name: str, num_bytes: int | None = None) -> Iterator[Stage]:
        """Shows and times one stage. Stages of the same name add up; one that raises leaves its bar where it was.

        num_bytes: of a transfer, whose bar shows bytes and their rate, too.
        """
        start, start_processor = time.monotonic(), _read_processor_seconds()
        transfer = () if num_bytes is None else (DownloadColumn(binary_units=True), TransferSpeedColumn())
        times: tuple[ProgressColumn, ...] = (TimeElapsedColumn(), TimeRemainingColumn())
        columns = (TextColumn("{task.description:<12}"), BarColumn(), *transfer, *times)
        with Progress(*columns, console=self.console, disable=not self.console.is_terminal) as bars:
            total = float(num_bytes or 1)
            task = bars.add_task(name, total=total)
            yield _Bar(bars, task, total)
            bars.update(task, completed=total)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - start
        self.processor_seconds[name] = self.processor_seconds.get(name, 0.0) + _read_processor_seconds() - start_processor


def _read_processor_seconds() -> float:
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


class _Bar:
    def __init__(self, bars: Progress, task: int, total: float) -> None:
        self._bars, self._task, self._total = bars, task, total

    def fraction(self, done: float) -> None:
        self._bars.update(self._task, completed=min(done, 1.0) * self._total)  # type: ignore[arg-type]
