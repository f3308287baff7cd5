"""Token kinds: which tokens of a sample are image, prompt and answer tokens."""

from __future__ import annotations

from enum import IntEnum

import torch

from qvlm_export.calibrate.checkpoint.samples import Sample


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
