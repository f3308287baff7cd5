"""linears that share an input (q/k/v; gate/up ...), and the layer that produces it"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import nn

from qvlm_export.calibrate.blockwise.blocks import get_linear


@dataclass(frozen=True)
class SharedInput:
    """Linears that read one input, in the order blocks compute them. producer: the norm or linear that makes it, or None.

    heads: the producer is v_proj, whose rows are shared by the query heads of a group. ends: the module that returns what
    the group's only linear does, and whose other linears lead to this group alone.
    """

    linears: tuple[str, ...]
    preceding: str | None = None
    per_head: bool = False
    enclosing_module: str | None = None


# All blocks of all families: a block has the groups whose linears it holds.
SHARED_INPUTS = (
    SharedInput(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm"),
    SharedInput(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "layer_norm1"),
    SharedInput(("self_attn.o_proj",), "self_attn.v_proj", per_head=True, enclosing_module="self_attn"),
    SharedInput(("self_attn.out_proj",), "self_attn.v_proj", per_head=True, enclosing_module="self_attn"),
    SharedInput(("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm"),
    SharedInput(("mlp.fc1",), "layer_norm2"),
    SharedInput(("mlp.down_proj",), "mlp.up_proj", enclosing_module="mlp"),
    SharedInput(("mlp.fc2",), enclosing_module="mlp"),
    SharedInput(("linear_1",)),
    SharedInput(("linear_2",)),
)


def find_shared_inputs(module: nn.Module) -> list[SharedInput]:
    """The groups that this block holds, in the order it computes them."""
    names = {name for name, _ in module.named_modules()}
    return [g for g in SHARED_INPUTS if set(g.linears) <= names and (g.preceding is None or g.preceding in names)]


@dataclass(frozen=True)
class ChannelSharing:
    """How input channels share factors. heads: `copies` query heads read each value head of `head_dim` channels."""

    copies: int = 1
    head_dim: int = 1

    def reduce(self, statistic: torch.Tensor) -> torch.Tensor:
        """Per input channel -> per factor, the largest of those that share it."""
        if self.copies == 1:
            return statistic
        return statistic.reshape(-1, self.copies, self.head_dim).amax(1).reshape(-1)

    def expand(self, factors: torch.Tensor) -> torch.Tensor:
        """Per factor -> per input channel."""
        if self.copies == 1:
            return factors
        return factors.reshape(-1, self.head_dim).repeat_interleave(self.copies, 0).reshape(-1)


def find_channel_sharing(module: nn.Module, group: SharedInput) -> ChannelSharing:
    """Which channels of the group's input come from one channel of its producer."""
    if not group.per_head or group.preceding is None:
        return ChannelSharing()
    made, read = get_linear(module, group.preceding).out_features, get_linear(module, group.linears[0]).in_features
    return ChannelSharing(read // made, int(vars(module.get_submodule("self_attn"))["head_dim"]))


def list_linears(module: nn.Module) -> list[str]:
    """The linears of all groups, in the order they compute."""
    return [name for group in find_shared_inputs(module) for name in group.linears]


def list_linears_before(module: nn.Module, group: SharedInput) -> list[str]:
    """The linears that have computed when a forward pass comes to the group."""
    names = list_linears(module)
    return names[: names.index(group.linears[0])]


def share_of_weights(module: nn.Module, names: Collection[str]) -> float:
    """The share that these linears have of all weights of a block's linears."""
    sizes = {name: get_linear(module, name).weight.numel() for name in list_linears(module)}
    return sum(sizes[name] for name in names) / sum(sizes.values())
