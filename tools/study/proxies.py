"""What can be known cheaply of two consecutive layers, beside the entropy: does it tell what a joint search would gain?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from qvlm_export.calibrate.quantization.quantizer import fake_quantize
from qvlm_export.calibrate.qvlm.entropy import entropy_nats, soft_code_distribution
from qvlm_export.calibrate.qvlm.joint_search import Outputs, SearchLayer


def code_entropy(values: torch.Tensor, scale: float, num_bits: int) -> float:
    """Entropy in nats of the softly assigned codes of `values`: at most num_bits * log 2."""
    return entropy_nats(soft_code_distribution(values, scale, num_bits))


def quantization_error(values: torch.Tensor, scale: float, num_bits: int) -> float:
    """Energy of the rounding error in units of the energy of `values`; 0 where all are 0."""
    energy = values.double().square().sum()
    error = (fake_quantize(values, scale, num_bits) - values).double().square().sum()
    return float(error / energy.clamp(min=torch.finfo(torch.float64).tiny))


def error_cosine(first: torch.Tensor, second: torch.Tensor) -> float:
    """Cosine between two errors of one output: from quantizing the one layer only and the other layer only.

    0: errors add up as if the layers were independent. Positive: they amplify, negative: they cancel each other.
    """
    one, two = first.double().flatten(), second.double().flatten()
    size = one.norm() * two.norm()
    return float(one @ two / size) if float(size) > 0 else 0.0


def lookahead_regret(own: Sequence[float], ahead: Sequence[float]) -> float:
    """What choosing a layer's candidate by its own output costs at the next layer's output, relative to the best there.

    own: error of the layer's own output for each candidate. ahead: error of the next layer's output for the same
    candidates, the next layer as it is (float, or with its current ranges). 0: both agree. It costs one forward of the next
    layer a candidate, where a joint search of the two costs one a pair of candidates. Infinite when only the best is exact.
    """
    chosen, best = ahead[min(range(len(own)), key=own.__getitem__)], min(ahead)
    if chosen == best:
        return 0.0
    return chosen / best - 1.0 if best > 0 else float("inf")


def flatness(errors: Sequence[float]) -> float:
    """How little the second-best candidate is worse than the best: 1 for as good, towards 0 for a sharp optimum.

    A flat optimum of a layer's own error lets a joint search move it at little cost.
    """
    best, second = sorted(errors)[:2]
    return best / second if second > 0 else 1.0


def pair_errors(
    pair: Sequence[SearchLayer], kept: int, errors: Sequence[Callable[[Any], float]], before: Outputs = ()
) -> tuple[list[float], list[float]]:
    """Errors of both layers' outputs for each candidate of the first one, the second with its candidate `kept`.

    before: outputs of the layers before the pair. 2 K layer forwards, in the memory of one output of each layer.
    """
    first, second = pair
    given, own, ahead = first.prepare(before), list[float](), list[float]()
    for candidate in first.candidates:
        output = first.apply(given, candidate)
        own.append(errors[0](output))
        ahead.append(errors[1](second.apply(second.prepare((*before, output)), second.candidates[kept])))
    return own, ahead
