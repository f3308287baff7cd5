"""What all commands share: errors as one line, quiet libraries."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from calibrate.errors import UserError

BAD_INPUT = 2


@contextmanager
def errors_as_lines() -> Iterator[None]:
    """Turns a UserError into one line on stderr and exit code 2."""
    quiet_libraries()
    try:
        yield
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise typer.Exit(BAD_INPUT) from None
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        raise typer.Exit(130) from None


def quiet_libraries() -> None:
    """Progress bars and advice of libraries would stand between the lines of ours."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("transformers").setLevel(logging.ERROR)
