"""Offloading: loads one block at a time onto the computing device; on a GPU the next one is prefetched while it computes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn

from qvlm_export.calibrate.blockwise.blocks import Block, ModelBlocks, fill_block, load_block, load_finite
from qvlm_export.calibrate.checkpoint.tensor_source import TensorSource

CPU = torch.device("cpu")
# Gives a block's module with its weights on the device for as long as the context is open.
BlockLoader = Callable[[Block], AbstractContextManager[nn.Module]]


def move_tensors(device: torch.device, tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors on `device`; those that are there already are not copied."""
    return [tensor.to(device) for tensor in tensors]


@contextmanager
def open_block_loader(
    blocks: ModelBlocks, source: TensorSource, device: torch.device, backwards: bool = False
) -> Iterator[BlockLoader]:
    """A loader for blocks in the order they run, or in reverse order if `backwards`.

    On a CPU reading a block takes a hundredth of the time it computes, so nothing is prefetched and one block is in memory;
    on a GPU two are. Loading raises UserError naming the tensor when a weight is NaN or infinite.
    """
    if device.type == "cpu":
        yield lambda block: load_block(block, source)
        return
    with ThreadPoolExecutor(1) as uploader:
        order = blocks.all()
        yield _Prefetcher(order[::-1] if backwards else order, source, device, uploader).load


class _Prefetcher:
    """Holds the block that computes and uploads the one after it on another thread."""

    def __init__(
        self, order: Sequence[Block], source: TensorSource, device: torch.device, uploader: ThreadPoolExecutor
    ) -> None:
        self._next_block = dict(zip((block.prefix for block in order), order[1:], strict=False))
        self._source, self._device, self._uploader = source, device, uploader
        self._pending: dict[str, Future[dict[str, torch.Tensor]]] = {}

    @contextmanager
    def load(self, block: Block) -> Iterator[nn.Module]:
        """The block's module with its weights; raises UserError naming the tensor when a weight is NaN or infinite."""
        pending = self._pending.pop(block.prefix, None)
        state = self._upload(block) if pending is None else pending.result()
        if (next_block := self._next_block.get(block.prefix)) is not None:
            self._pending = {next_block.prefix: self._uploader.submit(self._upload, next_block)}
        with fill_block(block, state) as module:
            del state
            yield module

    def _upload(self, block: Block) -> dict[str, torch.Tensor]:
        names = [name for name, _ in block.module.named_parameters()]
        return {name: load_finite(self._source, f"{block.prefix}.{name}", self._device) for name in names}
