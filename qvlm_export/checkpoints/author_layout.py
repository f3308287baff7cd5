"""Converts checkpoints in the layout of LLaVA's authors (liuhaotian/…) to the llava-hf layout, while they are read.

The authors' layout differs from llava-hf's in four ways: config.json is a Llama config with `mm_*` keys; the CLIP tower is a
checkpoint of its own, named by `mm_vision_tower`, unless it was trained too; the vocabulary has no image token; and there is
no processor. This module converts config.json and gives a TensorSource with the tensors of both checkpoints, in which the
embedding table and the head have rows for an image token (the mean of the other rows, as in transformers).
`author_processor.py` builds the processor.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig

from qvlm_export.calibrate.blockwise.blocks import SINGLE_LINEAR
from qvlm_export.calibrate.checkpoint.tensor_source import TensorSource
from qvlm_export.calibrate.errors import UserError
from qvlm_export.checkpoints.files.headers import Download, find_downloads
from qvlm_export.checkpoints.files.hub import find_checkpoint, read_config
from qvlm_export.checkpoints.files.weights import Location, open_weights

CONFIG_KEYS = ("mm_vision_tower", "mm_hidden_size", "mm_projector_type", "mm_vision_select_layer")
# model_type -> configuration class of the decoder
DECODERS = {"llava": LlamaConfig, "llava_llama": LlamaConfig, "llava_mistral": MistralConfig}
PROJECTOR_ACTIVATIONS = {"linear": "linear", "mlp2x_gelu": "gelu"}  # mm_projector_type -> projector_hidden_act
SELECT_STRATEGIES = {"patch": "default", "cls_patch": "full"}  # mm_vision_select_feature -> select strategy
ANYRES = "anyres"
ASPECT_RATIOS = ("square", "pad", ANYRES)
ROPE_KEYS = ("rope_theta", "rope_scaling")  # as releases before transformers 5 wrote rope_parameters
# The towers that LLaVA was trained with, so that neither their geometry nor their preprocessing needs a download.
CLIP_LARGE = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "patch_size": 14, "projection_dim": 768, "hidden_act": "quick_gelu",
}  # fmt: skip
TOWERS = {"openai/clip-vit-large-patch14": 224, "openai/clip-vit-large-patch14-336": 336}  # id -> image size in pixels
VOCABULARY_TABLES = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")
FIRST_LINEAR, SECOND_LINEAR = "multi_modal_projector.linear_1", "multi_modal_projector.linear_2"
ROW_MULTIPLE = 64  # llava-hf pads the tables to a multiple of 64 rows


def convert_config(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Returns the llava-hf config.json that corresponds to `config`, the authors' config.json in `folder`.

    Raises UserError naming the first key whose value is not supported.
    """
    where = folder / "config.json"
    model_type = _read_choice(config, "model_type", None, tuple(DECODERS), where)
    feature = _read_choice(config, "mm_vision_select_feature", "patch", tuple(SELECT_STRATEGIES), where)
    tiled = _read_choice(config, "image_aspect_ratio", "square", ASPECT_RATIOS, where) == ANYRES
    if tiled:
        _read_choice(config, "mm_patch_merge_type", None, ("spatial_unpad",), where)
    vocabulary = config.get("vocab_size")
    is_count = isinstance(vocabulary, int) and vocabulary > 0
    _require(is_count, where, "vocab_size", vocabulary, ("whole numbers above 0",))
    decoder = DECODERS[model_type]
    keys = {f.name for f in dataclasses.fields(decoder)} - {f.name for f in dataclasses.fields(PreTrainedConfig)}
    keys |= set(ROPE_KEYS)
    text = {key: config[key] for key in sorted(keys) if config.get(key) is not None}
    if "sliding_window" in config and "sliding_window" in keys:  # null means none, while no key means the class's default
        text["sliding_window"] = config["sliding_window"]
    text |= {"model_type": decoder.model_type, "vocab_size": pad_rows(int(vocabulary or 0))}
    converted = {
        "model_type": "llava_next" if tiled else "llava",
        "architectures": ["LlavaNextForConditionalGeneration" if tiled else "LlavaForConditionalGeneration"],
        "text_config": text,
        "vision_config": read_tower_config(read_tower_name(config, folder), folder),
        "projector_hidden_act": PROJECTOR_ACTIVATIONS[read_projector_type(config, where)],
        "vision_feature_layer": config.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": SELECT_STRATEGIES[feature],
        "image_token_index": vocabulary,
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
        "dtype": config.get("torch_dtype") or "float16",
    }
    if converted["projector_hidden_act"] == "linear":
        converted[SINGLE_LINEAR] = True
    return converted | ({"image_grid_pinpoints": config.get("image_grid_pinpoints")} if tiled else {})


