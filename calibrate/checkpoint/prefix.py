"""Prefix cache: keys and values of the tokens that every prompt of a chat template begins with, computed by the float model.

These tokens hold most massive activations (Sun et al. 2024, arXiv 2402.17762): the first token of a sequence reaches
magnitudes thousands of times those of all others. An engine that starts behind them never quantizes these activations, and
computes fewer tokens for every prompt. The idea of shipping their keys and values is that of CushionCache (Son et al. 2024,
arXiv 2406.12016) and PrefixQuant (Chen et al. 2024, arXiv 2410.05265); here the tokens are the template's own, so that the
float model does not change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy)
import numpy as np
from safetensors import SafetensorError, safe_open

from qvlm_export.calibrate.checkpoint.files import write_tensors
from qvlm_export.calibrate.checkpoint.regular_file import check_regular_file
from qvlm_export.calibrate.checkpoint.samples import Sample
from qvlm_export.calibrate.errors import UserError


@dataclass(frozen=True)
class PrefixCache:
    """Keys and values of the first tokens of every prompt.

    token_ids: the p tokens. keys, values: of each decoder layer, float32 [kv_heads, p, head_dim]; keys are rotated, as they
    stand in a key/value cache.
    """

    token_ids: tuple[int, ...]
    keys: tuple[np.ndarray, ...]
    values: tuple[np.ndarray, ...]

    def __len__(self) -> int:
        return len(self.token_ids)

    def first(self, count: int) -> PrefixCache:
        """The prefix of the first `count` tokens alone, which do not depend on those behind them."""
        keys, values = (tuple(array[:, :count] for array in part) for part in (self.keys, self.values))
        return PrefixCache(self.token_ids[:count], keys, values)

    def arrays(self) -> list[np.ndarray]:
        """Key and value of every layer, in the order of a key/value cache."""
        return [array for pair in zip(self.keys, self.values, strict=True) for array in pair]


def cut_prefix(samples: Sequence[Sample], token_ids: Sequence[int]) -> list[Sample]:
    """The samples without their first tokens, which are those of the prefix.

    Raises UserError naming the sample that begins with other tokens, or that has no token left.
    """
    cut, length = [], len(token_ids)
    for number, sample in enumerate(samples, start=1):
        if len(sample.input_ids) <= length or not np.array_equal(sample.input_ids[:length], token_ids):
            raise UserError(
                f"sample {number} does not begin with the {length} tokens of the prefix; make it with the model's chat "
                "template, or set --prefix 0"
            )
        cut.append(replace(sample, input_ids=sample.input_ids[length:], answer_start=sample.answer_start - length))
    return cut


def write_prefix(path: Path, prefix: PrefixCache, float_type: str) -> None:
    """Writes the prefix: `token_ids` int64 [p] and, for layer i, `key_values.i.key` and `.value` in `float_type`."""
    tensors = {"token_ids": np.array(prefix.token_ids, np.int64)}
    for layer, (keys, values) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
        for part, array in (("key", keys), ("value", values)):
            tensors[f"key_values.{layer}.{part}"] = array.astype(np.dtype(float_type))
    write_tensors(path, tensors, {"format": "pt"})


def read_prefix(path: Path, shape: tuple[int, int, int]) -> PrefixCache:
    """The prefix that `write_prefix` wrote.

    shape: (layers, kv_heads, head_dim) of the model. Raises UserError when the file is missing or damaged, or belongs to
    another model.
    """
    layers, heads, width = shape
    names = [f"key_values.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
    check_regular_file(path, "a prefix cache")
    try:
        with safe_open(path, "np") as file:
            missing = {"token_ids", *names} - set(file.keys())
            if missing:
                raise UserError(f"{path}: lacks {min(missing)}, so it belongs to another model; export again")
            token_ids = tuple(int(token) for token in file.get_tensor("token_ids").reshape(-1))
            arrays = [file.get_tensor(name).astype(np.float32) for name in names]
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: cannot be read as a prefix cache ({error}); export again") from error
    for name, array in zip(names, arrays, strict=True):
        if array.shape != (heads, len(token_ids), width) or not np.isfinite(array).all():
            raise UserError(
                f"{path}: {name} has shape {list(array.shape)} or values that are not finite, the model needs "
                f"{[heads, len(token_ids), width]}; export again"
            )
    return PrefixCache(token_ids, tuple(arrays[::2]), tuple(arrays[1::2]))


def count_shared(token_ids: Sequence[int] | np.ndarray, prompt: Sequence[int] | np.ndarray) -> int:
    """How many tokens of the prefix a prompt begins with; one token of the prompt is always left to compute."""
    most = min(len(token_ids), len(prompt) - 1)
    return next((n for n in range(most) if token_ids[n] != prompt[n]), max(most, 0))


def put_first(cache: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Writes `first` [kv_heads, p, head_dim] into the first slots of a cache [B, kv_heads, slots, head_dim]; returns it."""
    cache[:, :, : first.shape[1]] = first
    return cache
