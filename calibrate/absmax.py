"""The first calibrator: absolute maxima over the samples, round to nearest. torch.

Blocks stream through memory one at a time; each is read once, run on all samples, quantized, written to its own shard
of the calibrated checkpoint and forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from calibrate.blocks import Block, ModelBlocks, load_finite, resident
from calibrate.calibrated import CalibratedWriter, QuantizedLinear
from calibrate.errors import UserError
from calibrate.quantize import MAX_FLOAT16, quantize_linear
from calibrate.samples import Sample
from calibrate.scheme import LinearScheme
from calibrate.tensors import TensorSource
from calibrate.walk import Run, walk_language, walk_vision

# (blocks done, blocks in all, name of the block)
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Calibration:
    """What to calibrate: the model's blocks, its tensors, the scheme of each planned linear, the samples."""

    blocks: ModelBlocks
    source: TensorSource
    plan: Mapping[str, LinearScheme]
    samples: Sequence[Sample]


def calibrate_absmax(job: Calibration, writer: CalibratedWriter, progress: Progress) -> dict[str, Any]:
    """Quantizes every planned linear into `writer`'s folder; returns the summary for the record.

    Raises UserError naming tensor or layer when weights or activations are not finite.
    """
    stepper = _Stepper(job, writer, progress)
    features = walk_vision(job.blocks, job.source, job.samples, stepper.step)
    walk_language(job.blocks, job.source, job.samples, features, stepper.step)
    stepper.leftovers()
    return {"method": "absmax", "samples": len(job.samples), "tokens": sum(len(s.input_ids) for s in job.samples)}


class _Stepper:
    """What happens at each block: run, watch, quantize, write. Counts blocks and remembers what it has written."""

    def __init__(self, job: Calibration, writer: CalibratedWriter, progress: Progress) -> None:
        self._job, self._writer, self._progress = job, writer, progress
        self._done = 0
        self._written: set[str] = set()

    def step(self, block: Block, inputs: list[torch.Tensor], run: Run) -> list[torch.Tensor]:
        """Runs one block on all inputs, quantizes it from what it saw, and returns its float outputs."""
        job = self._job
        with resident(block, job.source) as module, torch.inference_mode():
            with _input_amax(module) as amax:
                outputs = [run(module, x) for x in inputs]
            for number, output in enumerate(outputs):
                if not torch.isfinite(output).all():
                    raise UserError(f"{block.prefix}: activations of batch {number} are not finite; check the samples")
            linears = {
                f"{block.prefix}.{name}": _quantize(f"{block.prefix}.{name}", layer, job.plan, amax.get(name))
                for name, layer in module.named_modules()
                if isinstance(layer, nn.Linear) and f"{block.prefix}.{name}" in job.plan
            }
        self._write(block.prefix, linears, [n for n in block.tensor_names() if n.removesuffix(".weight") not in linears])
        self._done += 1
        self._progress(self._done, job.blocks.count(), block.prefix)
        return outputs

    def _write(self, block: str, linears: dict[str, QuantizedLinear], float_names: list[str]) -> None:
        self._writer.write_shard(block, linears, {name: self._job.source.load(name) for name in float_names})
        self._written |= {*float_names, *(f"{name}.weight" for name in linears)}

    def leftovers(self) -> None:
        """Copies what no block holds (embeddings, norms, lm_head, unused vision layers), a shard for each component."""
        left: dict[str, list[str]] = {}
        for name in self._job.source:
            if name not in self._written:
                load_finite(self._job.source, name)
                left.setdefault(name.partition(".")[0], []).append(name)
        for component, names in left.items():
            self._write(f"{component}.rest", {}, names)


def _quantize(name: str, layer: nn.Linear, plan: Mapping[str, LinearScheme], amax: float | None) -> QuantizedLinear:
    scheme = plan[name]
    if scheme.activation_bits is not None and amax is None:
        raise UserError(f"{name}: no calibration sample reached it, so its activation range is unknown; add samples")
    if float(layer.weight.abs().max()) > MAX_FLOAT16:
        raise UserError(f"{name}.weight: holds values beyond float16's 65504, so it cannot be in a float16 engine")
    return quantize_linear(layer.weight, scheme, amax)


@contextmanager
def _input_amax(module: nn.Module) -> Iterator[dict[str, float]]:
    """Collects max |input| of every linear inside `module` while the context is open."""
    amax: dict[str, float] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            amax[name] = max(amax.get(name, 0.0), float(args[0].abs().max()))

        return hook

    linears = [(n, m) for n, m in module.named_modules() if isinstance(m, nn.Linear)]
    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in linears]
    try:
        yield amax
    finally:
        for handle in handles:
            handle.remove()
