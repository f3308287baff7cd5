"""Writes quantized blocks to the calibrated checkpoint, one shard each, and notes them in the work folder.

A calibrator hands over each block's quantized linears, changed float tensors, outputs and record. A run that was interrupted
continues with the blocks that are not finished yet.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from qvlm_export.calibrate.blockwise.activation_cache import CachedActivations
from qvlm_export.calibrate.blockwise.blocks import Block, check_finite
from qvlm_export.calibrate.blockwise.forward import Run, Step
from qvlm_export.calibrate.blockwise.job import CalibrationJob, Progress, check_output
from qvlm_export.calibrate.blockwise.resume import FinishedBlock
from qvlm_export.calibrate.checkpoint.calibrated import CalibratedWriter, QuantizedLinear

FALLBACKS = "fallbacks"  # key of a block's record: linears whose input stays float although their scheme quantizes it


class BlockWriter:
    """Writes one shard for each block, reports progress, and copies at the end the tensors that are in no block.

    records: the records of the finished blocks, those of an interrupted run first. Blocks that such a run finished are not
    computed again.
    """

    def __init__(self, job: CalibrationJob, writer: CalibratedWriter, progress: Progress) -> None:
        self._job, self._writer, self._progress = job, writer, progress
        self._done = 0
        self._written: set[str] = set()
        self.records: list[dict[str, Any]] = []
        self._values = {} if job.blocks.prefix is None else dict(enumerate(job.blocks.prefix.values))
        blocks = {b.prefix: b for b in job.blocks.all()}
        for entry in () if job.work is None else job.work.entries:
            block = blocks[entry.name]
            fallbacks = entry.record.get(FALLBACKS, ())
            schemes = {
                f"{block.prefix}.{name}": replace(scheme, activation_bits=None) if name in fallbacks else scheme
                for name, scheme in job.block_schemes(block).items()
            }
            writer.adopt_shard(entry.shard, schemes)
            self._load_values(block)
            self._add_finished(block, entry.record)

    def _load_values(self, block: Block) -> None:
        """Reads the prefix's values in a block that an interrupted run finished, if it changed them."""
        layer = self._job.blocks.layer_number(block)
        if layer is not None and self._job.work is not None and (saved := self._job.work.load(_values_name(layer))):
            self._values[layer] = saved["values"][0].numpy()

    def _set_values(self, block: Block, values: torch.Tensor) -> None:
        layer = self._job.blocks.layer_number(block)
        if layer is None:
            raise ValueError(f"{block.prefix} is no decoder layer")
        self._values[layer] = values[0].cpu().numpy()
        if self._job.work is not None:
            self._job.work.save(_values_name(layer), {"values": [values[0].cpu()]})

    def is_finished(self, block: Block) -> bool:
        """Whether the block is written, by this run or by an interrupted one."""
        return all(name in self._written for name in block.tensor_names())

    def skip_finished(self, step: Step) -> Step:
        """A step that returns the stored outputs of finished blocks and runs `step` for all others."""
        work = self._job.work
        if work is None:
            return step

        def resumable_step(block: Block, inputs: Sequence[torch.Tensor], run: Run) -> Sequence[torch.Tensor]:
            outputs = work.load_outputs(block.prefix)
            return step(block, inputs, run) if outputs is None else outputs

        return resumable_step

    def store_outputs(
        self, block: Block, outputs: Iterable[torch.Tensor], samples: Sequence[int] | None = None
    ) -> CachedActivations | list[torch.Tensor]:
        """Stores a block's outputs, each [n, tokens, width]; returns them as the next block has to read them.

        samples: the number of each output's sample, for all outputs or for half of them, where the rest repeats the order;
        None for the samples that reach the block. Raises UserError naming block and sample when an output is not finite.
        """
        checked = _iterate_checked(block, outputs, self._job.sample_numbers(block) if samples is None else samples)
        return list(checked) if self._job.work is None else self._job.work.store_outputs(checked)

    def write(
        self,
        block: Block,
        linears: Mapping[str, QuantizedLinear],
        changed: Mapping[str, np.ndarray] | None = None,
        *,
        outputs: CachedActivations | Sequence[torch.Tensor] = (),
        record: Mapping[str, Any] | None = None,
        prefix_values: torch.Tensor | None = None,
    ) -> None:
        """Writes a finished block's shard and notes the block as finished.

        linears: by name inside the block. changed: float tensors that differ from the source (equalized norms, biases), by
        name inside the block. outputs: as `store_outputs` returned them; empty when no later block needs them. record: for
        the calibration record. prefix_values: those of a decoder layer whose v_proj was equalized, float32
        [1, kv_heads, p, head_dim]; None where they did not change. Raises UserError naming the float tensor that holds NaN
        or infinity.
        """
        if prefix_values is not None:
            self._set_values(block, prefix_values)
        self.mark_finished(block, self.write_shard(block, linears, changed), outputs, record)

    def write_shard(
        self, block: Block, linears: Mapping[str, QuantizedLinear], changed: Mapping[str, np.ndarray] | None = None
    ) -> str:
        """Writes the shard and returns its name: the first half of `write`, which may run on several threads at once."""
        quantized = {f"{block.prefix}.{name}": linear for name, linear in linears.items()}
        floats = [n for n in block.tensor_names() if n.removesuffix(".weight") not in quantized]
        return self._write_tensors(
            block.prefix, quantized, floats, {f"{block.prefix}.{n}": a for n, a in (changed or {}).items()}
        )

    def mark_finished(
        self,
        block: Block,
        shard: str,
        outputs: CachedActivations | Sequence[torch.Tensor] = (),
        record: Mapping[str, Any] | None = None,
    ) -> None:
        """Notes the block of a written shard as finished: the second half of `write`, called in the order of the blocks."""
        if self._job.work is not None:
            description = outputs.describe() if isinstance(outputs, CachedActivations) else []
            blocks = self._job.blocks
            # A projector may read several layers of the tower, so their outputs stay until it is done.
            features = {layer.prefix for n, layer in enumerate(blocks.vision_layers, start=1) if n in blocks.features}
            needed = features if block in blocks.vision_layers else set()
            self._job.work.finish(FinishedBlock(block.prefix, shard, description, dict(record or {})), needed)
        self._add_finished(block, dict(record or {}))

    def _add_finished(self, block: Block, record: dict[str, Any]) -> None:
        self._written |= set(block.tensor_names())
        self.records.append(record)
        self._done += 1
        self._progress(self._done, self._job.blocks.num_blocks(), block.prefix)

    def write_rest(self) -> None:
        """Copies the tensors that are in no block, into one shard for each component of the model, and writes the prefix.

        These tensors are embeddings, norms, lm_head and unused vision layers.
        """
        prefix = self._job.blocks.prefix
        if prefix is not None:
            values = tuple(self._values[layer] for layer in range(len(prefix.values)))
            self._writer.write_prefix(replace(prefix, values=values), self._job.float_type)
        rest: dict[str, list[str]] = {}
        for name in self._job.source:
            if name not in self._written:
                rest.setdefault(name.partition(".")[0], []).append(name)
        for component, names in rest.items():
            self._write_tensors(f"{component}.rest", {}, names, {})

    def _write_tensors(
        self, block: str, linears: Mapping[str, QuantizedLinear], floats: list[str], changed: Mapping[str, np.ndarray]
    ) -> str:
        arrays = {name: changed[name] if name in changed else self._job.source.load(name) for name in floats}
        for name, array in arrays.items():
            check_finite(name, array)
        return self._writer.write_shard(block, linears, arrays)


def _values_name(layer: int) -> str:
    """The name under which the work folder keeps the prefix's values of a decoder layer."""
    return f"prefix-{layer:04}"


def _iterate_checked(block: Block, outputs: Iterable[torch.Tensor], samples: Sequence[int]) -> Iterator[torch.Tensor]:
    for number, output in enumerate(outputs):
        check_output(block, samples[number % len(samples)], output)
        yield output.cpu()


def stored_dtype(name: str, job: CalibrationJob) -> np.dtype:
    """The type in which a changed float tensor is stored: float32 where the source has that, else the graph's float type."""
    return np.dtype(np.float32) if job.source.dtype(name) == np.float32 else np.dtype(job.float_type)


def convert_to_stored_dtypes(
    tensors: Mapping[str, torch.Tensor], block: Block, job: CalibrationJob
) -> dict[str, np.ndarray]:
    """The changed float tensors of a block, by name inside it, in the types in which they are stored.

    Equalization rounded the gains of norms to that type; another would round them again.
    """
    return {name: t.cpu().numpy().astype(stored_dtype(f"{block.prefix}.{name}", job)) for name, t in tensors.items()}
