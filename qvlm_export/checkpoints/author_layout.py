"""Checkpoints in the layout of LLaVA's authors (liuhaotian/…), seen as llava-hf would have converted them.

They differ in four things: config.json is a Llama's with `mm_*` keys; the CLIP tower is a checkpoint of its own, named by
`mm_vision_tower`, unless it was trained too; the vocabulary has no token for images; and there is no processor. So tables
get rows for an image token (the mean of the others, as transformers does it), and the processor is made of the tower's
image processor, the tokenizer and the conversation that the model was trained with.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qvlm_export.calibrate.checkpoint.tensor_source import TensorSource
from qvlm_export.calibrate.errors import UserError
from qvlm_export.checkpoints.hub import find_folder, read_config
from qvlm_export.checkpoints.weights import open_weights

MARKS = ("mm_vision_tower", "mm_hidden_size", "mm_projector_type", "mm_vision_select_layer")
DECODERS = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral"}  # model_type -> the decoder's
PROJECTORS = {"linear": "linear", "mlp2x_gelu": "gelu"}  # mm_projector_type -> what is between its two linears
STRATEGIES = {"patch": "default", "cls_patch": "full"}
ANYRES = "anyres"
ASPECTS = ("square", "pad", ANYRES)
TEXT_KEYS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_act",
    "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling", "sliding_window", "attention_bias",
    "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings",
)  # fmt: skip
# The towers that LLaVA was trained with, so that neither geometry nor preprocessing needs a download.
CLIP_LARGE = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "patch_size": 14, "projection_dim": 768, "hidden_act": "quick_gelu",
}  # fmt: skip
TOWERS = {"openai/clip-vit-large-patch14": 224, "openai/clip-vit-large-patch14-336": 336}
TABLES = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")
SECOND = "multi_modal_projector.linear_2"
ROW_STEP = 64  # tables are grown to a multiple of it, as llava-hf's are


def convert_config(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The configuration that transformers has for this model. Raises UserError naming the key that cannot be used."""
    where = folder / "config.json"
    model_type = _chosen(config, "model_type", None, tuple(DECODERS), where)
    feature = _chosen(config, "mm_vision_select_feature", "patch", tuple(STRATEGIES), where)
    tiled = _chosen(config, "image_aspect_ratio", "square", ASPECTS, where) == ANYRES
    if tiled:
        _chosen(config, "mm_patch_merge_type", None, ("spatial_unpad",), where)
    vocabulary = config.get("vocab_size")
    whole = isinstance(vocabulary, int) and vocabulary > 0
    _require(whole, where, "vocab_size", vocabulary, ("whole numbers above 0",))
    text = {key: config[key] for key in TEXT_KEYS if config.get(key) is not None}
    text |= {"model_type": DECODERS[model_type], "vocab_size": pad_rows(int(vocabulary or 0))}
    converted = {
        "model_type": "llava_next" if tiled else "llava",
        "architectures": ["LlavaNextForConditionalGeneration" if tiled else "LlavaForConditionalGeneration"],
        "text_config": text,
        "vision_config": tower_config(tower_name(config, folder), folder),
        "projector_hidden_act": PROJECTORS[projector_type(config, where)],
        "vision_feature_layer": config.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": STRATEGIES[feature],
        "image_token_index": vocabulary,
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
        "dtype": config.get("torch_dtype") or "float16",
    }
    return converted | ({"image_grid_pinpoints": config.get("image_grid_pinpoints")} if tiled else {})


def projector_type(config: Mapping[str, Any], where: Path) -> str:
    """`mm_projector_type`, which LLaVA before 1.5 does not write. Raises UserError for one that is not supported."""
    return _chosen(config, "mm_projector_type", "linear", tuple(PROJECTORS), where)


def tower_name(config: Mapping[str, Any], folder: Path) -> str:
    """`mm_vision_tower`. Raises UserError where there is none."""
    name = config.get("mm_vision_tower") or config.get("vision_tower")
    if not isinstance(name, str) or not name:
        raise UserError(
            f"{folder / 'config.json'}: names no mm_vision_tower, so the CLIP tower is unknown; add the one that the model "
            f"was trained with, such as {next(reversed(TOWERS))}"
        )
    return name


def tower_folder(name: str, folder: Path) -> Path:
    """The folder of a tower: beside or inside the checkpoint's, as the path stands, or from Hugging Face."""
    near = (folder / name, folder / Path(name).name, folder.parent / Path(name).name)
    found = next((path for path in near if (path / "config.json").exists()), None)
    return found or find_folder(name, f"{folder / 'config.json'}: mm_vision_tower")


