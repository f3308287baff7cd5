"""A compatibility case: one input as users have it, what transformers makes of it, and what this package makes of it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

COMMANDS = "from qvlm_export.cli.commands import {name}; {name}()"


@dataclass(frozen=True)
class Outcome:
    """What became of a case, each in a few words or one line: numbers, an answer, or an error message."""

    transformers: str
    ours: str


@dataclass(frozen=True)
class Case:
    """One row of the table. run: an empty folder to work in -> outcome. It raises nothing that is expected."""

    title: str
    run: Callable[[Path], Outcome]


@dataclass(frozen=True)
class CommandResult:
    """Exit code and output of a command."""

    code: int
    stdout: str
    stderr: str

    def in_words(self, folder: Path) -> str:
        """Returns exit code and the last line on stderr; paths in `folder` are shortened."""
        lines = self.stderr.strip().splitlines()
        line = lines[-1] if lines and self.code else ""
        return f"exit code {self.code}" + (f": {line.removeprefix('error: ').replace(f'{folder}/', '')}" if line else "")


def run_command(
    name: str, *arguments: object, variables: Mapping[str, str] | None = None, cwd: Path | None = None
) -> CommandResult:
    """Runs a command of this package in a process of its own. name: a function of `qvlm_export/cli/commands.py`."""
    program = [sys.executable, "-c", COMMANDS.format(name=name), *map(str, arguments)]
    environment = {**os.environ, **(variables or {})}
    process = subprocess.run(program, capture_output=True, text=True, check=False, env=environment, cwd=cwd)
    return CommandResult(process.returncode, process.stdout, process.stderr)
