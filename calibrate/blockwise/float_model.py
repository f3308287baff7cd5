"""The float model as transformers builds it, without weights, and the facts about its arithmetic that no module shows.

A config.json may hold keys that the class for its `model_type` ignores, left over from conversions between model families.
What a model computes is therefore read from its modules, or found by running a shrunken copy, and not taken from keys.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModel, AutoModelForImageTextToText, PreTrainedConfig

from qvlm_export.calibrate.errors import UserError

# What transformers raises while it builds a model from a configuration that makes no sense.
BUILD_ERRORS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError, ImportError, OSError)
PROBE_LENGTH, PROBE_WINDOW = 8, 3
# Sizes of the shrunken decoder, which is run to see its attention masks.
_SHRUNKEN = {
    "hidden_size": 4, "intermediate_size": 4, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 4,
    "vocab_size": 8, "pad_token_id": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}  # fmt: skip


def make_float_model(config: PreTrainedConfig, where: str = "config.json") -> Any:
    """The model that transformers builds from `config`, on the meta device.

    where: begins error messages. Raises UserError when transformers cannot build one.
    """
    try:
        with torch.device("meta"):
            return AutoModelForImageTextToText.from_config(config).eval().requires_grad_(False)
    except BUILD_ERRORS as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(f"{where}: transformers cannot build a {config.model_type} from it ({reason})") from error


def declared(config: PreTrainedConfig, key: str, default: Any) -> Any:
    """The value of `key` where the class of `config` has such a field, else `default`, whatever config.json says."""
    return getattr(config, key) if key in {field.name for field in dataclasses.fields(type(config))} else default


def attention_window(text: PreTrainedConfig, where: str = "config.json") -> int | None:
    """How many positions a token of the decoder attends to, itself included; None for all.

    A decoder of few channels but with all layers is run, and the masks that its layers get are looked at. where: begins
    error messages. Raises UserError when layers differ, when they attend in another way, or when the window is not a whole
    number above 0.
    """
    window = getattr(text, "sliding_window", None)
    if getattr(text, "is_causal", True) is not True:  # which transformers obeys, whatever the class
        raise UserError(
            f"{where}: text_config.is_causal is {text.is_causal!r}; only decoders that attend backwards are supported"
        )
    try:
        masks = _record_masks(_shrink(text, {} if window is None else {"sliding_window": PROBE_WINDOW}))
    except BUILD_ERRORS as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(f"{where}: transformers cannot run a {text.model_type} with this text_config ({reason})") from error
    age = torch.arange(PROBE_LENGTH)[:, None] - torch.arange(PROBE_LENGTH)
    kinds = {"full attention": age >= 0, f"a sliding window of {window}": (age >= 0) & (age < PROBE_WINDOW)}
    found = [next((kind for kind, allowed in kinds.items() if torch.equal(mask, allowed)), "another mask") for mask in masks]
    if len(set(found)) > 1 or "another mask" in found:
        raise UserError(
            f"{where}: text_config has layers with {' and '.join(dict.fromkeys(found))}; supported are layers of one "
            "kind, with full attention or with one sliding window"
        )
    if found[0] == "full attention":
        return None
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise UserError(f"{where}: text_config.sliding_window is {window!r}; supported are whole numbers above 0 and null")
    return None if window >= text.max_position_embeddings else window


def _shrink(text: PreTrainedConfig, changes: Mapping[str, Any]) -> PreTrainedConfig:
    """A copy of the decoder's configuration with small sizes, and with `changes`."""
    content = {**text.to_dict(), **_SHRUNKEN, **changes}
    for key in ("rope_scaling", "rope_theta"):  # in the form of older releases; they would win over rope_parameters
        content.pop(key, None)
    shrunken = type(text)(**content)
    shrunken._attn_implementation = "eager"  # which gives every layer its whole mask
    return shrunken


def _record_masks(text: PreTrainedConfig) -> list[torch.Tensor]:
    """Runs a decoder on PROBE_LENGTH tokens; returns which keys each layer's queries attend to, bool [S, S]."""
    masks: list[torch.Tensor] = []
    model = AutoModel.from_config(text).float().eval()
    for layer in model.layers:
        layer.register_forward_pre_hook(
            lambda _, __, kwargs: masks.append(kwargs["attention_mask"][0, 0] == 0), with_kwargs=True
        )
    with torch.inference_mode():
        model(inputs_embeds=torch.zeros(1, PROBE_LENGTH, text.hidden_size), use_cache=False)
    return masks
