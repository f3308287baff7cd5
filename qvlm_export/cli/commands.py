"""Entry points of the console scripts.

Each sets up Ctrl-C, to end the program with one line and exit code 130, before it imports anything slow.
"""

from __future__ import annotations

import os
import signal
import sys
from importlib import import_module
from types import FrameType

from qvlm_export.calibrate.numerics.memory import request_huge_pages

BAD_INPUT = 2
# What the dynamic linker says when there is no memory for a library; the table of refusals is not loaded yet.
NO_MEMORY = ("failed to map segment", "Cannot allocate memory")
INTERRUPTED = 130  # the convention of shells: 128 + the number of SIGINT


def export() -> None:
    """Runs `qvlm-export`."""
    _run_app("export")


def run() -> None:
    """Runs `qvlm-run`."""
    _run_app("run")


def validate() -> None:
    """Runs `qvlm-validate`."""
    _run_app("validate")


def evaluate() -> None:
    """Runs `qvlm-eval`."""
    _run_app("evaluate")


def inspect() -> None:
    """Runs `qvlm-inspect`."""
    _run_app("inspect")


def _run_app(module: str) -> None:
    """Imports a command's module and runs its app, which ends the process."""
    # A shell that starts a command in the background has it ignore Ctrl-C; that must stay so.
    handles_interrupts = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if handles_interrupts:
        signal.signal(signal.SIGINT, _exit_at_once)
    try:
        request_huge_pages()
        app = import_module(f"qvlm_export.cli.{module}").app
        if handles_interrupts:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        app()
    except KeyboardInterrupt:  # raised before or after the part of the command that handles it
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except (MemoryError, ImportError) as error:  # raised before that part: a library does not fit
        if not isinstance(error, MemoryError) and not any(phrase in str(error) for phrase in NO_MEMORY):
            raise
        print("error: memory ran out while the program was loaded; raise `ulimit -v`, or close programs", file=sys.stderr)
        sys.exit(BAD_INPUT)


def _exit_at_once(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
    """Ends the process at once, as an import may turn an exception raised within it into another one."""
    os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)
