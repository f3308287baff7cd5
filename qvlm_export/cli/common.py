"""Shared by all commands: errors as one line and an exit code, and libraries that print nothing."""

from __future__ import annotations

import io
import logging
import math
import os
import select
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import typer
from typer.core import TyperCommand

from qvlm_export.calibrate.checkpoint.files import printable
from qvlm_export.calibrate.errors import PrefixWarning, UserError
from qvlm_export.cli.commands import BAD_INPUT, INTERRUPTED
from qvlm_export.pipeline.refusals import REFUSALS, refusal_in_words

PIPE_CLOSED = 128 + signal.SIGPIPE  # as a program ends that does not handle the signal
LARGEST_INTEGER = 2**63 - 1
# click's UsageError. typer does not export it, and depending on its release, click is a dependency or bundled.
_UsageError: type[Exception] = typer.BadParameter.__bases__[0]


class OneLineErrors(TyperCommand):
    """A command that reports wrong arguments in one line, without the usage text that click would print.

    No option of any command can be an integer of more than 64 bits, which overflows in one library or the other.
    """

    def make_context(self, info_name: str | None, args: list[str], *rest: Any, **extra: Any) -> Any:
        """Parses the arguments; ends the program with exit code 2 when they are wrong."""
        try:
            context = super().make_context(info_name, args, *rest, **extra)
            for parameter in self.params:
                _check_integer(parameter.opts[0], context.params.get(parameter.name or ""))
            return context
        except _UsageError as error:
            message = error.format_message().rstrip(".")  # type: ignore[attr-defined]
            _print_line(f"error: {_join_lines(message)}; see {info_name} --help")
            raise typer.Exit(BAD_INPUT) from None
        except KeyboardInterrupt:  # typer would end the program without a message
            _print_line("interrupted")
            raise typer.Exit(INTERRUPTED) from None


def _check_integer(option: str, value: object) -> None:
    if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
        raise typer.BadParameter(f"{option}: the number is too large")


def check_finite(value: float | None) -> float | None:
    """The callback of options that take a number: returns it. Raises BadParameter when it is infinite or NaN."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number")
    return value


@contextmanager
def errors_as_lines() -> Iterator[None]:
    """Turns errors that are not this program's into one line on stderr and an exit code.

    2 for a UserError, and for what the operating system or a library refused; 130 for Ctrl-C; 141, without a line, when
    nobody reads the output any more, as behind `| head`. Other exceptions keep their traceback.
    """
    quiet_libraries()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that is not UTF-8, or a terminal that is not, ends no output
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
        if sys.stdout is not None:
            sys.stdout.flush()  # while a closed pipe can still be told from other errors
    except KeyboardInterrupt as error:
        _print_line(str(error) or "interrupted; nothing was written")
        raise typer.Exit(INTERRUPTED) from None
    except (UserError, *REFUSALS) as error:
        if isinstance(error, BrokenPipeError) and _is_output_closed():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where Python flushes the rest to at exit
            raise typer.Exit(PIPE_CLOSED) from None
        line = str(error) if isinstance(error, UserError) else refusal_in_words(error)
        if line is None:
            raise
        _print_line(f"error: {_join_lines(line)}")
        raise typer.Exit(BAD_INPUT) from None


def _is_output_closed() -> bool:
    """Returns whether nobody reads stdout any more. A pipe to another process of ours can break, too."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)  # errors are reported without being asked for
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (OSError, ValueError):  # stdout is no file, or is closed
        return False


def _print_line(line: str) -> None:
    with suppress(OSError):  # nobody reads stderr; the exit code is all that is left
        print(line, file=sys.stderr)


def _join_lines(text: str) -> str:
    """Returns text in one line that a terminal can show: names may hold line breaks, control characters and more."""
    return printable(" ".join(text.split()))


def quiet_libraries() -> None:
    """Silences the progress bars, log messages and warnings of libraries, which would disturb our own output."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for name in ("transformers", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    warnings.simplefilter("once", PrefixWarning)
    warnings.showwarning = _show_warning


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"warning: {_join_lines(str(message))}", file=sys.stderr)
