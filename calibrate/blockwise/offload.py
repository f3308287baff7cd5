"""Blocks in the memory of the device that computes; on a GPU the next is read and uploaded while one computes. torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn

from qvlm_export.calibrate.blockwise.batching import batch_by_length
from qvlm_export.calibrate.blockwise.blocks import Block, ModelBlocks, fill_block, load_block, load_finite
from qvlm_export.calibrate.blockwise.forward import Run, Step
from qvlm_export.calibrate.checkpoint.tensor_source import TensorSource

CPU = torch.device("cpu")
# A block -> its module with weights on the device, for as long as the context is open.
BlockLoader = Callable[[Block], AbstractContextManager[nn.Module]]


def move_tensors(device: torch.device, tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors in the memory of `device`; themselves where they are there already."""
    return [tensor.to(device) for tensor in tensors]


@contextmanager
def open_block_loader(
    blocks: ModelBlocks, source: TensorSource, device: torch.device, backwards: bool = False
) -> Iterator[BlockLoader]:
    """Makes blocks resident in the order they run, or the last first.

    On a CPU reading a block takes a hundredth of the time it computes, so nothing is read ahead and one block is in memory;
    on a GPU two are.
    """
    if device.type == "cpu":
        yield lambda block: load_block(block, source)
        return
    with ThreadPoolExecutor(1) as uploader:
        order = blocks.all()
        yield _Uploads(order[::-1] if backwards else order, source, device, uploader).resident


def batched_step(resident: BlockLoader, device: torch.device) -> Step:
    """A step that only computes, inputs of equal length together."""

    def step(block: Block, inputs: Sequence[torch.Tensor], run: Run) -> Sequence[torch.Tensor]:
        batches = batch_by_length(inputs)
        with resident(block) as module:
            return batches.split([run(module, x).cpu() for x in move_tensors(device, batches.merge(inputs))])

    return step


class _Uploads:
    """The block being computed, and the one behind it on its way."""

    def __init__(
        self, order: Sequence[Block], source: TensorSource, device: torch.device, uploader: ThreadPoolExecutor
    ) -> None:
        self._behind = dict(zip((block.prefix for block in order), order[1:], strict=False))
        self._source, self._device, self._uploader = source, device, uploader
        self._coming: dict[str, Future[dict[str, torch.Tensor]]] = {}

    @contextmanager
    def resident(self, block: Block) -> Iterator[nn.Module]:
        """Raises UserError naming the tensor when a weight is NaN or infinite."""
        coming = self._coming.pop(block.prefix, None)
        state = self._upload(block) if coming is None else coming.result()
        if (behind := self._behind.get(block.prefix)) is not None:
            self._coming = {behind.prefix: self._uploader.submit(self._upload, behind)}
        with fill_block(block, state) as module:
            del state
            yield module

    def _upload(self, block: Block) -> dict[str, torch.Tensor]:
        names = [name for name, _ in block.module.named_parameters()]
        return {name: load_finite(self._source, f"{block.prefix}.{name}", self._device) for name in names}
