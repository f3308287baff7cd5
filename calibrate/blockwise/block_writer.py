"""writes quantized blocks, one shard each"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from qvlm_export.calibrate.blockwise.activation_cache import CachedActivations
from qvlm_export.calibrate.blockwise.blocks import Block, check_finite
from qvlm_export.calibrate.blockwise.forward import Run, Step
from qvlm_export.calibrate.blockwise.job import CalibrationJob, Progress, _check_output
from qvlm_export.calibrate.blockwise.resume import FinishedBlock
from qvlm_export.calibrate.checkpoint.calibrated import CalibratedWriter, QuantizedLinear


class BlockWriter:
    """Writes one shard a block, counts blocks, and copies at the end whatever no block held.

    records: of the blocks so far, those of an interrupted run first. Blocks that such a run finished are not computed again.
    """

    def __init__(self, job: CalibrationJob, writer: CalibratedWriter, progress: Progress) -> None:
        self._job, self._writer, self._progress = job, writer, progress
        self._done = 0
        self._written: set[str] = set()
        self.records: list[dict[str, Any]] = []
        blocks = {b.prefix: b for b in job.blocks.all()}
        for entry in () if job.work is None else job.work.entries:
            block = blocks[entry.name]
            schemes = {f"{block.prefix}.{name}": scheme for name, scheme in job.block_schemes(block).items()}
            writer.adopt_shard(entry.shard, schemes)
            self._finished(block, entry.record)

    def finished(self, block: Block) -> bool:
        """Whether the block was written, now or by the interrupted run."""
        return all(name in self._written for name in block.tensor_names())

    def resumable(self, step: Step) -> Step:
        """The step, not computed for finished blocks: what they returned is known."""
        work = self._job.work
        if work is None:
            return step

        def resumed(block: Block, inputs: Sequence[torch.Tensor], run: Run) -> Sequence[torch.Tensor]:
            outputs = work.outputs(block.prefix)
            return step(block, inputs, run) if outputs is None else outputs

        return resumed

    def store_outputs(
        self, block: Block, outputs: Iterable[torch.Tensor], samples: Sequence[int] | None = None
    ) -> CachedActivations | list[torch.Tensor]:
        """The outputs of a block as they are to be gone on with. Raises UserError when one is not finite.

        samples: the number of the sample that each is of, once or twice over; None for those that the block is shown.
        """
        checked = _checked(block, outputs, self._job.sample_numbers(block) if samples is None else samples)
        return list(checked) if self._job.work is None else self._job.work.store_outputs(checked)

    def write(
        self,
        block: Block,
        linears: Mapping[str, QuantizedLinear],
        changed: Mapping[str, np.ndarray] | None = None,
        *,
        outputs: CachedActivations | Sequence[torch.Tensor] = (),
        record: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes a finished block.

        linears: by name inside the block. changed: float tensors that differ from the source (folded norms, biases).
        outputs: as `store_outputs` gave them, none when no later block needs them.
        """
        self.note(block, self.write_shard(block, linears, changed), outputs, record)

    def write_shard(
        self, block: Block, linears: Mapping[str, QuantizedLinear], changed: Mapping[str, np.ndarray] | None = None
    ) -> str:
        """The first half of `write`, which may be done on several threads; returns the shard's name."""
        quantized = {f"{block.prefix}.{name}": linear for name, linear in linears.items()}
        floats = [n for n in block.tensor_names() if n.removesuffix(".weight") not in quantized]
        return self._shard(block.prefix, quantized, floats, {f"{block.prefix}.{n}": a for n, a in (changed or {}).items()})

    def note(
        self,
        block: Block,
        shard: str,
        outputs: CachedActivations | Sequence[torch.Tensor] = (),
        record: Mapping[str, Any] | None = None,
    ) -> None:
        """The second half of `write`, in the order of the blocks."""
        if self._job.work is not None:
            described = outputs.described() if isinstance(outputs, CachedActivations) else []
            blocks = self._job.blocks
            # A projector may read several layers of the tower: their outputs stay until it is done.
            features = {layer.prefix for n, layer in enumerate(blocks.vision_layers, start=1) if n in blocks.features}
            needed = features if block in blocks.vision_layers else set()
            self._job.work.finish(FinishedBlock(block.prefix, shard, described, dict(record or {})), needed)
        self._finished(block, dict(record or {}))

    def _finished(self, block: Block, record: dict[str, Any]) -> None:
        self._written |= set(block.tensor_names())
        self.records.append(record)
        self._done += 1
        self._progress(self._done, self._job.blocks.num_blocks(), block.prefix)

    def write_rest(self) -> None:
        """Copies what no block holds (embeddings, norms, lm_head, unused vision layers), a shard for each component."""
        left: dict[str, list[str]] = {}
        for name in self._job.source:
            if name not in self._written:
                left.setdefault(name.partition(".")[0], []).append(name)
        for component, names in left.items():
            self._shard(f"{component}.rest", {}, names, {})

    def _shard(
        self, block: str, linears: Mapping[str, QuantizedLinear], floats: list[str], changed: Mapping[str, np.ndarray]
    ) -> str:
        arrays = {name: changed[name] if name in changed else self._job.source.load(name) for name in floats}
        for name, array in arrays.items():
            check_finite(name, array)
        return self._writer.write_shard(block, linears, arrays)


def _checked(block: Block, outputs: Iterable[torch.Tensor], samples: Sequence[int]) -> Iterator[torch.Tensor]:
    for number, output in enumerate(outputs):
        _check_output(block, samples[number % len(samples)], output)
        yield output.cpu()
