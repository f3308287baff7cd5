"""Shared inputs: which linears of a block read the same activation (q/k/v; gate/up), and which layer produces it.

Equalization (SmoothQuant/AWQ) divides the channels of a shared input by one set of factors for all its linears, and folds
the factors into the preceding layer.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import nn

from qvlm_export.calibrate.blockwise.blocks import get_linear


@dataclass(frozen=True)
class SharedInput:
    """Linears that read the same input, by their names inside the block, in the order they compute.

    preceding: the norm or linear that produces the input, or None. per_head: whether that is v_proj, each of whose heads
    several query heads may share (grouped-query attention). enclosing_module: for a single linear, the module that returns
    this linear's output and whose other linears lead to this one only; else None. residual: for a linear whose output is
    added to the residual stream, the norm that reads that stream.
    """

    linears: tuple[str, ...]
    preceding: str | None = None
    per_head: bool = False
    enclosing_module: str | None = None
    residual: str | None = None


# Of all blocks of all families; a block has those whose linears and preceding layer it holds.
SHARED_INPUTS = (
    SharedInput(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm"),
    SharedInput(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "layer_norm1"),
    SharedInput(
        ("self_attn.o_proj",),
        "self_attn.v_proj",
        per_head=True,
        enclosing_module="self_attn",
        residual="input_layernorm",
    ),
    SharedInput(
        ("self_attn.out_proj",),
        "self_attn.v_proj",
        per_head=True,
        enclosing_module="self_attn",
        residual="layer_norm1",
    ),
    SharedInput(("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm"),
    SharedInput(("mlp.fc1",), "layer_norm2"),
    SharedInput(("mlp.down_proj",), "mlp.up_proj", enclosing_module="mlp", residual="post_attention_layernorm"),
    SharedInput(("mlp.fc2",), enclosing_module="mlp", residual="layer_norm2"),
    SharedInput(("linear_1",)),
    SharedInput(("linear_2",)),
)


def find_shared_inputs(module: nn.Module) -> list[SharedInput]:
    """The shared inputs of a block's module, in the order it computes them."""
    names = {name for name, _ in module.named_modules()}
    return [s for s in SHARED_INPUTS if set(s.linears) <= names and (s.preceding is None or s.preceding in names)]


@dataclass(frozen=True)
class ChannelSharing:
    """Which input channels share an equalization factor.

    copies: how many query heads read each value head. head_dim: channels of a head.
    """

    copies: int = 1
    head_dim: int = 1

    def reduce(self, statistic: torch.Tensor) -> torch.Tensor:
        """A statistic by input channel, [in], as one by factor, [in / copies]: the largest of the channels that share it."""
        if self.copies == 1:
            return statistic
        return statistic.reshape(-1, self.copies, self.head_dim).amax(1).reshape(-1)

    def expand(self, factors: torch.Tensor) -> torch.Tensor:
        """Factors [in / copies] as one for each input channel, [in]."""
        if self.copies == 1:
            return factors
        return factors.reshape(-1, self.head_dim).repeat_interleave(self.copies, 0).reshape(-1)


def find_channel_sharing(module: nn.Module, shared: SharedInput) -> ChannelSharing:
    """Which channels of the shared input come from the same channel of the preceding layer."""
    if not shared.per_head or shared.preceding is None:
        return ChannelSharing()
    produced, read = get_linear(module, shared.preceding).out_features, get_linear(module, shared.linears[0]).in_features
    return ChannelSharing(read // produced, int(vars(module.get_submodule("self_attn"))["head_dim"]))


def list_linears(module: nn.Module) -> list[str]:
    """The names of the linears of all shared inputs, in the order they compute."""
    return [name for shared in find_shared_inputs(module) for name in shared.linears]


def list_linears_before(module: nn.Module, shared: SharedInput) -> list[str]:
    """The names of the linears that a forward pass computes before it reaches the shared input."""
    names = list_linears(module)
    return names[: names.index(shared.linears[0])]


def share_of_weights(module: nn.Module, names: Collection[str]) -> float:
    """The share, 0 to 1, that these linears have of all weights of a block's linears."""
    sizes = {name: get_linear(module, name).weight.numel() for name in list_linears(module)}
    return sum(sizes[name] for name in names) / sum(sizes.values())
