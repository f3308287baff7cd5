"""Training rows: one picture with several questions in one sequence, each of which sees the picture and itself only.

Positions restart after the picture, so a row is equivalent to as many single-turn prompts, at the cost of one picture.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerFast

from qvlm_export.checkpoints.chat_templates import chat_text
from tools.smol.parts.model import IMAGE_TOKENS
from tools.tiny.scenes import Question

PADDING = -1  # segment of padding


@dataclass(frozen=True)
class Row:
    """One packed row; all lists have its length.

    segments: 0 for the text around the picture that all questions share, 1.. for the questions. weights: of a token in the
    loss, 1 / sqrt(tokens of its answer) for tokens of an answer, else 0; unweighted, long descriptions would dominate.
    """

    token_ids: list[int]
    positions: list[int]
    segments: list[int]
    weights: list[float]


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right. ids, positions: int64 [B, L]; mask: bool [B, 1, L, L]; weights: float32 [B, L]."""

    ids: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    weights: torch.Tensor


class Packer:
    """Packs questions with the processor's chat template; caches the token ids of strings."""

    def __init__(self, processor: object, tokenizer: PreTrainedTokenizerFast) -> None:
        text = chat_text(processor, [{"role": "user", "text": "?", "images": 1}])
        shared, self._end = text.split("?")
        image = tokenizer.convert_tokens_to_ids("<image>")
        self._encode = functools.lru_cache(maxsize=100_000)(lambda t: tuple(tokenizer.encode(t, add_special_tokens=False)))
        self._eos = tokenizer.eos_token_id
        self.shared: list[int] = []
        for token in self._encode(shared):
            self.shared += [token] * (IMAGE_TOKENS if token == image else 1)

    def row(self, questions: Sequence[Question]) -> Row:
        """The row of a picture with its questions and answers; a space precedes an answer, as in calibration files."""
        start = len(self.shared)
        ids, positions, segments = list(self.shared), list(range(start)), [0] * start
        weights = [0.0] * start
        for number, question in enumerate(questions, start=1):
            prompt = self._encode(question.text + self._end)
            answer = (*self._encode(f" {question.answer}"), self._eos)
            ids += [*prompt, *answer]
            positions += range(start, start + len(prompt) + len(answer))
            segments += [number] * (len(prompt) + len(answer))
            weights += [0.0] * len(prompt) + [len(answer) ** -0.5] * len(answer)
        return Row(ids, positions, segments, weights)


def visible(segments: torch.Tensor) -> torch.Tensor:
    """The mask bool [B, L, L] of segments [B, L]: a token sees what is before it in segment 0 and in its own segment."""
    length = segments.shape[1]
    same = (segments[:, :, None] == segments[:, None, :]) | (segments[:, None, :] == 0)
    return same & torch.ones(length, length, dtype=torch.bool).tril()


def collate(rows: Sequence[Row]) -> Batch:
    """The rows as one batch. Padding sees only itself and what is before it in the padding and in segment 0."""
    length = max(len(row.token_ids) for row in rows)

    def pad(values: list[list[int]] | list[list[float]], filler: float) -> torch.Tensor:
        return torch.tensor([[*row, *([filler] * (length - len(row)))] for row in values])

    segments = pad([row.segments for row in rows], PADDING)
    return Batch(
        pad([row.token_ids for row in rows], 0),
        pad([row.positions for row in rows], 0),
        visible(segments)[:, None],
        pad([row.weights for row in rows], 0.0),
    )
