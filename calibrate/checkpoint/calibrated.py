"""Calibrated checkpoint in the compressed-tensors format: the result of calibration, which all later stages read.

It is a Hugging Face folder that unmodified transformers can load. Linears of 3 and 4 bits are stored as `weight_packed`,
`weight_scale` and `weight_shape`, linears of 6 and 8 bits as int8 `weight` and `weight_scale`, with `input_scale` where
activations are quantized. Quantized linears of tower and projector are stored in the dense format, float32 `weight` being
code * scale: transformers decompresses the others when the model's own forward is called, which `generate` calls after it
has run tower and projector. Float tensors are stored as in the source. `calibration.json` is this program's own record.
Shards are written one block at a time and the index last, so a folder with an index is complete. `prefix.safetensors` holds
keys and values of the tokens that all prompts begin with, where the model was calibrated behind them (`prefix.py`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open

from qvlm_export.calibrate.checkpoint.files import clear_leftovers, read_json, write_json, write_tensors
from qvlm_export.calibrate.checkpoint.packing import pack_codes, unpack_codes
from qvlm_export.calibrate.checkpoint.prefix import PrefixCache, read_prefix, write_prefix
from qvlm_export.calibrate.checkpoint.safetensors_source import INDEX_FILE, SafetensorsSource
from qvlm_export.calibrate.checkpoint.schema import check_schema, schema_of
from qvlm_export.calibrate.checkpoint.scheme import LinearScheme
from qvlm_export.calibrate.errors import UserError

RECORD_FILE = "calibration.json"
RECORD_VERSION = 1
PREFIX_FILE = "prefix.safetensors"  # in the folder, where the model was calibrated behind a prefix


@dataclass(frozen=True)
class QuantizedLinear:
    """One linear as integer codes and scales.

    codes: int8 [out, in]. scale: float16 [out, in // group_size] for grouped weights, float32 [out] for per-channel weights.
    input_scale: the float32 per-tensor activation scale (a value that float16 can hold), None for float activations.
    """

    scheme: LinearScheme
    codes: np.ndarray
    scale: np.ndarray
    input_scale: float | None

    def dequantized(self) -> np.ndarray:
        """The dequantized weight, float32 [out, in]."""
        weight = self.codes.astype(np.float32)
        groups = weight.reshape(len(weight), -1, self.scheme.group_size or weight.shape[1])
        groups *= self.scale.astype(np.float32).reshape(len(weight), -1, 1)
        return weight


class CalibratedCheckpoint:
    """Reader for a finished calibrated checkpoint.

    schemes: scheme of each quantized linear by name. summary: the calibrator's record of the run. floats: a source of all
    stored tensors, float tensors among them. Raises UserError naming the file when the folder is incomplete or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        record = _read_record(folder / RECORD_FILE)
        self.schemes, self.summary = dict(record.linears), dict(record.summary)
        self.floats = SafetensorsSource(folder)
        for name, scheme in self.schemes.items():
            self._check_tensors(name, scheme)

    def _check_tensors(self, name: str, scheme: LinearScheme) -> None:
        """Raises UserError when a tensor of a quantized linear is missing, or has another type or rank than it must have."""
        for suffix, (dtype, rank) in _stored_tensors(scheme, self._is_dense(name)).items():
            tensor = f"{name}.{suffix}"
            if tensor not in self.floats:
                raise UserError(f"{self.folder}: lacks the tensor {tensor}, which {RECORD_FILE} lists; calibrate again")
            got = self.floats.dtype(tensor).name, len(self.floats.shape(tensor))
            if got != (dtype, rank):
                raise UserError(
                    f"{self.folder}: {tensor} is {got[0]} of rank {got[1]}, {RECORD_FILE} needs {dtype} of rank {rank}; "
                    "calibrate again"
                )

    def _is_dense(self, name: str) -> bool:
        """Whether a linear is stored in the dense format. Folders written before 0.10 have no such linear."""
        weight = f"{name}.weight"
        return weight in self.floats and self.floats.dtype(weight) == np.float32

    def weight_shape(self, name: str) -> tuple[int, int]:
        """The shape [out, in] of a quantized linear's weight."""
        stored = f"{name}.weight"
        shape = self.floats.shape(stored) if stored in self.floats else self.floats.load(f"{name}.weight_shape")
        return int(shape[0]), int(shape[1])

    def codes(self, name: str) -> np.ndarray:
        """Codes of the linear `name`, int8 [out, in], read from disk now."""
        scheme = self.schemes[name]
        if self._is_dense(name):
            return _recover_codes(self.floats.load(f"{name}.weight"), self.floats.load(f"{name}.weight_scale"))
        if scheme.group_size is None:
            return self.floats.load(f"{name}.weight")
        _, columns = self.weight_shape(name)
        return unpack_codes(self.floats.load(f"{name}.weight_packed"), scheme.weight_bits, columns)

    def packed_nibbles(self, name: str) -> np.ndarray | None:
        """The 4-bit codes of a grouped linear in pairs, uint8 [out, in // 2], with 8 added to every code.

        The even column is in the low half of each byte. None where the stored weight does not have this layout.
        """
        scheme, (_, columns) = self.schemes[name], self.weight_shape(name)
        if scheme.weight_bits != 4 or columns % 8 or self._is_dense(name):
            return None
        return self.floats.load(f"{name}.weight_packed").view(np.uint8)

    def scale(self, name: str) -> np.ndarray:
        """Weight scales: float16 [out, in // group_size] for grouped weights, float32 [out] for per-channel weights."""
        scale = self.floats.load(f"{name}.weight_scale")
        return scale[:, 0] if self.schemes[name].group_size is None else scale

    def input_scale(self, name: str) -> float | None:
        """The static per-tensor activation scale, None for float activations."""
        quantizer = self.input_quantizer(name)
        return None if quantizer is None else quantizer[0]

    def input_quantizer(self, name: str) -> tuple[float, int] | None:
        """Scale and bits of the activations, None for float activations."""
        bits = self.schemes[name].activation_bits
        return None if bits is None else (float(self.floats.load(f"{name}.input_scale")[0]), bits)

    def read_prefix(self, shape: tuple[int, int, int]) -> PrefixCache | None:
        """The prefix behind which the model was calibrated, None without one.

        shape: as for `prefix.read_prefix`. Raises UserError when the file is missing or damaged, or of another checkpoint.
        """
        path, recorded = self.folder / PREFIX_FILE, self.summary.get("prefix")
        if not recorded and not path.exists():
            return None
        prefix = read_prefix(path, shape)
        if recorded and list(prefix.token_ids) != recorded.get("token_ids"):
            raise UserError(f"{path}: is for other tokens than {RECORD_FILE} names; calibrate again")
        return prefix

    def linear(self, name: str) -> QuantizedLinear:
        """The quantized linear `name`: scheme, codes and scales."""
        return QuantizedLinear(self.schemes[name], self.codes(name), self.scale(name), self.input_scale(name))


class CalibratedWriter:
    """Writes a calibrated checkpoint shard by shard.

    The folder is created, and the index of an earlier run deleted. Readers refuse the folder until `finish` has written the
    new index.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name in (INDEX_FILE, PREFIX_FILE):
            (folder / name).unlink(missing_ok=True)
        clear_leftovers(folder)
        self._folder = folder
        self._weight_map: dict[str, str] = {}
        self._linears: dict[str, LinearScheme] = {}

    def write_shard(self, block: str, linears: Mapping[str, QuantizedLinear], floats: Mapping[str, np.ndarray]) -> str:
        """Writes the tensors of one block into a shard of its own, through a temporary file.

        linears: quantized linears by name. floats: the block's other tensors by name. Returns the name of the file.
        """
        tensors = {name: np.ascontiguousarray(array) for name, array in floats.items()}
        for name, linear in linears.items():
            tensors |= _encode_linear(name, linear)
            self._linears[name] = linear.scheme
        file_name = f"model-{block}.safetensors"
        write_tensors(self._folder / file_name, tensors, {"format": "pt"})
        self._weight_map |= dict.fromkeys(tensors, file_name)
        return file_name

    def adopt_shard(self, file_name: str, schemes: Mapping[str, LinearScheme]) -> list[str]:
        """Adds a shard that an interrupted run has written completely, and returns the names of its tensors.

        schemes: schemes of the linears in the shard. Raises UserError when the shard is missing, damaged, or lacks one of
        them.
        """
        path = self._folder / file_name
        try:
            with safe_open(path, "np") as file:
                names = list(file.keys())
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: cannot be read ({error}); delete the work folder and start over") from error
        missing = {f"{name}.weight_scale" for name in schemes} - set(names)
        if missing:
            raise UserError(f"{path}: lacks {min(missing)}; delete the work folder and start over")
        self._weight_map |= dict.fromkeys(names, file_name)
        self._linears |= schemes
        return names

    def write_prefix(self, prefix: PrefixCache, float_type: str) -> None:
        """Writes the prefix behind which the model is calibrated, values divided as v_proj was equalized."""
        write_prefix(self._folder / PREFIX_FILE, prefix, float_type)

    def finish(self, config: Mapping[str, Any], summary: Mapping[str, Any]) -> None:
        """Writes config.json, the record and, last, the index.

        config: the model's config.json, to which the quantization config is added. summary: goes into the record.
        """
        quantized = {**config, "quantization_config": quantization_config(self._linears)}
        record = {
            "version": RECORD_VERSION,
            "summary": dict(summary),
            "linears": {name: asdict(scheme) for name, scheme in sorted(self._linears.items())},
        }
        index = {"metadata": {}, "weight_map": dict(sorted(self._weight_map.items()))}
        for name, content in (("config.json", quantized), (RECORD_FILE, record), (INDEX_FILE, index)):
            write_json(self._folder / name, content)


def _encode_linear(name: str, linear: QuantizedLinear) -> dict[str, np.ndarray]:
    """The tensors that a linear is stored as, by full name."""
    if is_stored_dense(name):
        scale = linear.scale.reshape(len(linear.scale), -1)
        tensors = {f"{name}.weight": linear.dequantized(), f"{name}.weight_scale": np.ascontiguousarray(scale)}
    elif linear.scheme.group_size is None:
        tensors = {
            f"{name}.weight": np.ascontiguousarray(linear.codes),
            f"{name}.weight_scale": np.ascontiguousarray(linear.scale[:, None]),
        }
    else:
        tensors = {
            f"{name}.weight_packed": pack_codes(linear.codes, linear.scheme.weight_bits),
            f"{name}.weight_scale": np.ascontiguousarray(linear.scale),
            f"{name}.weight_shape": np.array(linear.codes.shape, np.int64),
        }
    if linear.scheme.activation_bits is not None:
        tensors[f"{name}.input_scale"] = np.array([linear.input_scale], np.float32)
    return tensors


def is_stored_dense(name: str) -> bool:
    """Whether a quantized linear is written in the dense format: those of tower and projector are."""
    return not name.startswith("language_model.")


def _recover_codes(weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Codes int8 [out, in] of a dense weight, float32 code * scale. scale: [out, 1] or [out, groups].

    The product's relative error of 2**-24 cannot carry a code of at most 8 bits to its neighbour.
    """
    groups = weight.reshape(len(weight), scale.shape[1], -1)
    codes: np.ndarray = np.rint(groups / scale.astype(np.float32)[:, :, None]).astype(np.int8).reshape(weight.shape)
    return codes


def _stored_tensors(scheme: LinearScheme, dense: bool) -> dict[str, tuple[str, int]]:
    """End of the name of each tensor that a linear is stored as, see `_encode_linear` -> dtype and rank."""
    if dense:
        tensors = {"weight": ("float32", 2), "weight_scale": ("float32" if scheme.group_size is None else "float16", 2)}
    elif scheme.group_size is None:
        tensors = {"weight": ("int8", 2), "weight_scale": ("float32", 2)}
    else:
        tensors = {"weight_packed": ("int32", 2), "weight_scale": ("float16", 2), "weight_shape": ("int64", 1)}
    return tensors if scheme.activation_bits is None else {**tensors, "input_scale": ("float32", 1)}


def quantization_config(linears: Mapping[str, LinearScheme]) -> dict[str, Any]:
    """The `quantization_config` of compressed-tensors: one config group per distinct scheme and format."""
    groups: dict[str, Any] = {}
    kinds = {(scheme, is_stored_dense(name)) for name, scheme in linears.items()}
    for scheme, dense in sorted(kinds, key=lambda kind: (kind[0].name, kind[0].group_size or 0, kind[1])):
        names = [name for name in sorted(linears) if (linears[name], is_stored_dense(name)) == (scheme, dense)]
        groups[f"group_{len(groups)}"] = _make_config_group(scheme, [_make_target_pattern(name) for name in names], dense)
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": groups,
        "ignore": ["re:.*lm_head"],
        "kv_cache_scheme": None,
    }


