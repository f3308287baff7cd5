"""Backward pass of one block: token sensitivities and the output Hessian (Fisher) G = sum g g^T of every linear.

A block's tape entry holds the gradients of the probed logits by the block's outputs. From these follow, at every linear, the
squared gradient at each token and the sum of outer products of the gradients, and for the preceding block the gradients by
its outputs. Only this block's weights are in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import nn

from qvlm_export.calibrate.blockwise.block_loader import BlockLoader
from qvlm_export.calibrate.blockwise.blocks import Block
from qvlm_export.calibrate.blockwise.shared_inputs import SharedInput, find_shared_inputs, list_linears
from qvlm_export.calibrate.numerics.matmul import gram
from qvlm_export.calibrate.numerics.threads import one_thread
from qvlm_export.calibrate.rounding.output_hessian import (
    add_gradients,
    empty_output_hessian,
    invert_cholesky,
    leverage_scores,
    temper_gradients,
)
from qvlm_export.calibrate.sensitivity.tape import RecordedForward, TapeEntry, record_forward

# Added to every token's weight, as a share of the mean weight: few calibration tokens have nearly all the weight.
MIN_TOKEN_WEIGHT = 0.1

TokenWeights = dict[str, list[torch.Tensor]]
_T = TypeVar("_T")


@dataclass(frozen=True)
class Sensitivity:
    """How much errors at tokens and in output directions matter for the logits of the answer tokens.

    token_weights: one tensor float32 [n, tokens] for each input of a block; by canonical name of the first linear of
    each shared input, and by block for the block's output. `measure_sensitivity` scales them to mean 1 over all tokens.
    output_hessians: as `output_hessian.py` stores them, by linear; empty unless they were requested.
    mean_squares: by the names of `token_weights`, the mean over all tokens before that scaling, which is the mean square of
    the gradient at a token.
    """

    token_weights: TokenWeights = field(default_factory=dict)
    output_hessians: dict[str, torch.Tensor] = field(default_factory=dict)
    mean_squares: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class BackwardRequest:
    """What a block's backward pass has to compute besides token weights.

    output_hessians: sums so far, to which this pass adds, by linear; None where none are needed. leverage: whether a token's
    gradient is weighted by the leverage of its input. temper: whether a token counts by the norm of its gradient and not by
    the square. generator: for the random signs of sketches.
    """

    output_hessians: Mapping[str, torch.Tensor] | None
    leverage: bool
    temper: bool
    generator: torch.Generator


def backward_block(entry: TapeEntry, load: BlockLoader, device: torch.device, request: BackwardRequest) -> Sensitivity:
    """Squared gradients by token, not normalized, and the updated output Hessians of one block.

    Clears the gradients of the entry's leaves and adds those by its inputs to the leaves that the inputs come from.
    """
    prefix, shared_inputs, generator = entry.block.prefix, find_shared_inputs(entry.block.module), request.generator
    weights: dict[str, list[torch.Tensor]] = {prefix: [], **{f"{prefix}.{s.linears[0]}": [] for s in shared_inputs}}
    hessians = {} if request.output_hessians is None else select_block(request.output_hessians, entry.block)
    input_gradients = []
    with nullcontext(entry.block.module) if entry.recorded else load(entry.block) as module:
        needs_leverage = request.output_hessians is not None and request.leverage and len(entry.leaves) > 0
        inverses = _invert_input_hessians(entry, module, shared_inputs, device) if needs_leverage else {}
        for forward, leaf in zip(_iterate_forwards(entry, module, device), entry.leaves, strict=True):
            output_gradient = _get_gradient(leaf)
            input_gradient, linear_gradients = forward.gradients(output_gradient.to(device), last=True)
            input_gradients.append(input_gradient.cpu())
            weights[prefix].append(output_gradient.square().sum(-1))
            for shared in shared_inputs:
                weights[f"{prefix}.{shared.linears[0]}"].append(_sum_squares(shared, linear_gradients).cpu())
            for shared in shared_inputs if request.output_hessians is not None else ():
                rows = {name: linear_gradients[name].flatten(0, -2) for name in shared.linears}
                if shared in inverses:
                    x = forward.linear_inputs[shared.linears[0]].flatten(0, -2)
                    roots = leverage_scores(x, inverses[shared]).sqrt()[:, None]
                    rows = {name: gradient * roots for name, gradient in rows.items()}
                if request.temper:
                    rows = {name: temper_gradients(gradient) for name, gradient in rows.items()}
                for name, gradient in rows.items():
                    _accumulate(hessians, f"{prefix}.{name}", gradient, generator)
            leaf.grad = None
    received = [(x, g) for x, g in zip(entry.inputs, entry.batches.split(input_gradients), strict=True) if x.requires_grad]
    if received:
        torch.autograd.backward([x for x, _ in received], [g for _, g in received])
    return Sensitivity({name: entry.batches.split(parts) for name, parts in weights.items()}, hessians)


def _invert_input_hessians(
    entry: TapeEntry, module: nn.Module, shared_inputs: Sequence[SharedInput], device: torch.device
) -> dict[SharedInput, torch.Tensor]:
    """For `leverage_scores`: the inverse factor, float32 [in, in], of each shared input's Hessian, its tokens weighted as in
    the search. Takes one more backward pass through the block."""
    unweighted: dict[SharedInput, torch.Tensor] = {}
    weighted: dict[SharedInput, torch.Tensor] = {}
    token_weights: dict[SharedInput, list[torch.Tensor]] = {shared: [] for shared in shared_inputs}
    for forward, leaf in zip(_iterate_forwards(entry, module, device), entry.leaves, strict=True):
        _, linear_gradients = forward.gradients(_get_gradient(leaf).to(device), last=False)
        for shared in shared_inputs:
            x = forward.linear_inputs[shared.linears[0]].flatten(0, -2)
            weight = _sum_squares(shared, linear_gradients).flatten()
            token_weights[shared].append(weight)
            unweighted[shared] = unweighted.get(shared, 0.0) + gram(x)
            weighted[shared] = weighted.get(shared, 0.0) + gram(x, weight)
    with one_thread():  # so that sums over many tokens are the same on any number of threads
        mean = {shared: float(torch.cat(parts).double().mean()) or 1.0 for shared, parts in token_weights.items()}
    return {
        shared: invert_cholesky(weighted.pop(shared) / mean[shared] + MIN_TOKEN_WEIGHT * unweighted.pop(shared))
        for shared in shared_inputs
    }


def _get_gradient(leaf: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _sum_squares(shared: SharedInput, gradients: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The squared norm, float32 [B, tokens], of each token's gradient by the outputs of the linears that share an input."""
    return torch.stack([gradients[name].square().sum(-1) for name in shared.linears]).sum(0)


def _iterate_forwards(entry: TapeEntry, module: nn.Module, device: torch.device) -> Iterator[RecordedForward]:
    """Every batch's forward pass through the block, computed again where it was not recorded."""
    if entry.recorded:
        return iter(entry.recorded)
    names = list_linears(module)
    return (record_forward(module, entry.run, x.to(device), names) for x in entry.batches.iter_merged(entry.inputs))


def select_block(named: Mapping[str, _T], block: Block) -> dict[str, _T]:
    """The entries whose names are the block's or inside it, under the same names."""
    return {n: value for n, value in named.items() if f"{n}.".startswith(f"{block.prefix}.")}


def _accumulate(hessians: dict[str, torch.Tensor], name: str, gradients: torch.Tensor, generator: torch.Generator) -> None:
    hessian = hessians[name] if name in hessians else empty_output_hessian(gradients.shape[1])
    hessians[name] = add_gradients(hessian, gradients, generator)
