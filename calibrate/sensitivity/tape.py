"""There and back through the float model: what flowed between its blocks is kept for the way back. torch.

Without a work folder all of it is in memory. With one it lies there, only what the next block reads is in memory, and a run
that was killed goes on behind the last block it had passed, on either way, to the same bits.
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

MAX_GRAPH_BYTES = 2**29  # of all that a forward pass computes, up to which it is kept for the way back


@dataclass(frozen=True)
class RecordedForward:
    """One batch through a block, for its gradients: what went in, what each linear read and gave, by name inside the block,
    and what came out."""

    x: torch.Tensor
    read: dict[str, torch.Tensor]
    given: dict[str, torch.Tensor]
    out: torch.Tensor

    def gradients(self, of_out: torch.Tensor, *, last: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """By x and by what each linear gave, for those of `out`. last: nobody asks again."""
        with deterministic_small_matmul(self.x):
            first, *others = torch.autograd.grad(
                self.out, [self.x, *self.given.values()], of_out, retain_graph=not last, materialize_grads=True
            )
        return first, dict(zip(self.given, others, strict=True))


def record_forward(module: nn.Module, run: Run, x: torch.Tensor, names: Sequence[str]) -> RecordedForward:
    """x: float32 [B, tokens, width]. names: of the linears that are asked for."""
    inside, read, given = x.detach().requires_grad_(), dict[str, torch.Tensor](), dict[str, torch.Tensor]()

    def keeper(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], None]:
        def hook(_: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            read[name], given[name] = args[0].detach(), output

        return hook

    handles = [get_linear(module, name).register_forward_hook(keeper(name)) for name in names]
    try:
        return RecordedForward(inside, read, given, run(module, inside))
    finally:
        for handle in handles:
            handle.remove()


def fits_in_memory(blocks: ModelBlocks, pictures: int, tokens: int) -> bool:
    """Whether the model and its inputs are so small that nothing has to be computed again on the way back.

    By what linears read and make, and their weights. tokens: of all prompts in the decoder.
    """
    values = 0
    for block in blocks.all():
        linears = [layer for layer in block.module.modules() if isinstance(layer, nn.Linear)]
        seen = tokens if block in blocks.text_layers else pictures * blocks.num_patches()
        values += sum(x.weight.numel() + seen * (x.in_features + x.out_features) for x in linears)
    return 4 * values <= MAX_GRAPH_BYTES


@dataclass(frozen=True)
class TapeEntry:
    """A block that ran: its inputs, parts of the leaves before it, which lie in memory once, and the leaves that its outputs
    became, one a batch. passed: every batch, or none where it has to be computed again."""

    block: Block
    run: Run
    batches: Batches
    inputs: list[torch.Tensor]
    leaves: list[torch.Tensor]
    passed: list[RecordedForward]


class Tape:
    """The visits of one way there, the last of which is taken back first. name: of its files in the work folder."""

    def __init__(self, blocks: ModelBlocks, work: CalibrationWork | None, name: str) -> None:
        self.visits: list[TapeEntry] = []
        self._work, self._name, self._skipped = work, name, False
        # Blocks whose outputs nobody but the block behind them reads.
        passing = [layer for n, layer in enumerate(blocks.vision_layers, start=1) if n not in blocks.features]
        self._passing = {block.prefix for block in (*passing, *blocks.text_layers[:-1])}

    def known(self) -> list[torch.Tensor] | None:
        """Outputs of the next block, where an interrupted run came past it."""
        recalled = self._recalled("there", len(self.visits))
        # In memory of their own: aligned alike wherever they come from, as last bits of products may depend on it.
        return None if recalled is None else [leaf.clone() for leaf in _leaves(recalled)]

    def add(self, visit: TapeEntry, *, known: bool) -> None:
        """Behind the others. known: by an interrupted run."""
        number = len(self.visits)
        if self._work is not None and not known:
            self._work.save(self._file("there", number), {"leaves": [leaf.detach() for leaf in visit.leaves]})
        if self._work is not None and number and self.visits[-1].block.prefix in self._passing:
            for leaf in self.visits[-1].leaves:
                leaf.untyped_storage().resize_(0)
        self.visits.append(visit)

    def turned(self) -> bool:
        """Whether an interrupted run had begun the way back."""
        return self.found() is not None

    def found(self) -> NamedTensors | None:
        """What an interrupted run found at the last visit on the way back; None when it had not come there."""
        return self._recalled("back", len(self.visits) - 1)

    def last(self) -> TapeEntry:
        """The last visit, its inputs in memory, its leaves with their gradients."""
        number = len(self.visits) - 1
        if self._work is not None and number and self.visits[number - 1].block.prefix in self._passing:
            self._take_out(number - 1)
        if self._skipped:
            for key, (gradient,) in (self._recalled("pending", number + 1) or {}).items():
                visit, place = map(int, key.split("."))
                self.visits[visit].leaves[place].grad = gradient.clone()
        return self.visits[-1]

    def leave(self, found: NamedTensors | None = None) -> None:
        """Takes the last visit away. found: there, on the way back; None when that was known already."""
        self.visits.pop()
        number, self._skipped = len(self.visits), found is None
        if self._work is None or found is None:
            return
        pending = {
            f"{visit:04}.{place:04}": [leaf.grad]
            for visit, passed in enumerate(self.visits)
            for place, leaf in enumerate(passed.leaves)
            if leaf.grad is not None
        }
        self._work.save(self._file("pending", number), pending)
        self._work.save(self._file("back", number), found)
        self._work.delete(self._file("pending", number + 1))

    def _take_out(self, number: int) -> None:
        recalled = self._recalled("there", number)
        assert recalled is not None  # written when the block behind it was visited
        for leaf, content in zip(self.visits[number].leaves, _leaves(recalled), strict=True):
            leaf.untyped_storage().resize_(leaf.nbytes)
            leaf.data.copy_(content)  # nobody kept them for a gradient, so that autograd need not be told

    def _recalled(self, way: str, number: int) -> NamedTensors | None:
        return None if self._work is None else self._work.load(self._file(way, number))

    def _file(self, way: str, number: int) -> str:
        return f"{self._name}-{way}-{number:04}"


def _leaves(recalled: NamedTensors) -> list[torch.Tensor]:
    """Of a visit; none where no sample of its part came to the block, as texts without pictures do not to the tower."""
    return recalled.get("leaves", [])


def delete_tape(work: CalibrationWork | None, name: str) -> None:
    """Deletes its files."""
    if work is not None:
        work.delete_all(f"{name}-")
