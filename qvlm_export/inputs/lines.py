"""One line of a calibration set: its picture, prompt and answer, under the names that data sets give to them.

A picture under a name that is not known is refused: ignoring it would make a question without a picture of it, silently.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from qvlm_export.calibrate.errors import UserError
from qvlm_export.checkpoints.files.hub_errors import first_line

# Field of a line -> the keys that may hold it. Of several keys, each must say the same.
KEYS = {
    "image": (
        "image", "images", "image_path", "image_paths", "image_file", "img", "img_path", "picture", "photo", "file_name",
    ),
    "prompt": ("prompt", "question", "query", "text"),
    "answer": ("answer", "response"),
}  # fmt: skip
_KNOWN = {key for keys in KEYS.values() for key in keys}
_PICTURE_WORDS = ("image", "img", "picture", "photo")
_PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif")
_EXAMPLE = 'write {"image": path, "prompt": text}'


class Line(BaseModel):
    """A question. image: a path relative to the file, None without a picture. answer: what the model should say, or None."""

    model_config = ConfigDict(strict=True)
    image: str | None = None
    prompt: str
    answer: str | None = None


def parse_line(text: str, where: str) -> Line:
    """Returns a line of JSON as a `Line`. where: file and line number, which begin error messages.

    Raises UserError for what is no such line, for a picture under a name that is not known, and for two names of one thing.
    """
    try:
        content = json.loads(text, object_pairs_hook=make_unique_dict)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({first_line(error)}); write one JSON object a line") from error
    if not isinstance(content, dict):
        raise UserError(f"{where}: the line is no dictionary, but of type {type(content).__name__}; {_EXAMPLE}")
    found = {field: _find_value(content, keys, where) for field, keys in KEYS.items()}
    fields = {field: value for field, (_, value) in found.items() if value is not None}
    _refuse_unknown_pictures(content, fields.get("image"), where)
    try:
        return Line.model_validate(fields)
    except ValidationError as error:
        details = error.errors()[0]
        raise UserError(f"{where}: {found[str(details['loc'][0])][0]}: {details['msg']}; {_EXAMPLE}") from error


def make_unique_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads`, which keeps the last of equal keys silently. Raises ValueError for equal keys."""
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"{key!r} stands twice in one object")
        content[key] = value
    return content


def _find_value(content: Mapping[str, Any], keys: tuple[str, ...], where: str) -> tuple[str, Any]:
    """Returns the key that holds a field, and its value; the field's own name and None when none does."""
    found = {key: _unwrap(content[key], key, where) for key in keys if key in content}
    found = {key: value for key, value in found.items() if value is not None}
    if not found:
        return keys[0], None
    (key, value), *others = found.items()
    for other, other_value in others:
        if other_value != value:
            raise UserError(f"{where}: {key} and {other} say different things; keep one of them")
    return key, value


def _unwrap(value: Any, key: str, where: str) -> Any:
    """Returns the only entry of a list of pictures, None for an empty one, and anything else as it is."""
    if key not in KEYS["image"] or not isinstance(value, list):
        return value
    if len(value) > 1:
        raise UserError(f"{where}: {key} holds {len(value)} pictures; a line takes one, so write a line for each")
    return value[0] if value else None


def _refuse_unknown_pictures(content: Mapping[str, Any], picture: Any, where: str) -> None:
    """Raises UserError for a key that is not known and may hold a picture; numbers beside a picture are about it."""
    for key, value in content.items():
        if key in _KNOWN or value in (None, "", [], {}, picture):
            continue
        is_named = any(word in key.lower() for word in _PICTURE_WORDS)
        is_about = picture is not None and isinstance(value, int | float)
        if (is_named and not is_about) or any(text.endswith(_PICTURE_SUFFIXES) for text in _list_texts(value)):
            raise UserError(f"{where}: {key} may be a picture, but is no name for one; call it image, or take it out")


def _list_texts(value: Any, depth: int = 2) -> Iterator[str]:
    """Yields the texts in a value in lower case, in the lists and objects of a data set as deep as they hold pictures."""
    if isinstance(value, str):
        yield value.strip().lower()
    elif depth and isinstance(value, list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _list_texts(part, depth - 1)