def _make_config_group(scheme: LinearScheme, targets: list[str], dense: bool) -> dict[str, Any]:
    """The config group of compressed-tensors for one scheme; targets: patterns of the linears that have it."""
    compressed = "int-quantized" if scheme.group_size is None else "pack-quantized"
    common = {"type": "int", "symmetric": True, "dynamic": False}
    weights = {**common, "num_bits": scheme.weight_bits}
    if scheme.group_size is None:
        weights |= {"strategy": "channel"}
    else:
        weights |= {"strategy": "group", "group_size": scheme.group_size}
    inputs: dict[str, Any] | None = None
    if scheme.activation_bits is not None:
        inputs = {**common, "num_bits": scheme.activation_bits, "strategy": "tensor"}
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
        "format": "dense" if dense else compressed,
    }


def _make_target_pattern(name: str) -> str:
    """A pattern that matches the linear under every naming that transformers has used.

    A plain name does not: transformers loads `language_model.model.layers` as `model.language_model.layers`, and silently
    treats a linear whose name no target matches as not quantized.
    """
    root, _, rest = name.partition(".")
    inner = re.sub(r"^(model|vision_model)\.", "", rest)
    return rf"re:^(model\.)?{root}\.((model|vision_model)\.)?{re.escape(inner)}$"


