"""The schema of X.json: the types and ranges that its values must have, whoever edited and sealed it last.

A new field of `ModelConfig` or `Limits` is checked without a change here. Unknown keys are refused in these two, as they
would change what is computed, and ignored elsewhere: a later version may describe more without changing the meaning of what
this one reads, and gives the manifest a new version where it does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import TypeAdapter

from qvlm_export.calibrate.checkpoint.schema import LARGEST, Bytes, Digest, FileName, InnerPath, schema_of
from qvlm_export.calibrate.errors import UserError
from qvlm_export.engines.config import Limits, ModelConfig

MOST_LAYERS = 1000  # so that a wrong number of layers is an error and not hours of work
# Integer field -> smallest and largest value, where these are not those of a size.
RANGES = {
    "image_token_id": (0, LARGEST),
    "eos_token_ids": (0, LARGEST),
    "feature_layers": (0, MOST_LAYERS),
    "num_layers": (0, MOST_LAYERS),
    "num_linears": (1, 2),
    "shape": (0, LARGEST),
}


@dataclass(frozen=True)
class _Model:
    name: str
    model_type: str = ""


@dataclass(frozen=True)
class _Backend:
    name: str
    version: str | None = None
    targets: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Check:
    linear: str
    scheme: str
    executed: str
    passed: bool


@dataclass(frozen=True)
class _Generation:
    eos_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Value:
    name: str
    type: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class _Inner:
    bytes: Bytes
    sha256: Digest


@dataclass(frozen=True)
class _File:
    """An entry of `files`; exports made before folders were recorded have only the name of a folder."""

    name: FileName
    bytes: Bytes | None = None
    sha256: Digest | None = None
    files: Mapping[InnerPath, _Inner] | None = None

    def __post_init__(self) -> None:
        if self.sha256 is not None and self.bytes is None:
            raise UserError(f"{self.name} has a hash but no size")


@dataclass(frozen=True)
class _Content:
    """X.json as a whole; the fields are those of `Manifest`, and the mappings among them are read as they are."""

    model: _Model
    scheme: str
    float_type: Literal["float16", "bfloat16", "float32"]
    linears: Mapping[str, str]
    backend: _Backend
    plan_check: tuple[_Check, ...]
    interface: Mapping[str, Mapping[str, tuple[_Value, ...]]]
    versions: Mapping[str, str]
    files: Mapping[str, _File]
    calibration: Mapping[str, Any]
    generation: _Generation = _Generation()


CONTENT = TypeAdapter(schema_of(_Content, RANGES, extra="ignore"))
CONFIG = TypeAdapter(schema_of(ModelConfig, RANGES))
LIMITS = TypeAdapter(schema_of(Limits))


def check_config(config: ModelConfig) -> None:
    """Raises UserError, without a path, for sizes that are possible alone but not together."""
    vision, text = config.vision, config.text
    rules = (
        (len(vision.feature_layers) > 0, "vision.feature_layers is empty"),
        (all(layer <= vision.num_layers for layer in vision.feature_layers), "a feature layer is beyond the last layer"),
        (vision.patch_size <= vision.image_size, "vision.patch_size is larger than an image"),
        (vision.hidden_size % vision.num_heads == 0, "vision.hidden_size is no multiple of num_heads"),
        (text.num_heads % text.num_kv_heads == 0, "text.num_heads is no multiple of num_kv_heads"),
        (text.rope_scale > 0, "text.rope_scale is 0"),
        (
            len(text.rope_frequencies) in (0, text.head_dim // 2),
            "text.rope_frequencies do not fit head_dim",
        ),
        (config.image_token_id < text.vocab_size, "image_token_id is not in the vocabulary"),
        (config.tiles is None or len(config.tiles.pinpoints) > 0, "tiles.pinpoints is empty"),
    )
    for holds, problem in rules:
        if not holds:
            raise UserError(f"config: {problem}")
