"""Converts a configuration of transformers to `ModelConfig`, the geometry that the graphs are built from.

What the model computes is read from the modules that transformers builds, not from keys of config.json, which may hold some
that transformers ignores. What the graphs cannot express is refused here, with the key, its value and what is supported.
"""

from __future__ import annotations

from typing import Any, TypeGuard

from transformers import PreTrainedConfig

from qvlm_export.calibrate.blockwise.blocks import (
    feature_layers,
    has_class_token,
    has_single_linear_projector,
    keeps_class_token,
    split_model,
)
from qvlm_export.calibrate.blockwise.float_model import attention_window, declared, make_float_model
from qvlm_export.calibrate.errors import UserError
from qvlm_export.checkpoints.families import Family, find_family
from qvlm_export.checkpoints.geometry import activation_name, head_dim, norm_epsilon, require_same_tensors, rope
from qvlm_export.engines.config import ModelConfig, ProjectorConfig, TextConfig, TileConfig, VisionConfig

ANYRES = "anyres_max_"  # LLaVA-OneVision writes vision_aspect_ratio as "anyres_max_9", 9 being the most tiles
MAX_LAYERS, MAX_SIZE = 1000, 2**24  # of any count; far above all models, and what a damaged file exceeds


def model_config(config: PreTrainedConfig, where: str) -> ModelConfig:
    """Returns the geometry that the graphs need of a llava-hf configuration. where: begins error messages.

    Raises UserError for a value that the graphs cannot express.
    """
    family = find_family({"model_type": config.model_type}, where)
    vision, text = config.vision_config, config.text_config
    _require(vision.model_type in family.towers, where, "vision_config.model_type", vision.model_type, family.towers)
    _require(text.model_type in family.decoders, where, "text_config.model_type", text.model_type, family.decoders)
    _require_sizes(config, where)
    _require_feature_layers(config, where)
    window = attention_window(text, where)
    model = make_float_model(config, where)
    blocks = split_model(model, config, window)
    result = ModelConfig(
        vision=_vision_config(config, model.model.vision_tower, where),
        projector=_projector_config(config, model.model.multi_modal_projector, where),
        text=_text_config(config, model, blocks.rotary, window, where),
        image_token_id=config.image_token_index,
        tiles=_tile_config(config, family, where) if family.tiled else None,
    )
    require_same_tensors(blocks, result, where)
    return result


def _require_feature_layers(config: PreTrainedConfig, where: str) -> None:
    """Raises UserError when vision_feature_layer names no layers of the tower, or the select strategy drops a patch."""
    vision, layer = config.vision_config, config.vision_feature_layer
    is_layer = _is_whole(layer) or (isinstance(layer, list | tuple) and len(layer) > 0 and all(map(_is_whole, layer)))
    _require(is_layer, where, "vision_feature_layer", layer, ("a layer, or several",))
    reachable = all(0 < n <= vision.num_hidden_layers for n in feature_layers(config))
    _require(reachable, where, "vision_feature_layer", layer, ("a layer of the tower",))
    causal = getattr(vision, "is_causal", False)
    _require(causal is False, where, "vision_config.is_causal", causal, ("towers whose patches see each other",))
    strategy = declared(config, "vision_feature_select_strategy", "default")
    _require(strategy in ("default", "full"), where, "vision_feature_select_strategy", strategy, ("default", "full"))
    if not has_class_token(config):  # without a class token, "default" would drop the first patch
        _require(strategy == "full", where, "vision_feature_select_strategy", strategy, ("full",))


def _vision_config(config: PreTrainedConfig, tower: Any, where: str) -> VisionConfig:
    vision, clip, layers = config.vision_config, has_class_token(config), tower.encoder.layers
    act = activation_name(layers[0].mlp.activation_fn, where, "vision_config.hidden_act", vision.hidden_act)
    patch, size = tower.embeddings.patch_size, tower.embeddings.image_size
    _require(size % patch == 0 or not clip, where, "vision_config.image_size", size, (f"a multiple of patch_size {patch}",))
    norms = [norm for layer in layers for norm in (layer.layer_norm1, layer.layer_norm2)]
    if clip:
        norms.append(tower.pre_layrnorm)
    heads = vision.hidden_size // head_dim([layer.self_attn for layer in layers], where, "vision_config.num_attention_heads")
    features = feature_layers(config)
    return VisionConfig(
        hidden_size=vision.hidden_size,
        intermediate_size=vision.intermediate_size,
        num_layers=max(features),
        num_heads=heads,
        image_size=size,
        patch_size=patch,
        layer_norm_eps=norm_epsilon(norms, where, "vision_config.layer_norm_eps"),
        hidden_act=act,
        keep_class_token=clip and keeps_class_token(config),
        feature_layers=features,
        class_token=clip,
        pre_norm=hasattr(tower, "pre_layrnorm"),
        patch_bias=tower.embeddings.patch_embedding.bias is not None,
    )


