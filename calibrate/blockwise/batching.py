"""Inputs of equal shape run together: a block is called a few times instead of once a sample. torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

BATCH_TOKENS = 4096  # of one call; a single longer input runs alone
_T = TypeVar("_T")


@dataclass(frozen=True)
class Batches:
    """Where each input lies: members[b] are the numbers of the inputs in batch b, counts[i] how many rows input i has."""

    members: tuple[tuple[int, ...], ...]
    counts: tuple[int, ...]

    def merge(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Inputs [n_i, tokens, width] -> batches [sum of n_i, tokens, width]."""
        return list(self.iter_merged(inputs))

    def iter_merged(self, inputs: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        """As `merge`, one at a time."""
        return (torch.cat([inputs[i] for i in batch]) for batch in self.members)

    def split(self, merged: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Batches -> outputs in the order of the inputs."""
        outputs: dict[int, torch.Tensor] = {}
        for batch, tensor in zip(self.members, merged, strict=True):
            parts = tensor.split([self.counts[i] for i in batch])
            outputs |= dict(zip(batch, parts, strict=True))
        return [outputs[i] for i in range(len(self.counts))]


def batch_by_length(inputs: Sequence[torch.Tensor]) -> Batches:
    """Groups inputs [n, tokens, width] of equal tokens, in the order of their first member, up to BATCH_TOKENS."""
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


def split_by_size(things: Sequence[_T], sizes: Sequence[int], most: int) -> Iterator[list[_T]]:
    """As many things at a time, in order, as have no more than `most` together; a single larger one goes alone."""
    part: list[_T] = []
    total = 0
    for thing, size in zip(things, sizes, strict=True):
        if part and total + size > most:
            yield part
            part, total = [], 0
        part.append(thing)
        total += size
    if part:
        yield part
