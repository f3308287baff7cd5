"""Small files read and written whole: JSON from foreign hands, and files that are complete or not there at all."""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qvlm_export.calibrate.checkpoint.regular_file import check_regular_file
from qvlm_export.calibrate.errors import UserError

MAX_DEPTH = 100  # of JSON; libraries copy and print it recursively
WRITING = ".writing-"  # begins the name of a file while it is written
ALIGNMENT = 8  # of the tensors in a safetensors file, in bytes
# numpy's name of a dtype -> that of safetensors, which stores tensors by dtype, from the last of this list to the first.
_DTYPES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "int16": "I16", "float16": "F16", "bfloat16": "BF16", "int32": "I32",
    "float32": "F32", "float64": "F64", "int64": "I64",
}  # fmt: skip


def read_json(path: Path, what: str, remedy: str) -> Any:
    """Returns the content of a JSON file. Raises FileNotFoundError, or UserError when the file is not readable as JSON.

    what, remedy: for the message, such as "a readable manifest" and "export again". Half of a surrogate pair, which JSON can
    hold and UTF-8 cannot, is refused, as it could be neither printed nor written again.
    """
    check_regular_file(path, what)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if _measure_depth(content) > MAX_DEPTH:
            raise RecursionError
        json.dumps(content, ensure_ascii=False).encode()
    except FileNotFoundError:
        raise
    except RecursionError as error:
        raise UserError(f"{path}: not {what} (nested more than {MAX_DEPTH} deep); {remedy}") from error
    except OSError as error:
        raise UserError(f"{path}: not {what} ({error.strerror}); {remedy}") from error
    except ValueError as error:
        raise UserError(f"{path}: not {what} ({error}); {remedy}") from error
    return content


def _measure_depth(content: Any) -> int:
    """Returns how deep lists and objects are nested; stops beyond MAX_DEPTH."""
    depth, level = 0, [content]
    while level and depth <= MAX_DEPTH:
        containers = [item for item in level if isinstance(item, dict | list)]
        level = [inner for item in containers for inner in (item.values() if isinstance(item, dict) else item)]
        depth += bool(containers)
    return depth


def write_json(path: Path, content: Any) -> None:
    """Writes `content` as indented JSON in UTF-8, see `write_atomically`; keys keep their order."""
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls write(temporary path), syncs that file to disk and renames it to `path`.

    A process that is killed meanwhile leaves no incomplete file at `path`, see `clear_leftovers`; one that fails leaves
    nothing. `write` must make no other file: what a library makes for itself would stay after a kill.
    """
    temporary = path.with_name(f"{WRITING}{path.name}")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def clear_leftovers(folder: Path) -> None:
    """Removes what killed calls of `write_atomically` left in a folder; no other process may be writing there."""
    for leftover in folder.glob(f"{WRITING}*"):
        leftover.unlink()


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file, the same bytes as the safetensors library, see `write_atomically`.

    The library would write through a hidden file of its own, which a kill leaves beside the others, and which nobody but the
    owner may read, whatever the umask. Here, an error of the disk is an OSError, and no second copy is in memory.
    """
    ranks = list(_DTYPES)
    order = sorted(tensors, key=lambda name: (-ranks.index(tensors[name].dtype.name), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in order:
        array = tensors[name]
        offsets = [offset, offset := offset + array.nbytes]
        header[name] = {"dtype": _DTYPES[array.dtype.name], "shape": list(array.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in order:
                file.write(np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8).data)

    write_atomically(path, write)


def printable(text: str) -> str:
    """Returns text for a message or a record: control characters, and bytes that are not UTF-8, are escaped."""
    return "".join(c.encode("unicode_escape", "surrogatepass").decode() if _is_control(c) else c for c in text)


def is_utf8(text: str) -> bool:
    """Returns whether UTF-8 can hold a text; not so names of files in another encoding, nor halves of surrogate pairs."""
    return not any(unicodedata.category(character) == "Cs" for character in text)


def _is_control(character: str) -> bool:
    """Returns whether a character moves the cursor or changes the text around it, or is half of a surrogate pair."""
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")
