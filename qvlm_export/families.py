"""The model families: one row each, no branches elsewhere.

A row says which `model_type` it answers to, which towers and decoders it may hold, and how stored tensor names become
the canonical ones (those of the llava-hf 1.5 repositories, which the graphs are declared with).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from transformers import LlavaConfig

from calibrate.blocks import feature_layers
from calibrate.errors import UserError
from engines.config import ModelConfig, ProjectorConfig, TextConfig, VisionConfig
from engines.graph_layers import ACTIVATIONS


@dataclass(frozen=True)
class Family:
    """model_type as in config.json; towers and decoders: the model_types allowed inside; renames: pattern, replacement."""

    model_type: str
    towers: tuple[str, ...]
    decoders: tuple[str, ...]
    renames: tuple[tuple[str, str], ...]


FAMILIES = (
    Family(
        model_type="llava",
        towers=("clip_vision_model",),
        decoders=("llama",),
        renames=(
            (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
            (r"^model\.language_model\.(?!model\.)", "language_model.model."),
            (r"^lm_head\.", "language_model.lm_head."),
            (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
        ),
    ),
)

# Aliases of --model: Hugging Face repositories, or the model shipped with the package.
ALIASES = {"llava-7b": "llava-hf/llava-1.5-7b-hf", "llava-13b": "llava-hf/llava-1.5-13b-hf"}
TINY = "tiny"


def find_family(model_type: object, where: str) -> Family:
    """The row of a config.json's model_type. Raises UserError naming what was found and what is supported."""
    for family in FAMILIES:
        if family.model_type == model_type:
            return family
    supported = ", ".join(family.model_type for family in FAMILIES)
    raise UserError(f"{where}: model_type is {model_type!r}, which is no supported LLaVA; supported: {supported}")


def renamer(family: Family) -> Callable[[str], str | None]:
    """Stored tensor name -> canonical name; None for buffers that old checkpoints carry and nobody reads."""
    patterns = [(re.compile(pattern), to) for pattern, to in family.renames]

    def rename(name: str) -> str | None:
        if name.endswith(("rotary_emb.inv_freq", "embeddings.position_ids")):
            return None
        for pattern, to in patterns:
            name = pattern.sub(to, name)
        return name

    return rename


def model_config(config: LlavaConfig, where: str) -> ModelConfig:
    """The numbers that the graphs need. Raises UserError for a value the graphs cannot express."""
    family = find_family(config.model_type, where)
    vision, text = config.vision_config, config.text_config
    _require(vision.model_type in family.towers, where, "vision_config.model_type", vision.model_type, family.towers)
    _require(text.model_type in family.decoders, where, "text_config.model_type", text.model_type, family.decoders)
    _require_sizes(config, where)
    for key, act in (
        ("vision_config.hidden_act", vision.hidden_act),
        ("projector_hidden_act", config.projector_hidden_act),
    ):
        _require(act in ACTIVATIONS, where, key, act, tuple(ACTIVATIONS))
    _require(text.hidden_act == "silu", where, "text_config.hidden_act", text.hidden_act, ("silu",))
    rope = text.rope_parameters
    _require(rope["rope_type"] == "default", where, "text_config.rope_type", rope["rope_type"], ("default",))
    turned = rope.get("partial_rotary_factor", 1.0)
    _require(turned == 1.0, where, "text_config.partial_rotary_factor", turned, (1.0,))
    layer = config.vision_feature_layer
    _require(isinstance(layer, int), where, "vision_feature_layer", layer, ("a single layer",))
    layers = feature_layers(config)
    _require(0 < layers <= vision.num_hidden_layers, where, "vision_feature_layer", layer, ("a layer of the tower",))
    patch, size = vision.patch_size, vision.image_size
    _require(size % patch == 0, where, "vision_config.image_size", size, (f"a multiple of patch_size {patch}",))
    return ModelConfig(
        vision=VisionConfig(
            hidden_size=vision.hidden_size,
            intermediate_size=vision.intermediate_size,
            num_layers=layers,
            num_heads=vision.num_attention_heads,
            image_size=size,
            patch_size=patch,
            layer_norm_eps=vision.layer_norm_eps,
            hidden_act=vision.hidden_act,
            keep_class_token=config.vision_feature_select_strategy == "full",
        ),
        projector=ProjectorConfig(config.projector_hidden_act, config.multimodal_projector_bias),
        text=TextConfig(
            vocab_size=text.vocab_size,
            hidden_size=text.hidden_size,
            intermediate_size=text.intermediate_size,
            num_layers=text.num_hidden_layers,
            num_heads=text.num_attention_heads,
            num_kv_heads=text.num_key_value_heads,
            head_dim=text.head_dim or text.hidden_size // text.num_attention_heads,
            rms_norm_eps=text.rms_norm_eps,
            rope_theta=rope["rope_theta"],
            max_position_embeddings=text.max_position_embeddings,
            attention_bias=text.attention_bias,
            mlp_bias=text.mlp_bias,
            tie_word_embeddings=config.tie_word_embeddings,
        ),
        image_token_id=config.image_token_index,
    )


def _require_sizes(config: LlavaConfig, where: str) -> None:
    """Counts must be whole and positive, and token ids must be rows of the embedding table.

    That heads divide widths and that head_dim is even was checked by transformers.
    """
    vision, text = config.vision_config, config.text_config
    common = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    for name, part, keys in (
        ("vision_config", vision, (*common, "image_size", "patch_size")),
        ("text_config", text, (*common, "num_key_value_heads", "vocab_size", "max_position_embeddings")),
    ):
        for key in keys:
            value = getattr(part, key)
            _require(isinstance(value, int) and value > 0, where, f"{name}.{key}", value, ("whole numbers above 0",))
    _require(vision.num_channels == 3, where, "vision_config.num_channels", vision.num_channels, (3,))
    heads, groups = text.num_attention_heads, text.num_key_value_heads
    _require(heads % groups == 0, where, "text_config.num_key_value_heads", groups, (f"divisors of {heads} heads",))
    head_dim = text.hidden_size // heads if text.head_dim is None else text.head_dim
    _require(head_dim > 0, where, "text_config.head_dim", head_dim, ("whole numbers above 0",))
    rows = (f"token ids below vocab_size {text.vocab_size}",)
    _require(0 <= config.image_token_index < text.vocab_size, where, "image_token_index", config.image_token_index, rows)
    pad = text.pad_token_id
    _require(pad is None or abs(pad) < text.vocab_size, where, "text_config.pad_token_id", pad, rows)


def _require(holds: bool, where: str, key: str, got: object, allowed: tuple[object, ...]) -> None:
    if not holds:
        raise UserError(f"{where}: {key} is {got!r}; this family supports {', '.join(str(a) for a in allowed)}")
