"""Schemas of JSON that may have been edited: types and ranges of every value are checked once, when a file is read.

Schemas are derived from the dataclasses that the values go into, so that a new field has its check without a second list.
"""

from __future__ import annotations

import dataclasses
import json
import operator
import types
import typing
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError, create_model

from qvlm_export.calibrate.checkpoint.files import printable
from qvlm_export.calibrate.errors import UserError

LARGEST = 2**31 - 1  # of an integer: sizes and counts, which libraries hold in 32 bits
MOST_ITEMS = 10_000  # of a tuple of any length
SHOWN = 60  # characters of a wrong value in a message


def _check_file_name(name: str) -> str:
    if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise ValueError("must be the name of a file in this folder, without a path")
    return name


def _check_inner_path(path: str) -> str:
    for part in path.split("/"):
        _check_file_name(part)
    return path


Text = Annotated[str, Field(max_length=10_000)]
_FINITE = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Bytes = Annotated[int, Field(ge=0, le=2**53)]  # a size; JSON of all programs holds integers up to this
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]  # sha256 in hexadecimal
FileName = Annotated[str, Field(max_length=255), AfterValidator(_check_file_name)]
InnerPath = Annotated[
    str, Field(max_length=4096), AfterValidator(_check_inner_path)
]  # of a file inside a folder, with slashes


def schema_of(
    kind: type, ranges: Mapping[str, tuple[int, int]] | None = None, extra: Literal["forbid", "ignore"] = "forbid"
) -> Any:
    """Returns a type for pydantic that turns a JSON object into the dataclass `kind`; missing keys are errors.

    Values must have the types of the fields: no text for a number, no number for a flag. Integers are positive, and floats
    finite and not negative. ranges: name of an integer field -> smallest and largest value, where these differ. extra:
    whether unknown keys are errors, too; both hold for dataclasses inside.
    """
    hints, ranges = typing.get_type_hints(kind, include_extras=True), ranges or {}
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        default: Any = ... if required else field.default
        if not required and field.default is dataclasses.MISSING:
            default = Field(default_factory=field.default_factory)  # type: ignore[arg-type]
        fields[field.name] = (_constrain(hints[field.name], ranges.get(field.name, (1, LARGEST)), ranges, extra), default)
    model = create_model(kind.__name__, __config__=ConfigDict(strict=True, extra=extra), **fields)
    return Annotated[model, AfterValidator(lambda value: kind(**{name: getattr(value, name) for name in fields}))]


def _constrain(hint: Any, bounds: tuple[int, int], ranges: Mapping[str, tuple[int, int]], extra: Any) -> Any:
    """Returns the type of a field with the ranges of numbers added, inside tuples and mappings, too."""
    plain = {int: Annotated[int, Field(ge=bounds[0], le=bounds[1])], float: _FINITE, str: Text}
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return schema_of(hint, ranges, extra)
    if origin not in (typing.Union, types.UnionType, tuple, Mapping, dict):
        return plain.get(hint, hint)
    inner: Any = tuple(a if a is Ellipsis else _constrain(a, bounds, ranges, extra) for a in arguments)
    if origin is tuple:
        return Annotated[tuple[inner], Field(max_length=MOST_ITEMS)] if Ellipsis in inner else tuple[inner]
    return dict[inner[0], inner[1]] if origin in (Mapping, dict) else reduce(operator.or_, inner)


def check_schema(schema: TypeAdapter[Any], content: Any, path: Path, what: str, remedy: str, *, inside: str = "") -> Any:
    """Returns `content` of the JSON file `path` as the type of `schema`.

    what, remedy: for the message. inside: the key that `content` stands under in the file. Raises UserError that names the
    first wrong value, and what is wrong with it.
    """
    try:
        return schema.validate_json(json.dumps(content), strict=True)  # as JSON, in which tuples are lists
    except UserError as error:  # of a dataclass that checks how its values fit together
        raise UserError(f"{path}: {what} is damaged ({error}); {remedy}") from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(printable(str(part)) for part in (*filter(None, [inside]), *first["loc"])) or "all of it"
        value = "" if first["type"] == "missing" else f" and is {_shorten(json.dumps(first['input']))}"
        raise UserError(
            f"{path}: {what} is damaged ({place}: {first['msg'].removeprefix('Value error, ')}{value}); {remedy}"
        ) from error


def _shorten(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
