"""Reads from transformers' own modules what the graphs must compute: activations, norms, biases, rotary frequencies.

The modules are on the meta device. Every function raises UserError, naming the key of config.json, for what the graphs
cannot express.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from qvlm_export.calibrate.blockwise.blocks import ModelBlocks
from qvlm_export.calibrate.errors import UserError
from qvlm_export.engines.config import Activation, ModelConfig
from qvlm_export.engines.graph.float_graphs import TIED_HEAD, expected_shapes

# Names of the graphs' activation functions -> what they compute.
_FUNCTIONS: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu": nn.functional.gelu,
    "gelu_pytorch_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "silu": nn.functional.silu,
    "linear": lambda x: x,
}
_PROBES = torch.linspace(-12, 12, 481)
_TOLERANCE = 2e-5  # of activations; the functions above differ from each other by more than 4e-4


def activation_name(module: Callable[[torch.Tensor], torch.Tensor], where: str, key: str, got: object) -> Activation:
    """Returns the name of the graph's activation function that computes what `module` does, whatever its name.

    where, key, got: file, key and value that a refusal names.
    """
    try:
        values = module(_PROBES.clone())
    except RuntimeError:  # it has parameters, which are on the meta device
        return _refuse(where, key, got, tuple(_FUNCTIONS))
    for name, function in _FUNCTIONS.items():
        if torch.allclose(values, function(_PROBES), rtol=0, atol=_TOLERANCE):
            return name
    return _refuse(where, key, got, tuple(_FUNCTIONS))


def norm_epsilon(norms: Sequence[Any], where: str, key: str) -> float:
    """Returns the epsilon that all these norms share."""
    values = dict.fromkeys(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps for norm in norms)
    value, *others = values
    if others or isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        _refuse(where, key, [value, *others] if others else value, ("one number that is not negative",))
    return float(value)


def head_dim(attentions: Sequence[Any], where: str, key: str) -> int:
    """Returns the channels of a head, which all these attentions share and scale their scores by the root of."""
    size = int(attentions[0].head_dim)
    for module in attentions:
        scale = module.scaling if hasattr(module, "scaling") else module.scale
        if module.head_dim != size or not math.isclose(scale, size**-0.5, rel_tol=1e-6):
            _refuse(where, key, (module.head_dim, scale), (f"heads of {size} channels, scores divided by its root",))
    return size


def rope(rotary: Any, channels: int, length: int, where: str) -> tuple[tuple[float, ...], float]:
    """Returns the rotary frequencies, radians per position for each of channels / 2 pairs, and the factor of cos and sin.

    rotary: on the CPU. length: number of positions for which they must hold.
    """
    key, got = "text_config.rope_parameters", rotary.config.rope_parameters
    frequencies, scale = rotary.inv_freq.float().clone(), float(rotary.attention_scaling)
    if frequencies.numel() != channels // 2:
        return _refuse(where, key, got, (f"rotation of all {channels} channels of a head",))
    if not bool((frequencies.isfinite() & (frequencies >= 0)).all()) or not math.isfinite(scale) or scale <= 0:
        return _refuse(where, key, got, ("numbers that give finite frequencies",))
    last = torch.tensor([[length - 1]])
    cos, _ = rotary(torch.zeros(1, 1, channels), position_ids=last)
    angle = last[0, :, None].float() * frequencies
    if not torch.allclose(cos[0], torch.cat([angle, angle], -1).cos() * scale, rtol=0, atol=1e-6):
        return _refuse(where, key, got, (f"frequencies that do not change up to max_position_embeddings {length}",))
    return tuple(frequencies.tolist()), scale


def require_same_tensors(blocks: ModelBlocks, config: ModelConfig, where: str) -> None:
    """Raises UserError when transformers' blocks have other parameters than the graphs of `config`, or of other shapes."""
    built: dict[str, tuple[int, ...]] = {}
    for block in (*blocks.entries, *blocks.all()):
        built |= {f"{block.prefix}.{name}": tuple(p.shape) for name, p in block.module.named_parameters()}
    declared = {name: shape for name, shape in expected_shapes(config).items() if _is_in(name, blocks)}
    for name in dict.fromkeys((*built, *declared)):
        if built.get(name) != declared.get(name):
            raise UserError(
                f"{where}: transformers builds {name} of shape {built.get(name)}, the graphs have {declared.get(name)}; "
                "this model is not supported"
            )


def _is_in(name: str, blocks: ModelBlocks) -> bool:
    return name != TIED_HEAD and any(name.startswith(f"{block.prefix}.") for block in (*blocks.entries, *blocks.all()))


def _refuse(where: str, key: str, got: object, allowed: tuple[object, ...]) -> Any:
    raise UserError(f"{where}: {key} is {got!r}; this family supports {', '.join(str(a) for a in allowed)}")
