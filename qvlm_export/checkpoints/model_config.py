"""Converts a configuration of transformers to `ModelConfig`, the geometry that the graphs are built from.

Every value that the graphs cannot express is refused here, with the key, its value and what is supported.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from qvlm_export.calibrate.blockwise.blocks import (
    feature_layers,
    has_class_token,
    has_single_linear_projector,
    keeps_class_token,
)
from qvlm_export.calibrate.errors import UserError
from qvlm_export.checkpoints.families import Family, find_family
from qvlm_export.engines.config import ModelConfig, ProjectorConfig, TextConfig, TileConfig, VisionConfig
from qvlm_export.engines.graph.layers import ACTIVATIONS

ROPE_TYPES = ("default",)
ANYRES = "anyres_max_"  # LLaVA-OneVision writes vision_aspect_ratio as "anyres_max_9", 9 being the most tiles


def model_config(config: PreTrainedConfig, where: str) -> ModelConfig:
    """Returns the geometry that the graphs need of a llava-hf configuration. where: begins error messages.

    Raises UserError for a value that the graphs cannot express.
    """
    family = find_family({"model_type": config.model_type}, where)
    vision, text = config.vision_config, config.text_config
    _require(vision.model_type in family.towers, where, "vision_config.model_type", vision.model_type, family.towers)
    _require(text.model_type in family.decoders, where, "text_config.model_type", text.model_type, family.decoders)
    _require_sizes(config, where)
    return ModelConfig(
        vision=_vision_config(config, where),
        projector=_projector_config(config, where),
        text=_text_config(config, where),
        image_token_id=config.image_token_index,
        tiles=_tile_config(config, family, where) if family.tiled else None,
    )


def _vision_config(config: PreTrainedConfig, where: str) -> VisionConfig:
    vision, clip = config.vision_config, has_class_token(config)
    act, layer = vision.hidden_act, config.vision_feature_layer
    _require(act in ACTIVATIONS, where, "vision_config.hidden_act", act, tuple(ACTIVATIONS))
    is_layer = isinstance(layer, int) or (len(layer) > 0 and all(isinstance(one, int) for one in layer))
    _require(is_layer, where, "vision_feature_layer", layer, ("a layer, or several",))
    layers = feature_layers(config)
    reachable = all(0 < n <= vision.num_hidden_layers for n in layers)
    _require(reachable, where, "vision_feature_layer", layer, ("a layer of the tower",))
    if not clip:  # without a class token, "default" would drop the first patch
        strategy = config.vision_feature_select_strategy
        _require(strategy == "full", where, "vision_feature_select_strategy", strategy, ("full",))
    patch, size = vision.patch_size, vision.image_size
    _require(size % patch == 0 or not clip, where, "vision_config.image_size", size, (f"a multiple of patch_size {patch}",))
    return VisionConfig(
        hidden_size=vision.hidden_size,
        intermediate_size=vision.intermediate_size,
        num_layers=max(layers),
        num_heads=vision.num_attention_heads,
        image_size=size,
        patch_size=patch,
        layer_norm_eps=vision.layer_norm_eps,
        hidden_act=act,
        keep_class_token=clip and keeps_class_token(config),
        feature_layers=layers,
        class_token=clip,
        pre_norm=clip,
        patch_bias=not clip,
    )


def _projector_config(config: PreTrainedConfig, where: str) -> ProjectorConfig:
    act = config.projector_hidden_act
    _require(
        act in ACTIVATIONS or has_single_linear_projector(config), where, "projector_hidden_act", act, tuple(ACTIVATIONS)
    )
    return ProjectorConfig(
        hidden_act=act,
        bias=getattr(config, "multimodal_projector_bias", True),  # VIP-LLaVA has no such key and always a bias
        num_linears=1 if has_single_linear_projector(config) else 2,
        norm_eps=getattr(config, "projector_layernorm_eps", None),
    )


def _text_config(config: PreTrainedConfig, where: str) -> TextConfig:
    text = config.text_config
    _require(text.hidden_act == "silu", where, "text_config.hidden_act", text.hidden_act, ("silu",))
    rope = text.rope_parameters
    _require(rope["rope_type"] in ROPE_TYPES, where, "text_config.rope_type", rope["rope_type"], ROPE_TYPES)
    rotary_factor = rope.get("partial_rotary_factor", 1.0)
    _require(rotary_factor == 1.0, where, "text_config.partial_rotary_factor", rotary_factor, (1.0,))
    window, layer_types = getattr(text, "sliding_window", None), set(getattr(text, "layer_types", None) or ())
    _require(len(layer_types) < 2, where, "text_config.layer_types", sorted(layer_types), ("layers of one kind",))
    is_valid = window is None or (isinstance(window, int) and window > 0)
    _require(is_valid, where, "text_config.sliding_window", window, ("whole numbers above 0", "null"))
    is_qwen = text.model_type == "qwen2"  # its q, k and v have a bias, its output has none, and no key says so
    bias = getattr(text, "attention_bias", is_qwen)
    return TextConfig(
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
        num_layers=text.num_hidden_layers,
        num_heads=text.num_attention_heads,
        num_kv_heads=text.num_key_value_heads,
        head_dim=_head_dim(text),
        rms_norm_eps=text.rms_norm_eps,
        rope_theta=rope["rope_theta"],
        max_position_embeddings=text.max_position_embeddings,
        attention_bias=bias,
        mlp_bias=getattr(text, "mlp_bias", False),
        tie_word_embeddings=config.tie_word_embeddings,
        output_bias=bias and not is_qwen,
        sliding_window=window,
    )


def _tile_config(config: PreTrainedConfig, family: Family, where: str) -> TileConfig:
    side, points = config.vision_config.image_size, config.image_grid_pinpoints
    are_valid = bool(points) and all(
        isinstance(p, list | tuple) and len(p) == 2 and all(isinstance(n, int) and n > 0 and n % side == 0 for n in p)
        for p in points
    )
    _require(are_valid, where, "image_grid_pinpoints", points, (f"pairs of multiples of the tower's {side} pixels",))
    clip = has_class_token(config)
    strategy = config.vision_feature_select_strategy
    _require(not (clip and keeps_class_token(config)), where, "vision_feature_select_strategy", strategy, ("default",))
    ratio = getattr(config, "vision_aspect_ratio", None)
    limit = None if ratio is None else str(ratio).removeprefix(ANYRES)
    _require(limit is None or (limit.isdecimal() and int(limit) > 0), where, "vision_aspect_ratio", ratio, (f"{ANYRES}N",))
    return TileConfig(
        pinpoints=tuple((height, width) for height, width in points),
        max_tiles=None if limit is None else int(limit),
        single_when_many=family.single_when_many,
    )


def _require_sizes(config: PreTrainedConfig, where: str) -> None:
    """Raises UserError for counts that are not whole and positive, and for token ids beyond the embedding table.

    transformers has already checked that heads divide widths and that head_dim is even.
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
    heads, kv_heads = text.num_attention_heads, text.num_key_value_heads
    _require(heads % kv_heads == 0, where, "text_config.num_key_value_heads", kv_heads, (f"divisors of {heads} heads",))
    _require(_head_dim(text) > 0, where, "text_config.head_dim", _head_dim(text), ("whole numbers above 0",))
    supported = (f"token ids below vocab_size {text.vocab_size}",)
    token, pad = config.image_token_index, text.pad_token_id
    _require(0 <= token < text.vocab_size, where, "image_token_index", token, supported)
    _require(pad is None or abs(pad) < text.vocab_size, where, "text_config.pad_token_id", pad, supported)


def _head_dim(text: PreTrainedConfig) -> int:
    head_dim = getattr(text, "head_dim", None)
    return int(text.hidden_size // text.num_attention_heads if head_dim is None else head_dim)


def _require(condition: bool, where: str, key: str, got: Any, allowed: tuple[Any, ...]) -> None:
    if not condition:
        raise UserError(f"{where}: {key} is {got!r}; this family supports {', '.join(str(a) for a in allowed)}")
