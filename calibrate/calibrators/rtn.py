"""The first calibrator: absolute maxima over the samples, round to nearest. torch.

Blocks stream through memory one at a time; each is read once, run on all samples, quantized, written to its own shard
of the calibrated checkpoint and forgotten. Where weights alone are quantized nothing depends on the samples, so the blocks
behind the last quantized activation are not run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch

from qvlm_export.calibrate.blockwise.block_writer import BlockWriter
from qvlm_export.calibrate.blockwise.blocks import Block, ModelBlocks, as_tensor, check_finite, get_linear
from qvlm_export.calibrate.blockwise.forward import Run, run_decoder_blocks, run_vision_blocks
from qvlm_export.calibrate.blockwise.job import CalibrationJob, Progress, check_weight
from qvlm_export.calibrate.blockwise.offload import open_block_loader
from qvlm_export.calibrate.calibrators.linear_record import make_linear_record, measure_weight_sqnr
from qvlm_export.calibrate.checkpoint.calibrated import CalibratedWriter, QuantizedLinear
from qvlm_export.calibrate.checkpoint.scheme import LinearScheme
from qvlm_export.calibrate.errors import UserError
from qvlm_export.calibrate.numerics.threads import one_thread
from qvlm_export.calibrate.quantization.observers import observe_amax
from qvlm_export.calibrate.quantization.quantizer import quantize_linear


def calibrate_rtn(job: CalibrationJob, writer: CalibratedWriter, progress: Progress) -> dict[str, Any]:
    """Quantizes every planned linear into `writer`'s folder; returns the summary for the record.

    Raises UserError naming tensor or layer when weights or activations are not finite.
    """
    shards = BlockWriter(job, writer, progress)

    def step(block: Block, inputs: Sequence[torch.Tensor], run: Run) -> Sequence[torch.Tensor]:
        with resident(block) as module, torch.inference_mode():
            with observe_amax(module) as amax:
                outputs = shards.store_outputs(block, (run(module, x.to(job.device)) for x in inputs))
            rounded = {
                name: _quantize(f"{block.prefix}.{name}", get_linear(module, name).weight, scheme, amax.get(name))
                for name, scheme in job.block_schemes(block).items()
            }
        record = _record(block, rounded, sum(len(x) for x in inputs))
        shards.write(block, {name: one.linear for name, one in rounded.items()}, outputs=outputs, record=record)
        return outputs

    walked, rest = _parted(job)
    resumable = shards.resumable(step)
    with open_block_loader(walked, job.source, job.device) as resident:
        if walked.text_layers:
            features = run_vision_blocks(walked, job.source, job.samples, resumable)
            run_decoder_blocks(walked, job.source, job.samples, features, resumable)
        elif len(rest) < job.blocks.num_blocks():
            run_vision_blocks(walked, job.source, job.samples, resumable)
    _quantize_rest(job, shards, [block for block in rest if not shards.finished(block)])
    shards.write_rest()
    return {
        "method": "absmax",
        "samples": len(job.samples),
        "tokens": sum(len(s.input_ids) for s in job.samples),
        "block_forwards": sum(record["forwards"] for record in shards.records),
        "blocks": shards.records,
    }


@dataclass(frozen=True)
class _Rounded:
    """One linear, and what the record says of it."""

    linear: QuantizedLinear
    record: dict[str, Any]


def _record(block: Block, rounded: Mapping[str, _Rounded], forwards: int) -> dict[str, Any]:
    """One block. forwards: of prompts or pictures. Errors of its output are not there, as no rounded block is run."""
    linears = {f"{block.prefix}.{name}": one.record for name, one in rounded.items()}
    return {"name": block.prefix, "linears": linears, "forwards": forwards}


def _parted(job: CalibrationJob) -> tuple[ModelBlocks, list[Block]]:
    """The blocks that samples must run through, and those behind the last quantized activation, where none is looked at."""
    vision, text = job.blocks.vision(), job.blocks.text_layers
    looks = [any(s.activation_bits is not None for s in job.block_schemes(block).values()) for block in (*vision, *text)]
    count = max((number + 1 for number, needed in enumerate(looks) if needed), default=0)
    if count == 0:
        return replace(job.blocks, text_layers=()), [*vision, *text]
    walked = max(0, count - len(vision))
    return replace(job.blocks, text_layers=text[:walked]), list(text[walked:])


def _quantize_rest(job: CalibrationJob, shards: BlockWriter, blocks: list[Block]) -> None:
    """Blocks without quantized activations: read, rounded and written, several at a time, so that nobody waits."""

    def written(block: Block) -> tuple[str, dict[str, Any]]:
        rounded = {}
        for name, scheme in job.block_schemes(block).items():
            weight_name = f"{block.prefix}.{name}.weight"
            array = job.source.load(weight_name)
            check_finite(weight_name, array)
            rounded[name] = _quantize(f"{block.prefix}.{name}", as_tensor(array), scheme, None)
        shard = shards.write_shard(block, {name: one.linear for name, one in rounded.items()})
        return shard, _record(block, rounded, 0)

    workers = torch.get_num_threads()
    with one_thread(), ThreadPoolExecutor(workers) as pool:
        ahead = deque(pool.submit(written, block) for block in blocks[:workers])
        for number, block in enumerate(blocks):
            shard, record = ahead.popleft().result()
            if number + workers < len(blocks):
                ahead.append(pool.submit(written, blocks[number + workers]))
            shards.note(block, shard, record=record)


def _quantize(name: str, weight: torch.Tensor, scheme: LinearScheme, amax: float | None) -> _Rounded:
    if scheme.activation_bits is not None and amax is None:
        raise UserError(f"{name}: no calibration sample reached it, so its activation range is unknown; add samples")
    check_weight(name, weight)
    linear = quantize_linear(weight, scheme, amax)
    return _Rounded(linear, make_linear_record(linear, measure_weight_sqnr(weight, linear), amax))