def read_projector_type(config: Mapping[str, Any], where: Path) -> str:
    """Returns `mm_projector_type`, or "linear" where it is missing, as LLaVA before 1.5 does not write it.

    where: the path of config.json, for errors. Raises UserError for a type that is not supported.
    """
    return _read_choice(config, "mm_projector_type", "linear", tuple(PROJECTOR_ACTIVATIONS), where)


def read_tower_name(config: Mapping[str, Any], folder: Path) -> str:
    """Returns `mm_vision_tower`, a path or Hugging Face id. Raises UserError when config.json has none."""
    name = config.get("mm_vision_tower") or config.get("vision_tower")
    if not isinstance(name, str) or not name:
        raise UserError(
            f"{folder / 'config.json'}: names no mm_vision_tower, so the CLIP tower is unknown; add the one that the model "
            f"was trained with, such as {next(reversed(TOWERS))}"
        )
    return name


def known_tower(name: str) -> str | None:
    """Returns the key in TOWERS of the tower `name`: its id, or a path that ends like it; None for any other tower.

    Whoever trains with a local copy of the tower leaves its path in config.json.
    """
    return next((tower for tower in TOWERS if Path(name).name == Path(tower).name), None)


def find_tower(name: str, folder: Path) -> Location:
    """Returns where the tower `name` is: inside or beside the checkpoint's `folder`, else by path or from Hugging Face.

    Raises UserError when it is in none of these places.
    """
    nearby = (folder / name, folder / Path(name).name, folder.parent / Path(name).name)
    local = next((path for path in nearby if (path / "config.json").exists()), None)
    option = f"{folder / 'config.json'}: mm_vision_tower"
    return find_checkpoint(known_tower(name) or name, option=option) if local is None else Location(local)


def read_tower_config(name: str, folder: Path) -> dict[str, Any]:
    """Returns the vision_config of the tower `name`. Raises UserError when the tower is not a CLIP."""
    if (known := known_tower(name)) is not None:
        return {**CLIP_LARGE, "image_size": TOWERS[known]}
    path = find_tower(name, folder).folder
    content = read_config(path, what="a CLIP tower")
    if content.get("model_type") == "clip":
        inner = content.get("vision_config")
        content = inner if isinstance(inner, dict) else {}
    elif content.get("model_type") != "clip_vision_model":
        raise UserError(
            f"{path / 'config.json'}: the tower that mm_vision_tower names is a {content.get('model_type')!r}; this layout "
            "is supported with CLIP, others are in the llava-hf repositories"
        )
    return {**content, "model_type": "clip_vision_model"}


