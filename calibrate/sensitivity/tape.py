"""Activation checkpointing: a tape of block outputs for the block-by-block backward pass through the float model.

The forward pass adds one entry for each block, and the backward pass takes the entries off again, last one first. Without a
work folder the whole tape is in memory. With one, block outputs are on disk and only those that the next block reads are in
memory; a run that was killed continues after the last block it finished, forwards or backwards, and ends in the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from qvlm_export.calibrate.blockwise.batching import Batches
from qvlm_export.calibrate.blockwise.blocks import Block, ModelBlocks, get_linear
from qvlm_export.calibrate.blockwise.forward import Run
from qvlm_export.calibrate.blockwise.resume import CalibrationWork, NamedTensors
from qvlm_export.calibrate.numerics.matmul import deterministic_small_matmul

MAX_GRAPH_BYTES = 2**29  # of weights and activations, up to which all blocks' autograd graphs are kept for the backward pass


@dataclass(frozen=True)
class RecordedForward:
    """One batch's forward pass through a block, with its autograd graph.

    x, output: float32 [B, tokens, width], what the block read and returned. linear_inputs, linear_outputs: float32
    [B, tokens, features], what each recorded linear read and returned, by its name inside the block.
    """

    x: torch.Tensor
    linear_inputs: dict[str, torch.Tensor]
    linear_outputs: dict[str, torch.Tensor]
    output: torch.Tensor

    def gradients(self, output_gradient: torch.Tensor, *, last: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The gradients by `x` and by each linear's output, of their shapes, given the gradient by the block's output.

        last: whether no further call follows, so that the graph is freed.
        """
        with deterministic_small_matmul(self.x):
            input_gradient, *linear_gradients = torch.autograd.grad(
                self.output,
                [self.x, *self.linear_outputs.values()],
                output_gradient,
                retain_graph=not last,
                materialize_grads=True,
            )
        return input_gradient, dict(zip(self.linear_outputs, linear_gradients, strict=True))


