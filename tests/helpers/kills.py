"""Runs exports in child processes that kill themselves at a chosen file operation."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from qvlm_export.calibrate.errors import UserError
from qvlm_export.pipeline.export import export
from qvlm_export.pipeline.preparation.prepare import ExportOptions
from qvlm_export.pipeline.progress import Reporter

# Audit events that Python raises before file operations; a rename is what makes an unfinished file a finished one.
WATCHED = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree")


def run_and_kill(options: ExportOptions, operation: int | None) -> int:
    """Runs an export in a child process and kills it at its n-th operation on files in the folder of the output.

    operation: n, or None to let the export finish. Returns 0 if the export finished before that, -9 if it was killed.
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
    remaining = operation

    def count_down(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal remaining
        if event == "open" and str(arguments[0]).endswith(".safetensors") and arguments[1] == "r":
            return  # reading a tensor changes no file, and there are hundreds of such reads
        if event in WATCHED and any(str(a).startswith(folder) for a in arguments if isinstance(a, str | Path)):
            remaining -= 1
            if remaining <= 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count_down)
