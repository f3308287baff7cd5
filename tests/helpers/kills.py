"""Exports in processes of their own that are killed at a chosen file operation."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from qvlm_export.calibrate.errors import UserError
from qvlm_export.pipeline.export import export
from qvlm_export.pipeline.preparation.prepare import ExportOptions
from qvlm_export.pipeline.progress import Reporter

# What Python says of file operations before it does them. Renames are where unfinished becomes finished.
WATCHED = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree")


def run_and_kill(options: ExportOptions, operation: int | None) -> int:
    """Runs an export and kills it at its n-th operation on files of the output's folder.

    Returns 0 for an export that came to its end before that, -9 for a killed one.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if operation is not None:
                _kill_at(operation, str(options.out.parent))
            export(options, Reporter(quiet=True))
            code = 0
        except UserError as error:
            print(repr(error), file=sys.stderr)
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def _kill_at(operation: int, folder: str) -> None:
    left = operation

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal left
        if event == "open" and str(arguments[0]).endswith(".safetensors") and arguments[1] == "r":
            return  # reading a tensor leaves nothing behind, and there are hundreds
        if event in WATCHED and any(str(a).startswith(folder) for a in arguments if isinstance(a, str | Path)):
            left -= 1
            if left <= 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