def record_forward(module: nn.Module, run: Run, x: torch.Tensor, names: Sequence[str]) -> RecordedForward:
    """Runs a block's module on one batch `x`, float32 [B, tokens, width], and records the linears `names` inside it."""
    block_input, inputs, outputs = x.detach().requires_grad_(), dict[str, torch.Tensor](), dict[str, torch.Tensor]()

    def make_hook(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], None]:
        def hook(_: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            inputs[name], outputs[name] = args[0].detach(), output

        return hook

    handles = [get_linear(module, name).register_forward_hook(make_hook(name)) for name in names]
    try:
        return RecordedForward(block_input, inputs, outputs, run(module, block_input))
    finally:
        for handle in handles:
            handle.remove()


def fits_in_memory(blocks: ModelBlocks, images: int, tokens: int) -> bool:
    """Whether the model and its inputs are so small that the backward pass does not have to compute any block again.

    Counts the weights of all linears, and what they read and return, against MAX_GRAPH_BYTES. images: how many the vision
    tower sees. tokens: how many all prompts have together in the decoder.
    """
    values = 0
    for block in blocks.all():
        linears = [layer for layer in block.module.modules() if isinstance(layer, nn.Linear)]
        rows = tokens if block in blocks.text_layers else images * blocks.num_patches()
        values += sum(x.weight.numel() + rows * (x.in_features + x.out_features) for x in linears)
    return 4 * values <= MAX_GRAPH_BYTES


@dataclass(frozen=True)
class TapeEntry:
    """A block's forward pass over all inputs.

    inputs: float32 [n, tokens, width] each; between two layers they are views of the preceding entry's leaves, not copies.
    leaves: the block's outputs, one tensor for each of `batches`, as autograd leaves that collect gradients. recorded: the
    forward pass of every batch, or empty when the backward pass has to compute the block again.
    """

    block: Block
    run: Run
    batches: Batches
    inputs: list[torch.Tensor]
    leaves: list[torch.Tensor]
    recorded: list[RecordedForward]


class Tape:
    """The entries of one forward pass, which the backward pass takes off, last one first.

    name: the prefix of the tape's file names in the work folder.
    """

    def __init__(self, blocks: ModelBlocks, work: CalibrationWork | None, name: str) -> None:
        self.entries: list[TapeEntry] = []
        self._work, self._name, self._resuming = work, name, False
        # Blocks whose outputs are read by the next block only: their leaves can leave memory after it.
        read_once = [layer for n, layer in enumerate(blocks.vision_layers, start=1) if n not in blocks.features]
        self._read_once = {block.prefix for block in (*read_once, *blocks.text_layers[:-1])}

    def load_outputs(self) -> list[torch.Tensor] | None:
        """The next block's outputs, one tensor a batch, if an interrupted run saved them; else None."""
        saved = self._load("there", len(self.entries))
        # Copies, so that their alignment does not depend on where they come from: last bits of products may depend on it.
        return None if saved is None else [leaf.clone() for leaf in _get_leaves(saved)]

    def add(self, entry: TapeEntry, *, restored: bool) -> None:
        """Appends an entry. restored: whether its leaves are from `load_outputs`, so that they are on disk already."""
        number = len(self.entries)
        if self._work is not None and not restored:
            self._work.save(self._file_name("there", number), {"leaves": [leaf.detach() for leaf in entry.leaves]})
        if self._work is not None and number and self.entries[-1].block.prefix in self._read_once:
            for leaf in self.entries[-1].leaves:
                leaf.untyped_storage().resize_(0)
        self.entries.append(entry)

    def backward_started(self) -> bool:
        """Whether an interrupted run had finished the last entry's backward pass."""
        return self.load_result() is not None

    def load_result(self) -> NamedTensors | None:
        """The result that an interrupted run's backward pass saved for the last entry; None when there is none."""
        return self._load("back", len(self.entries) - 1)

    def last(self) -> TapeEntry:
        """The last entry, its inputs in memory and the gradients in its leaves."""
        number = len(self.entries) - 1
        if self._work is not None and number and self.entries[number - 1].block.prefix in self._read_once:
            self._restore_leaves(number - 1)
        if self._resuming:
            for key, (gradient,) in (self._load("pending", number + 1) or {}).items():
                entry, batch = map(int, key.split("."))
                self.entries[entry].leaves[batch].grad = gradient.clone()
        return self.entries[-1]

    def pop(self, result: NamedTensors | None = None) -> None:
        """Removes the last entry and saves the result of its backward pass; None when `load_result` returned that."""
        self.entries.pop()
        number, self._resuming = len(self.entries), result is None
        if self._work is None or result is None:
            return
        pending = {
            f"{n:04}.{batch:04}": [leaf.grad]
            for n, entry in enumerate(self.entries)
            for batch, leaf in enumerate(entry.leaves)
            if leaf.grad is not None
        }
        self._work.save(self._file_name("pending", number), pending)
        self._work.save(self._file_name("back", number), result)
        self._work.delete(self._file_name("pending", number + 1))

    def _restore_leaves(self, number: int) -> None:
        saved = self._load("there", number)
        assert saved is not None  # `add` saved them before the next block's entry came
        for leaf, content in zip(self.entries[number].leaves, _get_leaves(saved), strict=True):
            leaf.untyped_storage().resize_(leaf.nbytes)
            leaf.data.copy_(content)  # unseen by autograd, which is safe because no graph saved these leaves

    def _load(self, kind: str, number: int) -> NamedTensors | None:
        return None if self._work is None else self._work.load(self._file_name(kind, number))

    def _file_name(self, kind: str, number: int) -> str:
        """kind: "there" for outputs, "back" for backward results, "pending" for the leaves' gradients after those."""
        return f"{self._name}-{kind}-{number:04}"


def _get_leaves(saved: NamedTensors) -> list[torch.Tensor]:
    """A saved entry's leaves; none where no sample of the part reaches the block, as text-only samples do not the tower."""
    return saved.get("leaves", [])


def delete_tape(work: CalibrationWork | None, name: str) -> None:
    """Deletes all files of the tape `name` from the work folder, if there is one."""
    if work is not None:
        work.delete_all(f"{name}-")
