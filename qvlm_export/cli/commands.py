"""What the console scripts call. Nothing heavy is imported before Ctrl-C has its answer: one line, exit code 130."""

from __future__ import annotations

import os
import signal
import sys
from importlib import import_module
from types import FrameType

INTERRUPTED = 130  # as shells have it: 128 and the signal's number


def export() -> None:
    """`qvlm-export`"""
    _start("export")


def run() -> None:
    """`qvlm-run`"""
    _start("run")


def validate() -> None:
    """`qvlm-validate`"""
    _start("validate")


def evaluate() -> None:
    """`qvlm-eval`"""
    _start("evaluate")


def inspect() -> None:
    """`qvlm-inspect`"""
    _start("inspect")


def _start(module: str) -> None:
    """Imports a command's module and runs its app, which ends the process."""
    heeded = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not where a shell had it ignored
    if heeded:
        signal.signal(signal.SIGINT, _leave)
    app = import_module(f"qvlm_export.cli.{module}").app
    if heeded:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        app()
    except KeyboardInterrupt:  # outside what the command guards itself
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


def _leave(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
    """Ends the process at once: an exception raised within an import may come out of it as another one."""
    os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)
