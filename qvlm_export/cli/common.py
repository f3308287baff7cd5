"""What all commands share: errors as one line, quiet libraries."""

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
# click's class, which typer does not name: some releases depend on click, others carry it inside
_UsageError: type[Exception] = typer.BadParameter.__bases__[0]


class OneLineErrors(TyperCommand):
    """A command that says in one line what is wrong with its arguments, where click would print its usage as well."""

    def make_context(self, info_name: str | None, args: list[str], *rest: Any, **extra: Any) -> Any:
        try:
            return super().make_context(info_name, args, *rest, **extra)
        except _UsageError as error:
            print(f"error: {_one_line(error.format_message()).rstrip('.')}; see {info_name} --help", file=sys.stderr)  # type: ignore[attr-defined]
            raise typer.Exit(BAD_INPUT) from None
        except KeyboardInterrupt:  # typer would leave without a word
            print("interrupted", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None


@contextmanager
def errors_as_lines() -> Iterator[None]:
    """Turns a UserError into one line on stderr and exit code 2."""
    quiet_libraries()
    try:
        yield
    except UserError as error:
        print(f"error: {_one_line(str(error))}", file=sys.stderr)
        raise typer.Exit(BAD_INPUT) from None
    except KeyboardInterrupt as error:
        print(str(error) or "interrupted; nothing was written", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None


def _one_line(text: str) -> str:
    return " ".join(text.split())


def quiet_libraries() -> None:
    """Progress bars and advice of libraries would stand between the lines of ours."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
