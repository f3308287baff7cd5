"""What every calibrator is given, and how it writes what it found, block by block. torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from calibrate.blocks import Block, ModelBlocks, check_finite
from calibrate.calibrated import CalibratedWriter, QuantizedLinear
from calibrate.errors import UserError
from calibrate.quantize import MAX_FLOAT16
from calibrate.samples import Sample
from calibrate.scheme import LinearScheme
from calibrate.tensors import TensorSource

# (blocks done, blocks in all, name of the block)
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Calibration:
    """What to calibrate: the model's blocks, its tensors, the scheme of each planned linear, the samples."""

    blocks: ModelBlocks
    source: TensorSource
    plan: Mapping[str, LinearScheme]
    samples: Sequence[Sample]

    def plan_of(self, block: Block) -> dict[str, LinearScheme]:
        """The planned linears of one block, by their names inside it."""
        start = f"{block.prefix}."
        return {name.removeprefix(start): s for name, s in self.plan.items() if name.startswith(start)}


class BlockWriter:
    """Writes one shard a block, counts blocks, and copies at the end whatever no block held."""

    def __init__(self, job: Calibration, writer: CalibratedWriter, progress: Progress) -> None:
        self._job, self._writer, self._progress = job, writer, progress
        self._done = 0
        self._written: set[str] = set()

    def write(
        self, block: Block, linears: Mapping[str, QuantizedLinear], changed: Mapping[str, np.ndarray] | None = None
    ) -> None:
        """linears: by name inside the block. changed: float tensors that differ from the source (folded norms, biases)."""
        quantized = {f"{block.prefix}.{name}": linear for name, linear in linears.items()}
        floats = [n for n in block.tensor_names() if n.removesuffix(".weight") not in quantized]
        self._shard(block.prefix, quantized, floats, {f"{block.prefix}.{n}": a for n, a in (changed or {}).items()})
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
    ) -> None:
        arrays = {name: changed[name] if name in changed else self._job.source.load(name) for name in floats}
        for name, array in arrays.items():
            check_finite(name, array)
        self._writer.write_shard(block, linears, arrays)
        self._written |= {*floats, *(f"{name}.weight" for name in linears)}


def check_outputs(block: Block, outputs: Sequence[torch.Tensor]) -> None:
    """Raises UserError naming block and batch when an activation is not finite."""
    for number, output in enumerate(outputs):
        if not torch.isfinite(output).all():
            raise UserError(f"{block.prefix}: activations of batch {number} are not finite; check the samples")


def check_weight(name: str, weight: torch.Tensor) -> None:
    """Raises UserError naming the linear when a weight does not fit into a float16 engine."""
    if float(weight.abs().max()) > MAX_FLOAT16:
        raise UserError(f"{name}.weight: holds values beyond float16's 65504, so it cannot be in a float16 engine")
