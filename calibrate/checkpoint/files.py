"""Small files read and written whole: JSON from foreign hands, and files that are complete or not there at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qvlm_export.calibrate.checkpoint.regular_file import check_regular_file
from qvlm_export.calibrate.errors import UserError

# Folders that hold one file while it is written. A killed process leaves its folder behind; see `clear_leftovers`.
WRITING = ".writing-"


def read_json(path: Path, what: str, remedy: str) -> Any:
    """Returns the content of a JSON file. Raises FileNotFoundError, or UserError when the file is not readable as JSON.

    what, remedy: for the message, such as "a readable manifest" and "export again". Half of a surrogate pair, which JSON can
    hold and UTF-8 cannot, is refused, as it could be neither printed nor written again.
    """
    check_regular_file(path, what)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(content, ensure_ascii=False).encode()
    except FileNotFoundError:
        raise
    except RecursionError as error:
        raise UserError(f"{path}: not {what} (nested too deeply); {remedy}") from error
    except OSError as error:
        raise UserError(f"{path}: not {what} ({error.strerror}); {remedy}") from error
    except ValueError as error:
        raise UserError(f"{path}: not {what} ({error}); {remedy}") from error
    return content


def write_json(path: Path, content: Any) -> None:
    """Writes `content` as indented JSON in UTF-8, see `write_atomically`; keys keep their order."""
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls write(temporary path), syncs that file to disk and renames it to `path`.

    The temporary file has a new folder of its own beside `path`: it can replace nobody's file, and what a library leaves
    beside it when it is killed, as safetensors does, lies in that folder, too. When `write` fails, nothing is left. The
    file gets the permissions that the umask gives to new files, whatever the library gave it.
    """
    folder = Path(tempfile.mkdtemp(prefix=WRITING, dir=path.parent))
    try:
        temporary = folder / path.name
        temporary.touch()
        mode = temporary.stat().st_mode & 0o777
        write(temporary)
        with temporary.open("rb") as file:
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def clear_leftovers(folder: Path) -> None:
    """Removes what killed calls of `write_atomically` left in a folder; no other process may be writing there."""
    for leftover in folder.glob(f"{WRITING}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def printable(text: str) -> str:
    """Returns text for a message or a record: what cannot be printed, such as a byte that is not UTF-8, is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
