"""Runs shell commands as a user would paste them, and processes that Ctrl-C reaches."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path


def restore_interrupts() -> None:
    """Lets a child process handle Ctrl-C, which tests that a shell runs in the background ignore and pass on."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def run_shell(command, **environment):
    """Runs a command in bash in the root folder, with the programs of this environment first in PATH."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-c", command],
        cwd="/",
        env={**os.environ, "PATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
