"""Tokens of a sample: their kinds (image, prompt, answer), and how much the error at each of them counts.

A massive activation makes the residual at one token thousands of times that at others (Sun et al. 2024, arXiv 2402.17762).
The norm of the next block divides every token by its own size, so an error counts by the size of what it is added to. A
plain sum of squares over all tokens would only say how that single token fares.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import torch

from qvlm_export.calibrate.checkpoint.samples import Sample

MIN_MEAN_SQUARE = 1e-12  # of a block's output at one token


class TokenLabel(IntEnum):
    """The kind of a token. Inside the vision tower all tokens are image tokens."""

    IMAGE = 0
    PROMPT = 1
    ANSWER = 2


ALL_LABELS = tuple(TokenLabel)


def label_tokens(sample: Sample, image_token_id: int) -> torch.Tensor:
    """The TokenLabel of every token of a sample, int64 [S]."""
    ids = torch.from_numpy(sample.input_ids)
    labels = torch.full(ids.shape, int(TokenLabel.PROMPT))
    labels[sample.answer_start :] = int(TokenLabel.ANSWER)
    labels[ids == image_token_id] = int(TokenLabel.IMAGE)
    return labels


def weigh_by_output(outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Token weights float32 [B, tokens] of every batch, of mean 1: one over the mean square of the block's output.

    outputs: of the float block, batches float32 [B, tokens, width].
    """
    weights = [1 / y.square().mean(-1).clamp(min=MIN_MEAN_SQUARE) for y in outputs]
    count = max(sum(w.numel() for w in weights), 1)
    mean = sum(float(w.double().sum()) for w in weights) / count
    return [w / mean for w in weights]


def token_errors(output: torch.Tensor, float_output: torch.Tensor) -> torch.Tensor:
    """Squared error of a block's output at every token, relative to the squared norm of the float output there.

    output, float_output: float32 [.., tokens, width]; the result is float32 [.., tokens].
    """
    squares = (output - float_output).square().mean(-1), float_output.square().mean(-1)
    return squares[0] / squares[1].clamp(min=MIN_MEAN_SQUARE)


def mean_token_error(outputs: Sequence[torch.Tensor], float_outputs: Sequence[torch.Tensor]) -> float:
    """The mean of `token_errors` over all tokens of all batches [B, tokens, width]; 0 without tokens."""
    errors = [token_errors(a, b) for a, b in zip(outputs, float_outputs, strict=True)]
    return sum(float(e.double().sum()) for e in errors) / max(sum(e.numel() for e in errors), 1)
