"""Cheap proxies of the cross-layer dependency of two consecutive layers, the entropy of Q-VLM (arXiv 2410.08119) among them.

tools/study/entropy.py measures whether they predict what a joint search of clipping ranges gains.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from qvlm_export.calibrate.quantization.quantizer import fake_quantize
from qvlm_export.calibrate.qvlm.entropy import entropy_nats, soft_code_distribution
from qvlm_export.calibrate.qvlm.joint_search import Outputs, SearchLayer


def code_entropy(values: torch.Tensor, scale: float, num_bits: int) -> float:
    """Entropy in nats of the softly assigned integer codes of `values`, at most num_bits * log 2."""
    return entropy_nats(soft_code_distribution(values, scale, num_bits))


def quantization_error(values: torch.Tensor, scale: float, num_bits: int) -> float:
    """Squared norm of the quantization error, relative to that of `values`; 0 if all values are 0."""
    energy = values.double().square().sum()
    error = (fake_quantize(values, scale, num_bits) - values).double().square().sum()
    return float(error / energy.clamp(min=torch.finfo(torch.float64).tiny))


def error_cosine(first: torch.Tensor, second: torch.Tensor) -> float:
    """Cosine between the errors of one output from quantizing only the first layer and only the second one; 0 if one is 0.

    At 0 the errors add up as if the layers were independent; if positive they amplify, if negative they cancel each other.
    """
    one, two = first.double().flatten(), second.double().flatten()
    norms = one.norm() * two.norm()
    return float(one @ two / norms) if float(norms) > 0 else 0.0


def lookahead_regret(own: Sequence[float], ahead: Sequence[float]) -> float:
    """Relative increase of the next layer's error if a layer's candidate is chosen by the layer's own error.

    own: error of the layer's own output for each candidate. ahead: error of the next layer's output for the same
    candidates, where the next layer is float or has its current ranges. The regret is 0 if both choose the same, and
    infinite if the chosen candidate has an error and the best has none. It costs one forward pass of the next layer per
    candidate; a joint search of the two layers costs one per pair of candidates.
    """
    chosen, best = ahead[min(range(len(own)), key=own.__getitem__)], min(ahead)
    if chosen == best:
        return 0.0
    return chosen / best - 1.0 if best > 0 else float("inf")


def flatness(errors: Sequence[float]) -> float:
    """Smallest error divided by the second smallest: 1 if they are equal, near 0 at a sharp optimum.

    If a layer's own error has a flat optimum, a joint search can leave it at little cost.
    """
    best, second = sorted(errors)[:2]
    return best / second if second > 0 else 1.0


def pair_errors(
    pair: Sequence[SearchLayer], candidate_of_second: int, errors: Sequence[Callable[[Any], float]], before: Outputs = ()
) -> tuple[list[float], list[float]]:
    """Errors of both layers' outputs for each candidate of the first layer.

    candidate_of_second: index of the second layer's candidate. errors: error function of each layer's output. before:
    outputs of the layers before the pair. It takes 2 K forward passes of a layer for K candidates, and the memory of one
    output of each layer.
    """
    first, second = pair
    inputs, own, ahead = first.prepare(before), list[float](), list[float]()
    for candidate in first.candidates:
        output = first.apply(inputs, candidate)
        own.append(errors[0](output))
        ahead.append(errors[1](second.apply(second.prepare((*before, output)), second.candidates[candidate_of_second])))
    return own, ahead
