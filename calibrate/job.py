"""What every calibrator is given, and how it writes what it found, block by block. torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from calibrate.activations import Activations
from calibrate.blocks import Block, ModelBlocks, check_finite
from calibrate.calibrated import CalibratedWriter, QuantizedLinear
from calibrate.errors import UserError
from calibrate.quantize import MAX_FLOAT16
from calibrate.residents import CPU
from calibrate.samples import Sample
from calibrate.scheme import LinearScheme
from calibrate.tensors import TensorSource
from calibrate.walk import Run, Step
from calibrate.work import Entry, Work

# (blocks done, blocks in all, name of the block)
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Calibration:
    """What to calibrate: the model's blocks, its tensors, the scheme of each planned linear, the samples.

    work: where finished blocks are noted, and found again; None for a calibration that starts and ends in one go. device:
    where blocks compute; what lies between them is in the memory of the host.
    """

    blocks: ModelBlocks
    source: TensorSource
    plan: Mapping[str, LinearScheme]
    samples: Sequence[Sample]
    work: Work | None = None
    device: torch.device = CPU

    def shown(self, block: Block) -> list[int]:
        """The number of the sample that each input of a block is of: tower and projector see only those with pictures."""
        everyone = block in self.blocks.text_layers
        return [number for number, sample in enumerate(self.samples) if everyone or len(sample.pixel_values)]

    def plan_of(self, block: Block) -> dict[str, LinearScheme]:
        """The planned linears of one block, by their names inside it."""
        start = f"{block.prefix}."
        return {name.removeprefix(start): s for name, s in self.plan.items() if name.startswith(start)}


def asks_for_pictures(blocks: ModelBlocks, plan: Mapping[str, LinearScheme], *, searched: bool) -> str | None:
    """A planned linear of tower or projector whose quantization depends on samples; None when there is none.

    searched: whether weights do, too, and not only ranges of activations.
    """
    for block in (*blocks.vision_layers, blocks.projector):
        for name, scheme in plan.items():
            if name.startswith(f"{block.prefix}.") and (searched or scheme.activation_bits is not None):
                return name
    return None


class BlockWriter:
    """Writes one shard a block, counts blocks, and copies at the end whatever no block held.

    records: of the blocks so far, those of an interrupted run first. Blocks that such a run finished are not computed again.
    """

    def __init__(self, job: Calibration, writer: CalibratedWriter, progress: Progress) -> None:
        self._job, self._writer, self._progress = job, writer, progress
        self._done = 0
        self._written: set[str] = set()
        self.records: list[dict[str, Any]] = []
        blocks = {b.prefix: b for b in (*job.blocks.vision_layers, job.blocks.projector, *job.blocks.text_layers)}
        for entry in () if job.work is None else job.work.entries:
            block = blocks[entry.name]
            schemes = {f"{block.prefix}.{name}": scheme for name, scheme in job.plan_of(block).items()}
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

    def keep(
        self, block: Block, outputs: Iterable[torch.Tensor], samples: Sequence[int] | None = None
    ) -> Activations | list[torch.Tensor]:
        """The outputs of a block as they are to be gone on with. Raises UserError when one is not finite.

        samples: the number of the sample that each is of, once or twice over; None for those that the block is shown.
        """
        checked = _checked(block, outputs, self._job.shown(block) if samples is None else samples)
        return list(checked) if self._job.work is None else self._job.work.keep(checked)

    def write(
        self,
        block: Block,
        linears: Mapping[str, QuantizedLinear],
        changed: Mapping[str, np.ndarray] | None = None,
        *,
        outputs: Activations | Sequence[torch.Tensor] = (),
        record: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes a finished block.

        linears: by name inside the block. changed: float tensors that differ from the source (folded norms, biases).
        outputs: as `keep` gave them, none when no later block needs them.
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
        outputs: Activations | Sequence[torch.Tensor] = (),
        record: Mapping[str, Any] | None = None,
    ) -> None:
        """The second half of `write`, in the order of the blocks."""
        if self._job.work is not None:
            described = outputs.described() if isinstance(outputs, Activations) else []
            blocks = self._job.blocks
            # A projector may read several layers of the tower: their outputs stay until it is done.
            features = {layer.prefix for n, layer in enumerate(blocks.vision_layers, start=1) if n in blocks.features}
            needed = features if block in blocks.vision_layers else set()
            self._job.work.finish(Entry(block.prefix, shard, described, dict(record or {})), needed)
        self._finished(block, dict(record or {}))

    def _finished(self, block: Block, record: dict[str, Any]) -> None:
        self._written |= set(block.tensor_names())
        self.records.append(record)
        self._done += 1
        self._progress(self._done, self._job.blocks.count(), block.prefix)

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


def check_outputs(block: Block, outputs: Iterable[torch.Tensor], samples: Sequence[int]) -> None:
    """Raises UserError naming block and sample when an activation is not finite. samples: as of `BlockWriter.keep`."""
    for number, output in enumerate(outputs):
        _check_output(block, samples[number % len(samples)], output)


def _check_output(block: Block, sample: int, output: torch.Tensor) -> None:
    if not is_finite(output):
        raise not_finite(block.prefix, sample)


def is_finite(values: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    return not values.numel() or all(math.isfinite(bound) for bound in values.aminmax())  # both NaN if any value is


def not_finite(layer: str, sample: int, largest: float | None = None) -> UserError:
    """What to say of activations of the sample with this number. largest: where they are, but too large to be squared."""
    wrong = "are not finite" if largest is None else f"reach {largest:.0e}, which is too large to calibrate on"
    return UserError(
        f"{layer}: activations of sample {sample + 1} {wrong}; look at its picture and its text, or leave it out"
    )


def check_weight(name: str, weight: torch.Tensor) -> None:
    """Raises UserError naming the linear when a weight does not fit into a float16 engine."""
    if max(abs(float(bound)) for bound in weight.aminmax()) > MAX_FLOAT16:
        raise UserError(f"{name}.weight: holds values beyond float16's 65504, so it cannot be in a float16 engine")
