"""linears that share an input (q/k/v; gate/up ...), and the layer that produces it"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import nn

from qvlm_export.calibrate.blockwise.blocks import linear_of


@dataclass(frozen=True)
class Group:
    """Linears that read one input, in the order blocks compute them. producer: the norm or linear that makes it, or None.

    heads: the producer is v_proj, whose rows are shared by the query heads of a group. ends: the module that returns what
    the group's only linear does, and whose other linears lead to this group alone.
    """

    linears: tuple[str, ...]
    producer: str | None = None
    heads: bool = False
    ends: str | None = None


# All blocks of all families: a block has the groups whose linears it holds.
GROUPS = (
    Group(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm"),
    Group(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "layer_norm1"),
    Group(("self_attn.o_proj",), "self_attn.v_proj", heads=True, ends="self_attn"),
    Group(("self_attn.out_proj",), "self_attn.v_proj", heads=True, ends="self_attn"),
    Group(("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm"),
    Group(("mlp.fc1",), "layer_norm2"),
    Group(("mlp.down_proj",), "mlp.up_proj", ends="mlp"),
    Group(("mlp.fc2",), ends="mlp"),
    Group(("linear_1",)),
    Group(("linear_2",)),
)


def groups_of(module: nn.Module) -> list[Group]:
    """The groups that this block holds, in the order it computes them."""
    names = {name for name, _ in module.named_modules()}
    return [g for g in GROUPS if set(g.linears) <= names and (g.producer is None or g.producer in names)]


@dataclass(frozen=True)
class Sharing:
    """How input channels share factors. heads: `copies` query heads read each value head of `head_dim` channels."""

    copies: int = 1
    head_dim: int = 1

    def reduced(self, statistic: torch.Tensor) -> torch.Tensor:
        """Per input channel -> per factor, the largest of those that share it."""
        if self.copies == 1:
            return statistic
        return statistic.reshape(-1, self.copies, self.head_dim).amax(1).reshape(-1)

    def expanded(self, factors: torch.Tensor) -> torch.Tensor:
        """Per factor -> per input channel."""
        if self.copies == 1:
            return factors
        return factors.reshape(-1, self.head_dim).repeat_interleave(self.copies, 0).reshape(-1)


def sharing_of(module: nn.Module, group: Group) -> Sharing:
    """Which channels of the group's input come from one channel of its producer."""
    if not group.heads or group.producer is None:
        return Sharing()
    made, read = linear_of(module, group.producer).out_features, linear_of(module, group.linears[0]).in_features
    return Sharing(read // made, int(vars(module.get_submodule("self_attn"))["head_dim"]))


def linears_of(module: nn.Module) -> list[str]:
    """The linears of all groups, in the order they compute."""
    return [name for group in groups_of(module) for name in group.linears]


def before(module: nn.Module, group: Group) -> list[str]:
    """The linears that have computed when a forward pass comes to the group."""
    names = linears_of(module)
    return names[: names.index(group.linears[0])]


def share_of(module: nn.Module, names: Collection[str]) -> float:
    """The share that these linears have of all weights of a block's linears."""
    sizes = {name: linear_of(module, name).weight.numel() for name in linears_of(module)}
    return sum(sizes[name] for name in names) / sum(sizes.values())
