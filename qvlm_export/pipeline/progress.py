"""Progress for people: one bar a stage with the time left, on stderr; silent for machines and in log files."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Stage(Protocol):
    """fraction(done) moves the bar of one stage, done between 0 and 1."""

    def fraction(self, done: float) -> None: ...


class Reporter:
    """Shows stages and notes. console: where to, stderr when None.

    seconds: that passed in each stage. processor_seconds: of all threads and of ended processes, which a busy machine
    changes little.
    """

    def __init__(self, quiet: bool = False, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, quiet=quiet)
        self.seconds: dict[str, float] = {}
        self.processor_seconds: dict[str, float] = {}

    def note(self, text: str) -> None:
        """A line for the user, above the bars."""
        self.console.print(text, highlight=False, markup=False)

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        began, processor = time.monotonic(), _processor_seconds()
        columns = (TextColumn("{task.description:<12}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console, disable=not self.console.is_terminal) as bars:
            task = bars.add_task(name, total=1.0)
            yield _Bar(bars, task)
            bars.update(task, completed=1.0)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - began
        self.processor_seconds[name] = self.processor_seconds.get(name, 0.0) + _processor_seconds() - processor


def _processor_seconds() -> float:
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


class _Bar:
    def __init__(self, bars: Progress, task: int) -> None:
        self._bars, self._task = bars, task

    def fraction(self, done: float) -> None:
        self._bars.update(self._task, completed=min(done, 1.0))  # type: ignore[arg-type]
