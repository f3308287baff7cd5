"""Shared by all commands: errors as one line and an exit code, and libraries that print nothing."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperCommand

from qvlm_export.calibrate.errors import UserError
from qvlm_export.cli.commands import INTERRUPTED

BAD_INPUT = 2
# click's UsageError. typer does not export it, and depending on its release, click is a dependency or bundled.
_UsageError: type[Exception] = typer.BadParameter.__bases__[0]


class OneLineErrors(TyperCommand):
    """A command that reports wrong arguments in one line, without the usage text that click would print."""

    def make_context(self, info_name: str | None, args: list[str], *rest: Any, **extra: Any) -> Any:
        """Parses the arguments; ends the program with exit code 2 when they are wrong."""
        try:
            return super().make_context(info_name, args, *rest, **extra)
        except _UsageError as error:
            print(f"error: {_join_lines(error.format_message()).rstrip('.')}; see {info_name} --help", file=sys.stderr)  # type: ignore[attr-defined]
            raise typer.Exit(BAD_INPUT) from None
        except KeyboardInterrupt:  # typer would end the program without a message
            print("interrupted", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None


@contextmanager
def errors_as_lines() -> Iterator[None]:
    """Turns a UserError into one line on stderr and exit code 2, and Ctrl-C into one line and exit code 130."""
    quiet_libraries()
    try:
        yield
    except UserError as error:
        print(f"error: {_join_lines(str(error))}", file=sys.stderr)
        raise typer.Exit(BAD_INPUT) from None
    except KeyboardInterrupt as error:
        print(str(error) or "interrupted; nothing was written", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None


def _join_lines(text: str) -> str:
    return " ".join(text.split())


def quiet_libraries() -> None:
    """Silences the progress bars, log messages and warnings of libraries, which would disturb our own output."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for name in ("transformers", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
