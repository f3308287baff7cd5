"""The way back through one block: what its tokens count, and in which directions its outputs matter. torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import nn

from qvlm_export.calibrate.blockwise.blocks import Block
from qvlm_export.calibrate.blockwise.offload import BlockLoader
from qvlm_export.calibrate.blockwise.shared_inputs import SharedInput, find_shared_inputs, list_linears
from qvlm_export.calibrate.numerics.matmul import matmul
from qvlm_export.calibrate.numerics.threads import one_thread
from qvlm_export.calibrate.rounding.output_hessian import (
    add_gradients,
    empty_output_hessian,
    invert_cholesky,
    leverage_scores,
)
from qvlm_export.calibrate.sensitivity.tape import RecordedForward, TapeEntry, record_forward

MIN_TOKEN_WEIGHT = 0.1  # of the mean weight, for every token: few calibration tokens have nearly all the weight

TokenWeights = dict[str, list[torch.Tensor]]
_T = TypeVar("_T")


@dataclass(frozen=True)
class Sensitivity:
    """tokens: by linear that a group begins with, or by block for its output: one tensor an input, float32 [n, tokens],
    mean 1 over all. outputs: by linear, or by block, the metric of its output as `kronecker_rounding.py` keeps it; empty
    where
    nobody asked."""

    tokens: TokenWeights = field(default_factory=dict)
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class BackwardRequest:
    """metrics: of what came before, by linear, and by block where it learns; None where nobody asks. leverage: whether a
    gradient counts there by the leverage of its token's input. generator: of signs."""

    output_hessians: Mapping[str, torch.Tensor] | None
    learns: bool
    leverage: bool
    generator: torch.Generator


def backward_block(visit: TapeEntry, resident: BlockLoader, device: torch.device, asked: BackwardRequest) -> Sensitivity:
    """Weights and metrics of one block, and its inputs' gradients handed back to whatever made them."""
    prefix, groups, generator = visit.block.prefix, find_shared_inputs(visit.block.module), asked.generator
    weights: dict[str, list[torch.Tensor]] = {prefix: [], **{f"{prefix}.{group.linears[0]}": [] for group in groups}}
    gradients, metrics = [], {} if asked.output_hessians is None else select_block(asked.output_hessians, visit.block)
    with nullcontext(visit.block.module) if visit.passed else resident(visit.block) as module:
        asks = asked.output_hessians is not None and asked.leverage and len(visit.leaves) > 0
        inverses = _inverse_factors(visit, module, groups, device) if asks else {}
        for one, leaf in zip(_again(visit, module, device), visit.leaves, strict=True):
            given = _gradient(leaf)
            first, made = one.gradients(given.to(device), last=True)
            gradients.append(first.cpu())
            weights[prefix].append(given.square().sum(-1))
            for group in groups:
                weights[f"{prefix}.{group.linears[0]}"].append(_sizes(group, made).cpu())
            if asked.output_hessians is not None and asked.learns:
                _add(metrics, prefix, given.to(device).flatten(0, -2), generator)
            for group in groups if asked.output_hessians is not None else ():
                rows = {name: made[name].flatten(0, -2) for name in group.linears}
                if group in inverses:
                    roots = leverage_scores(one.read[group.linears[0]].flatten(0, -2), inverses[group]).sqrt()[:, None]
                    rows = {name: gradient * roots for name, gradient in rows.items()}
                for name, gradient in rows.items():
                    _add(metrics, f"{prefix}.{name}", gradient, generator)
            leaf.grad = None
    onwards = [(x, g) for x, g in zip(visit.inputs, visit.batches.split(gradients), strict=True) if x.requires_grad]
    if onwards:
        torch.autograd.backward([x for x, _ in onwards], [g for _, g in onwards])
    return Sensitivity({name: visit.batches.split(parts) for name, parts in weights.items()}, metrics)


def _inverse_factors(
    visit: TapeEntry, module: nn.Module, groups: Sequence[SharedInput], device: torch.device
) -> dict[SharedInput, torch.Tensor]:
    """Of what each group reads, its tokens weighted as in the search: see `leverage_scores`. One more way back."""
    plain: dict[SharedInput, torch.Tensor] = {}
    counted: dict[SharedInput, torch.Tensor] = {}
    sizes: dict[SharedInput, list[torch.Tensor]] = {group: [] for group in groups}
    for one, leaf in zip(_again(visit, module, device), visit.leaves, strict=True):
        _, made = one.gradients(_gradient(leaf).to(device), last=False)
        for group in groups:
            rows, size = one.read[group.linears[0]].flatten(0, -2), _sizes(group, made).flatten()
            sizes[group].append(size)
            plain[group] = plain.get(group, 0.0) + matmul(rows.T, rows)
            counted[group] = counted.get(group, 0.0) + matmul((rows * size[:, None]).T, rows)
    with one_thread():  # so that sums over many tokens are the same on any number
        mean = {group: float(torch.cat(parts).double().mean()) or 1.0 for group, parts in sizes.items()}
    return {
        group: invert_cholesky(counted.pop(group) / mean[group] + MIN_TOKEN_WEIGHT * plain.pop(group)) for group in groups
    }


def _gradient(leaf: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _sizes(group: SharedInput, gradients: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The squared gradient by what a group's linears give at every token, float32 [B, tokens]."""
    return torch.stack([gradients[name].square().sum(-1) for name in group.linears]).sum(0)


def _again(visit: TapeEntry, module: nn.Module, device: torch.device) -> Iterator[RecordedForward]:
    """Every batch through the block, computed again where that was not kept."""
    if visit.passed:
        return iter(visit.passed)
    names = list_linears(module)
    return (record_forward(module, visit.run, x.to(device), names) for x in visit.batches.iter_merged(visit.inputs))


def select_block(named: Mapping[str, _T], block: Block) -> dict[str, _T]:
    """What belongs to one block, by the same names."""
    return {n: value for n, value in named.items() if f"{n}.".startswith(f"{block.prefix}.")}


def _add(metrics: dict[str, torch.Tensor], name: str, gradients: torch.Tensor, generator: torch.Generator) -> None:
    metric = metrics[name] if name in metrics else empty_output_hessian(gradients.shape[1])
    metrics[name] = add_gradients(metric, gradients, generator)