def _projector_config(config: PreTrainedConfig, projector: Any, where: str) -> ProjectorConfig:
    norm = getattr(projector, "projector_layernorm", None)
    return ProjectorConfig(
        hidden_act=activation_name(projector.act, where, "projector_hidden_act", config.projector_hidden_act),
        bias=projector.linear_1.bias is not None,
        num_linears=1 if has_single_linear_projector(config) else 2,
        norm_eps=None if norm is None else norm_epsilon([norm], where, "projector_layernorm_eps"),
    )


def _text_config(config: PreTrainedConfig, model: Any, rotary: Any, window: int | None, where: str) -> TextConfig:
    text, decoder = config.text_config, model.model.language_model
    layers, first = decoder.layers, decoder.layers[0]
    channels = head_dim([layer.self_attn for layer in layers], where, "text_config.head_dim")
    frequencies, scale = rope(rotary, channels, text.max_position_embeddings, where)
    norms = [norm for layer in layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
    return TextConfig(
        vocab_size=decoder.embed_tokens.num_embeddings,
        hidden_size=decoder.embed_tokens.embedding_dim,
        intermediate_size=first.mlp.up_proj.out_features,
        num_layers=len(layers),
        num_heads=first.self_attn.q_proj.out_features // channels,
        num_kv_heads=first.self_attn.k_proj.out_features // channels,
        head_dim=channels,
        rms_norm_eps=norm_epsilon([*norms, decoder.norm], where, "text_config.rms_norm_eps"),
        max_position_embeddings=text.max_position_embeddings,
        attention_bias=first.self_attn.q_proj.bias is not None,
        mlp_bias=first.mlp.up_proj.bias is not None,
        tie_word_embeddings="lm_head.weight" in model.all_tied_weights_keys,
        output_bias=first.self_attn.o_proj.bias is not None,
        sliding_window=window,
        hidden_act=activation_name(first.mlp.act_fn, where, "text_config.hidden_act", text.hidden_act),
        rope_frequencies=frequencies,
        rope_scale=scale,
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
    ratio = declared(config, "vision_aspect_ratio", None)
    limit = None if ratio is None else str(ratio).removeprefix(ANYRES)
    is_limit = limit is None or (limit.isdecimal() and len(limit) < 5 and int(limit) > 0)
    _require(is_limit, where, "vision_aspect_ratio", ratio, (f"{ANYRES}N",))
    return TileConfig(
        pinpoints=tuple((height, width) for height, width in points),
        max_tiles=None if limit is None else int(limit),
        single_when_many=family.single_when_many,
    )


def _require_sizes(config: PreTrainedConfig, where: str) -> None:
    """Raises UserError for counts that are no usable numbers, before anything is built from them.

    transformers has already checked that heads divide widths and that head_dim is even.
    """
    vision, text = config.vision_config, config.text_config
    common = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    for name, part, keys in (
        ("vision_config", vision, (*common, "image_size", "patch_size")),
        ("text_config", text, (*common, "num_key_value_heads", "vocab_size", "max_position_embeddings", "head_dim")),
    ):
        for key in keys:
            most, value = MAX_LAYERS if key == "num_hidden_layers" else MAX_SIZE, getattr(part, key, None)
            # Without a head_dim, as in Qwen2, it is hidden_size divided by the heads.
            is_count = (_is_whole(value) and 0 < value <= most) or (key == "head_dim" and value is None)
            _require(is_count, where, f"{name}.{key}", value, (f"whole numbers from 1 to {most}",))
    _require(vision.num_channels == 3, where, "vision_config.num_channels", vision.num_channels, (3,))
    heads, kv_heads = text.num_attention_heads, text.num_key_value_heads
    _require(heads % kv_heads == 0, where, "text_config.num_key_value_heads", kv_heads, (f"divisors of {heads} heads",))
    supported = (f"token ids below vocab_size {text.vocab_size}",)
    token, pad = config.image_token_index, text.pad_token_id
    _require(_is_whole(token) and 0 <= token < text.vocab_size, where, "image_token_index", token, supported)
    is_token = pad is None or (_is_whole(pad) and abs(pad) < text.vocab_size)
    _require(is_token, where, "text_config.pad_token_id", pad, supported)


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _require(condition: bool, where: str, key: str, got: Any, allowed: tuple[Any, ...]) -> None:
    if not condition:
        raise UserError(f"{where}: {key} is {got!r}; this family supports {', '.join(str(a) for a in allowed)}")
