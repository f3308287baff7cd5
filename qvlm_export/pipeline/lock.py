"""A lock that one process holds on a file, which the system releases when the process dies, however it dies."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qvlm_export.calibrate.errors import UserError


@contextmanager
def hold_lock(path: Path, busy: str, remedy: str) -> Iterator[None]:
    """Holds a lock on the file `path`, which is made with its folder where it is missing, and holds the process id.

    Raises UserError when another process holds it. busy: begins the message: what that process does, and where. remedy: ends
    it.
    """
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                raise UserError(f"{busy} (process {file.read() or 'unknown'}); {remedy}") from error
            if not _is_same_file(file.fileno(), path):  # the process that held the lock has just removed the file
                continue
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield
            return


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