def tower_config(name: str, folder: Path) -> dict[str, Any]:
    """The vision_config of a tower. Raises UserError when it is no CLIP."""
    if name in TOWERS:
        return {**CLIP_LARGE, "image_size": TOWERS[name]}
    place = tower_folder(name, folder)
    content = read_config(place, what="a CLIP tower")
    if content.get("model_type") == "clip":
        inner = content.get("vision_config")
        content = inner if isinstance(inner, dict) else {}
    elif content.get("model_type") != "clip_vision_model":
        raise UserError(
            f"{place / 'config.json'}: the tower that mm_vision_tower names is a {content.get('model_type')!r}; this layout "
            "is supported with CLIP, others are in the llava-hf repositories"
        )
    return {**content, "model_type": "clip_vision_model"}


def pad_rows(vocabulary: int) -> int:
    """Rows of the tables, with at least one more for the image token."""
    return (vocabulary // ROW_STEP + 1) * ROW_STEP


def open_source(own: TensorSource, config: Mapping[str, Any], folder: Path) -> TensorSource:
    """All tensors of the converted checkpoint. own: those of the folder; the tower's are read where they are not there."""
    tower: TensorSource | None = None
    if not any(name.startswith("vision_tower.") for name in own):
        tower = open_weights(tower_folder(tower_name(config, folder), folder), _tower_rename)
    vocabulary = int(config["vocab_size"])
    for name in TABLES:
        if name in own and own.shape(name)[0] != vocabulary:
            raise UserError(
                f"{folder}: {name} has {own.shape(name)[0]} rows, but config.json says vocab_size {vocabulary}; "
                "weights and config do not belong together"
            )
    where = folder / "config.json"
    once = projector_type(config, where) == "linear"
    if once and f"{SECOND}.weight" in own:
        raise UserError(f"{where}: mm_projector_type is linear, but the weights have a second; write mlp2x_gelu")
    return OriginalSource(own, tower, pad_rows(vocabulary), once)


def _tower_rename(name: str) -> str | None:
    """Names of a whole CLIP, or of its vision model alone, with or without `vision_model.`."""
    inner = name.removeprefix("vision_model.")
    wanted = inner.startswith(("embeddings.", "pre_layrnorm.", "encoder.", "post_layernorm."))
    return f"vision_tower.vision_model.{inner}" if wanted and not name.endswith("position_ids") else None


class OriginalSource:
    """A TensorSource over language model, tower, and what the conversion adds.

    rows: of the embedding table and the head, whose new rows are the mean of the others, so that they are as probable as a
    mean token. A projector of one linear (`once`) gets an identity for a second, which transformers needs and the graph
    leaves out.
    """

    def __init__(self, own: TensorSource, tower: TensorSource | None, rows: int, once: bool) -> None:
        self._own, self._tower, self._rows = own, tower, rows
        first = f"{SECOND[:-1]}1.weight"
        self._identity = own.shape(first)[0] if once and first in own else None

    def _source(self, name: str) -> TensorSource:
        return self._tower if self._tower is not None and name in self._tower else self._own

    def _added(self) -> tuple[str, ...]:
        return () if self._identity is None else (f"{SECOND}.weight", f"{SECOND}.bias")

    def __contains__(self, name: object) -> bool:
        return name in self._own or name in self._added() or (self._tower is not None and name in self._tower)

    def __iter__(self) -> Iterator[str]:
        yield from self._own
        yield from self._added()
        if self._tower is not None:
            yield from self._tower

    def files(self) -> Sequence[Path]:
        return [*self._own.files(), *(self._tower.files() if self._tower is not None else ())]

    def shape(self, name: str) -> tuple[int, ...]:
        if self._identity is not None and name in self._added():
            return (self._identity,) * (2 if name.endswith("weight") else 1)
        shape = self._source(name).shape(name)
        return (self._rows, *shape[1:]) if name in TABLES else shape

    def dtype(self, name: str) -> np.dtype:
        return self._own.dtype(TABLES[0]) if name in self._added() else self._source(name).dtype(name)

    def load(self, name: str) -> np.ndarray:
        if self._identity is not None and name in self._added():
            dtype = self.dtype(name)
            return np.eye(self._identity, dtype=dtype) if name.endswith("weight") else np.zeros(self._identity, dtype)
        array = self._source(name).load(name)
        if name not in TABLES:
            return array
        mean = array.mean(axis=0, dtype=np.float32).astype(array.dtype)
        return np.concatenate([array, np.broadcast_to(mean, (self._rows - len(array), len(mean)))])


def _chosen(config: Mapping[str, Any], key: str, default: str | None, allowed: tuple[str, ...], where: Path) -> str:
    """The value of a key, or the default where it is missing or null. Raises UserError when it is none of those allowed."""
    value = config.get(key)
    value = default if value is None else value
    _require(isinstance(value, str) and value in allowed, where, key, value, allowed)
    return str(value)


def _require(holds: bool, where: Path, key: str, got: object, allowed: tuple[object, ...]) -> None:
    if not holds:
        supported = ", ".join(map(str, allowed))
        raise UserError(f"{where}: {key} is {json.dumps(got)}; checkpoints in this layout are supported with {supported}")
