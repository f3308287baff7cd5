"""Batching by length: inputs with equally many tokens run together, without padding.

A block is then called a few times instead of once for each input.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

BATCH_TOKENS = 4096  # at most so many in one batch; a single longer input runs alone
_T = TypeVar("_T")


@dataclass(frozen=True)
class Batches:
    """Which inputs each batch holds.

    members: for each batch the numbers of its inputs. counts: for each input its size in the first dimension.
    """

    members: tuple[tuple[int, ...], ...]
    counts: tuple[int, ...]

    def merge(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Concatenates inputs [n_i, tokens, width] to batches [sum of n_i, tokens, width]."""
        return list(self.iter_merged(inputs))

    def iter_merged(self, inputs: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Yields the batches that `merge` returns, one at a time."""
        return (torch.cat([inputs[i] for i in batch]) for batch in self.members)

    def split(self, merged: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Splits batches [sum of n_i, ...] into tensors [n_i, ...] in the order of the inputs."""
        outputs: dict[int, torch.Tensor] = {}
        for batch, tensor in zip(self.members, merged, strict=True):
            parts = tensor.split([self.counts[i] for i in batch])
            outputs |= dict(zip(batch, parts, strict=True))
        return [outputs[i] for i in range(len(self.counts))]


def batch_by_length(inputs: Sequence[torch.Tensor]) -> Batches:
    """Groups inputs [n, tokens, width] of equal `tokens` into batches of up to BATCH_TOKENS tokens.

    Batches are in the order of their first inputs.
    """
    open_batches: dict[int, list[int]] = {}
    members: list[list[int]] = []
    for number, tensor in enumerate(inputs):
        length = tensor.shape[1]
        batch = open_batches.get(length)
        if batch is None or sum(inputs[i].shape[0] for i in batch) * length + tensor.shape[:2].numel() > BATCH_TOKENS:
            batch = open_batches[length] = []
            members.append(batch)
        batch.append(number)
    return Batches(tuple(tuple(batch) for batch in members), tuple(t.shape[0] for t in inputs))


def split_by_size(items: Sequence[_T], sizes: Sequence[int], max_size: int) -> Iterator[list[_T]]:
    """Yields consecutive items whose sizes add up to at most `max_size`, as many as possible; a larger item comes alone."""
    part: list[_T] = []
    total = 0
    for item, size in zip(items, sizes, strict=True):
        if part and total + size > max_size:
            yield part
            part, total = [], 0
        part.append(item)
        total += size
    if part:
        yield part