@dataclass(frozen=True)
class _Record:
    """The content of calibration.json. files: file in the folder -> bytes, once the checkpoint is published."""

    version: int
    summary: Mapping[str, Any]
    linears: Mapping[str, LinearScheme]
    files: Mapping[str, int] = field(default_factory=dict)


_RECORD_SCHEMA = TypeAdapter(schema_of(_Record))


def _read_record(path: Path) -> _Record:
    """The record. Raises UserError when it is missing, damaged, or of another version."""
    remedy = "calibrate again"
    try:
        record = read_json(path, "a readable calibration record", remedy)
    except FileNotFoundError as error:
        raise UserError(f"{path}: is missing, so this is no complete calibrated checkpoint; {remedy}") from error
    version = record.get("version") if isinstance(record, dict) else None
    if version is not None and version != RECORD_VERSION:
        raise UserError(f"{path}: record version {version!r}, this program reads {RECORD_VERSION}; {remedy}")
    return check_schema(_RECORD_SCHEMA, record, path, "the calibration record", remedy)


def record_files(folder: Path) -> None:
    """Adds the sizes of all files to the record of a finished checkpoint, by which `is_as_recorded` knows them again."""
    path = folder / RECORD_FILE
    content = read_json(path, "a readable calibration record", "calibrate again")
    write_json(path, {**content, "files": _list_sizes(folder)})


def is_as_recorded(folder: Path) -> bool:
    """Whether a folder holds a calibrated checkpoint with the files that were recorded, in these sizes, and no other."""
    try:
        recorded = _read_record(folder / RECORD_FILE).files
    except UserError:
        return False
    return bool(recorded) and recorded == _list_sizes(folder)


def _list_sizes(folder: Path) -> dict[str, int]:
    """File or link in the folder, hidden ones too -> bytes; without the record itself, whose size the entry changes."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_symlink() or not path.is_dir())
    sizes = {path.relative_to(folder).as_posix(): path.lstat().st_size for path in paths}
    return {name: size for name, size in sizes.items() if name != RECORD_FILE}
