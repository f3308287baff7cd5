"""The first calibrator: absolute maxima over the samples, round to nearest. torch.

Blocks stream through memory one at a time; each is read once, run on all samples, quantized, written to its own shard
of the calibrated checkpoint and forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from calibrate.blocks import Block, linear_of, resident
from calibrate.calibrated import CalibratedWriter, QuantizedLinear
from calibrate.errors import UserError
from calibrate.job import BlockWriter, Calibration, Progress, check_weight
from calibrate.quantize import quantize_linear
from calibrate.scheme import LinearScheme
from calibrate.walk import Run, walk_language, walk_vision


def calibrate_absmax(job: Calibration, writer: CalibratedWriter, progress: Progress) -> dict[str, Any]:
    """Quantizes every planned linear into `writer`'s folder; returns the summary for the record.

    Raises UserError naming tensor or layer when weights or activations are not finite.
    """
    shards = BlockWriter(job, writer, progress)

    def step(block: Block, inputs: Sequence[torch.Tensor], run: Run) -> Sequence[torch.Tensor]:
        with resident(block, job.source) as module, torch.inference_mode():
            with _input_amax(module) as amax:
                outputs = shards.keep(block, (run(module, x) for x in inputs))
            linears = {
                name: _quantize(f"{block.prefix}.{name}", linear_of(module, name), scheme, amax.get(name))
                for name, scheme in job.plan_of(block).items()
            }
        shards.write(block, linears, outputs=outputs)
        return outputs

    features = walk_vision(job.blocks, job.source, job.samples, shards.resumable(step))
    walk_language(job.blocks, job.source, job.samples, features, shards.resumable(step))
    shards.write_rest()
    return {"method": "absmax", "samples": len(job.samples), "tokens": sum(len(s.input_ids) for s in job.samples)}


def _quantize(name: str, layer: nn.Linear, scheme: LinearScheme, amax: float | None) -> QuantizedLinear:
    if scheme.activation_bits is not None and amax is None:
        raise UserError(f"{name}: no calibration sample reached it, so its activation range is unknown; add samples")
    check_weight(name, layer.weight)
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
