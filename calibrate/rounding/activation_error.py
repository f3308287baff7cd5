"""What rounding a shared input adds to the error of a block's output; by it inputs fall back to float.

The error counts in units of the block's output, so that it compares across all blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from qvlm_export.calibrate.numerics.matmul import matmul
from qvlm_export.calibrate.quantization.quantizer import squared_sum
from qvlm_export.calibrate.quantization.tokens import weigh_by_output

# What rounding a shared input to 8 bits may add to the block's output, as a share of its squared norm. Beyond it
# the input stays float; the weight takes the same bytes, but its product is one of float16.
MAX_ACTIVATION_ERROR = 1e-4
FALLBACK_BITS = 8  # with fewer, most inputs would stay float
PROBED_ROWS = 512  # input rows on which the rounding error of a shared input is measured


@dataclass(frozen=True)
class BlockOutput:
    """The output of the float block, as the unit of errors.

    weights: of all tokens, as `weigh_by_output` gives them, float32 [tokens]. energy: its squared norm with these weights.
    """

    weights: torch.Tensor
    energy: float


def measure_output(outputs: Sequence[torch.Tensor]) -> tuple[BlockOutput, list[torch.Tensor]]:
    """The unit of errors, and its token weights by batch, float32 [B, tokens].

    outputs: of the float block, batches float32 [B, tokens, width].
    """
    weights = weigh_by_output(outputs)
    energy = sum(squared_sum(y * w.sqrt()[..., None]) for y, w in zip(outputs, weights, strict=True))
    return BlockOutput(torch.cat([w.flatten() for w in weights]), energy), weights


def probed_rows(count: int) -> torch.Tensor:
    """Indices, int64, of at most PROBED_ROWS rows, evenly spread over all `count`."""
    return torch.linspace(0, count - 1, min(PROBED_ROWS, count)).long()


def measure_activation_error(rounding: torch.Tensor, weights: Iterable[torch.Tensor], output: BlockOutput) -> float:
    """What an error of the input adds to the block's output, as a share of its squared norm.

    rounding: the error at `probed_rows` of all tokens, float32 [rows, in]; weights: of the linears that read the input,
    float32 [out, in] each.
    """
    count = len(output.weights)
    roots = output.weights[probed_rows(count).to(output.weights.device)].sqrt()[:, None].to(rounding.device)
    weighted, share = rounding * roots, count / max(len(rounding), 1) / max(output.energy, 1e-30)
    return share * sum(squared_sum(matmul(weighted, weight.T)) for weight in weights)
