"""Running a line of shell as a user pastes it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run_shell(command, **environment):
    """A line as a user pastes it, from another folder; polygraphy is the one of this environment."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-c", command],
        cwd="/",
        env={**os.environ, "PATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
