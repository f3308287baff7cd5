"""Refuses what is not a regular file before it is opened: opening a pipe would wait for a writer for ever."""

from __future__ import annotations

import stat
from pathlib import Path

from qvlm_export.calibrate.errors import UserError

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def check_regular_file(path: Path, what: str) -> None:
    """Raises UserError when `path` is a folder, a pipe, a socket or a device. A missing file is left to the caller.

    what: what the file should hold, with its article, such as "a picture". Symbolic links are followed.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):  # a missing file, or a name that no file can have: the caller says which
        return
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "no regular file")
        raise UserError(f"{path}: is {kind}, not {what}; give a regular file")
