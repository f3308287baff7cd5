"""Publishing: moves the finished files of an export to their places by renames, the manifest last.

What stood there is moved aside first, into the work folder, and deleted at the end; when one file cannot be replaced, all go
back. So there is the older export, whole, or the new one, whole, and after a kill in between no manifest, which a resumed
export completes.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qvlm_export.calibrate.errors import UnfinishedError


@dataclass(frozen=True)
class Move:
    """One file or folder to publish.

    source: the finished one, None when there is none and what stands at `target` only has to go. target: its place. aside:
    where what stands there is kept meanwhile, on the same disk.
    """

    source: Path | None
    target: Path
    aside: Path

    def is_done(self) -> bool:
        """Returns whether a run that was killed has already moved the new file into its place."""
        return self.source is not None and not _exists(self.source) and _exists(self.target)


def publish(moves: Sequence[Move], move: Callable[[Path, Path], object] = os.replace) -> None:
    """Replaces all targets, or none. moves: the manifest is the last of them.

    An interrupted call may have made some of the moves. move: renames a path; tests replace it. Raises UnfinishedError when
    a target cannot be replaced, after everything has gone back.
    """
    for folder in dict.fromkeys(one.aside.parent for one in moves):
        folder.mkdir(parents=True, exist_ok=True)
    current = moves[-1]
    try:
        for current in reversed(moves):  # without its manifest, the older export no longer looks finished
            if _exists(current.target) and not current.is_done():
                if _exists(current.aside):  # a killed run has moved the old one aside, and something new stands there
                    remove(current.target)
                else:
                    move(current.target, current.aside)
        for current in moves:
            if current.source is not None and _exists(current.source):
                move(current.source, current.target)
    except OSError as error:
        failed = _move_back(moves, move)
        state = f"{failed[0]} could not be moved back" if failed else "what stood there is in its place again"
        raise UnfinishedError(
            f"{current.target}: cannot be replaced ({error.strerror}); {state}; give yourself the right to replace it"
        ) from error
    for folder in dict.fromkeys(one.aside.parent for one in moves):
        remove(folder)


def _move_back(moves: Sequence[Move], move: Callable[[Path, Path], object]) -> list[Path]:
    """Undoes what was done, the manifest last; returns the files that could not be moved."""
    failed = []
    for one in moves:
        steps = [(one.target, one.source)] if one.source is not None and one.is_done() else []
        steps += [(one.aside, one.target)] if _exists(one.aside) else []
        for source, target in steps:
            try:
                move(source, target)
            except OSError:
                failed.append(source)
                break
    return failed


def remove(path: Path) -> None:
    """Deletes a file or a folder, with all that is inside and that the system allows to delete."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, onerror=_permit_and_retry)
    elif _exists(path):
        path.unlink()


def _permit_and_retry(function: Callable[[str], Any], path: str, _: object) -> None:
    """Gives the owner the right to change the folder of `path`, and tries once more; what cannot be deleted stays."""
    try:
        for folder in (os.path.dirname(path), path):
            if os.path.isdir(folder) and not os.path.islink(folder):
                os.chmod(folder, stat.S_IRWXU)
        function(path) if function is not os.scandir else shutil.rmtree(path, ignore_errors=True)
    except OSError:
        return


def _exists(path: Path) -> bool:
    return os.path.lexists(path)