def pad_rows(vocabulary: int) -> int:
    """Returns the number of rows of the padded tables: more than `vocabulary`, so that the image token has one."""
    return (vocabulary // ROW_MULTIPLE + 1) * ROW_MULTIPLE


def open_source(own: TensorSource, config: Mapping[str, Any], folder: Path) -> TensorSource:
    """Returns all tensors of the converted checkpoint under canonical names.

    own: the tensors in `folder`. The tower is read from its own checkpoint unless `own` has tensors of it. Raises UserError
    when the tower is not found, or when the weights contradict `config`.
    """
    tower: TensorSource | None = None
    if not any(name.startswith("vision_tower.") for name in own):
        tower = open_weights(find_tower(read_tower_name(config, folder), folder), _rename_tower_tensor)
    vocabulary = int(config["vocab_size"])
    for name in VOCABULARY_TABLES:
        if name in own and own.shape(name)[0] != vocabulary:
            raise UserError(
                f"{folder}: {name} has {own.shape(name)[0]} rows, but config.json says vocab_size {vocabulary}; "
                "weights and config do not belong together"
            )
    where = folder / "config.json"
    single_linear = read_projector_type(config, where) == "linear"
    if single_linear and f"{SECOND_LINEAR}.weight" in own:
        raise UserError(f"{where}: mm_projector_type is linear, but the weights have a second; write mlp2x_gelu")
    return ConvertedSource(own, tower, pad_rows(vocabulary), single_linear)


def _rename_tower_tensor(name: str) -> str | None:
    """Returns the canonical name of a tensor of a whole CLIP or of its vision model alone; None for one that is not used."""
    inner = name.removeprefix("vision_model.")
    is_vision = inner.startswith(("embeddings.", "pre_layrnorm.", "encoder.", "post_layernorm."))
    return f"vision_tower.vision_model.{inner}" if is_vision and not name.endswith("position_ids") else None


class ConvertedSource:
    """A TensorSource over the language model, the tower, and the tensors that the conversion adds.

    num_rows: rows that the embedding table and the head are padded to. The new rows are the mean of the others, so that they
    are as probable as a mean token. single_linear: the projector has one linear only; an identity is added as its second,
    which transformers needs and the graph leaves out.
    """

    def __init__(self, own: TensorSource, tower: TensorSource | None, num_rows: int, single_linear: bool) -> None:
        self._own, self._tower, self._num_rows = own, tower, num_rows
        first = f"{FIRST_LINEAR}.weight"
        # The side of the added identity, None where none is added.
        self._identity = own.shape(first)[0] if single_linear and first in own else None

    def _find_source(self, name: str) -> TensorSource:
        return self._tower if self._tower is not None and name in self._tower else self._own

    def _added_names(self) -> tuple[str, ...]:
        return () if self._identity is None else (f"{SECOND_LINEAR}.weight", f"{SECOND_LINEAR}.bias")

    def __contains__(self, name: object) -> bool:
        return name in self._own or name in self._added_names() or (self._tower is not None and name in self._tower)

    def __iter__(self) -> Iterator[str]:
        yield from self._own
        yield from self._added_names()
        if self._tower is not None:
            yield from self._tower

    def files(self) -> Sequence[Path]:
        """Returns the weight files of both checkpoints."""
        return [*self._own.files(), *(self._tower.files() if self._tower is not None else ())]

    def downloads(self) -> tuple[Download, ...]:
        """Returns the weight files of both checkpoints that must be downloaded before `load`."""
        return (*find_downloads(self._own), *(() if self._tower is None else find_downloads(self._tower)))

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor after the conversion."""
        if self._identity is not None and name in self._added_names():
            return (self._identity,) * (2 if name.endswith("weight") else 1)
        shape = self._find_source(name).shape(name)
        return (self._num_rows, *shape[1:]) if name in VOCABULARY_TABLES else shape

    def dtype(self, name: str) -> np.dtype:
        """Returns the dtype of a tensor; the added ones have that of the embedding table."""
        return self._own.dtype(VOCABULARY_TABLES[0]) if name in self._added_names() else self._find_source(name).dtype(name)

    def load(self, name: str) -> np.ndarray:
        """Reads a tensor, and pads it with mean rows where it is the embedding table or the head."""
        if self._identity is not None and name in self._added_names():
            dtype = self.dtype(name)
            return np.eye(self._identity, dtype=dtype) if name.endswith("weight") else np.zeros(self._identity, dtype)
        array = self._find_source(name).load(name)
        if name not in VOCABULARY_TABLES:
            return array
        mean = array.mean(axis=0, dtype=np.float32).astype(array.dtype)
        return np.concatenate([array, np.broadcast_to(mean, (self._num_rows - len(array), len(mean)))])


def _read_choice(config: Mapping[str, Any], key: str, default: str | None, allowed: tuple[str, ...], where: Path) -> str:
    """Returns config[key], or `default` where it is missing or null. Raises UserError when it is not in `allowed`."""
    value = config.get(key)
    value = default if value is None else value
    _require(isinstance(value, str) and value in allowed, where, key, value, allowed)
    return str(value)


def _require(condition: bool, where: Path, key: str, got: object, allowed: tuple[object, ...]) -> None:
    if not condition:
        supported = ", ".join(map(str, allowed))
        raise UserError(f"{where}: {key} is {json.dumps(got)}; checkpoints in this layout are supported with {supported}")
