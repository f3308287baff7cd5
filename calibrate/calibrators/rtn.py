"""Round-to-nearest (RTN) quantization with absmax ranges.

Blocks stream through memory one at a time: each is read once, run on the calibration set to observe the largest magnitude of
every linear's input, quantized, written to its own shard of the calibrated checkpoint, and released. Weights are quantized
without looking at the samples, so the blocks behind the last quantized activation are not run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch

from qvlm_export.calibrate.blockwise.block_loader import open_block_loader
from qvlm_export.calibrate.blockwise.block_writer import BlockWriter
from qvlm_export.calibrate.blockwise.blocks import Block, ModelBlocks, as_tensor, check_finite, get_linear
from qvlm_export.calibrate.blockwise.forward import Run, run_decoder_blocks, run_vision_blocks
from qvlm_export.calibrate.blockwise.job import CalibrationJob, Progress, check_weight
from qvlm_export.calibrate.checkpoint.calibrated import CalibratedWriter, QuantizedLinear
from qvlm_export.calibrate.checkpoint.scheme import LinearScheme
from qvlm_export.calibrate.errors import UserError
from qvlm_export.calibrate.numerics.threads import one_thread
from qvlm_export.calibrate.quantization.activation_range import check_range, observe_magnitudes
from qvlm_export.calibrate.quantization.quantizer import quantize_linear
from qvlm_export.calibrate.quantization.record import make_linear_record, measure_weight_sqnr


def calibrate_rtn(job: CalibrationJob, writer: CalibratedWriter, progress: Progress) -> dict[str, Any]:
    """Quantizes every linear of `job.schemes` into `writer`'s folder; returns the summary for the record.

    Raises UserError naming tensor or layer when weights or activations are not finite.
    """
    shards = BlockWriter(job, writer, progress)

    def step(block: Block, inputs: Sequence[torch.Tensor], run: Run) -> Sequence[torch.Tensor]:
        with resident(block) as module, torch.inference_mode():
            for name, scheme in job.block_schemes(block).items():  # else their outputs would be named
                check_weight(f"{block.prefix}.{name}", get_linear(module, name).weight, scheme)
            with observe_magnitudes(module) as largest:
                outputs = shards.store_outputs(block, (run(module, x.to(job.device)) for x in inputs))
            check_range(block.prefix, largest, job.float_type)
            results = {
                name: _quantize(
                    f"{block.prefix}.{name}", get_linear(module, name).weight, scheme, largest.get(f"{name}.input")
                )
                for name, scheme in job.block_schemes(block).items()
            }
        record = _make_block_record(block, results, sum(len(x) for x in inputs)) | {"largest_activations": largest}
        shards.write(block, {name: result.linear for name, result in results.items()}, outputs=outputs, record=record)
        return outputs

    run_blocks, weight_only = _split_blocks(job)
    resumable = shards.skip_finished(step)
    with open_block_loader(run_blocks, job.source, job.device) as resident:
        if run_blocks.text_layers:
            features = run_vision_blocks(run_blocks, job.source, job.samples, resumable)
            run_decoder_blocks(run_blocks, job.source, job.samples, features, resumable)
        elif len(weight_only) < job.blocks.num_blocks():
            run_vision_blocks(run_blocks, job.source, job.samples, resumable)
    _quantize_without_running(job, shards, [block for block in weight_only if not shards.is_finished(block)])
    shards.write_rest()
    return {
        "method": "rtn",
        "samples": len(job.samples),
        "tokens": sum(len(s.input_ids) for s in job.samples),
        "block_forwards": sum(record["forwards"] for record in shards.records),
        "blocks": shards.records,
    }


@dataclass(frozen=True)
class _LinearResult:
    """One quantized linear and its record."""

    linear: QuantizedLinear
    record: dict[str, Any]


def _make_block_record(block: Block, results: Mapping[str, _LinearResult], forwards: int) -> dict[str, Any]:
    """Returns the record of one block. forwards: prompts or images that ran through it.

    It holds no errors of the block's output, as the quantized block is never run.
    """
    linears = {f"{block.prefix}.{name}": result.record for name, result in results.items()}
    return {"name": block.prefix, "linears": linears, "forwards": forwards}


def _split_blocks(job: CalibrationJob) -> tuple[ModelBlocks, list[Block]]:
    """Returns the blocks that samples have to run through, and those behind the last quantized activation."""
    vision, text = job.blocks.vision(), job.blocks.text_layers
    observed = [any(s.activation_bits is not None for s in job.block_schemes(block).values()) for block in (*vision, *text)]
    count = max((number + 1 for number, needed in enumerate(observed) if needed), default=0)
    if count == 0:
        return replace(job.blocks, text_layers=()), [*vision, *text]
    text_count = max(0, count - len(vision))
    return replace(job.blocks, text_layers=text[:text_count]), list(text[text_count:])


def _quantize_without_running(job: CalibrationJob, shards: BlockWriter, blocks: list[Block]) -> None:
    """Reads, quantizes and writes blocks without quantized activations, several at a time, so that reading, computing and
    writing overlap."""

    def quantize_block(block: Block) -> tuple[str, dict[str, Any]]:
        results = {}
        for name, scheme in job.block_schemes(block).items():
            weight_name = f"{block.prefix}.{name}.weight"
            array = job.source.load(weight_name)
            check_finite(weight_name, array)
            check_weight(f"{block.prefix}.{name}", as_tensor(array), scheme)
            results[name] = _quantize(f"{block.prefix}.{name}", as_tensor(array), scheme, None)
        shard = shards.write_shard(block, {name: result.linear for name, result in results.items()})
        return shard, _make_block_record(block, results, 0)

    workers = torch.get_num_threads()
    with one_thread(), ThreadPoolExecutor(workers) as pool:
        pending = deque(pool.submit(quantize_block, block) for block in blocks[:workers])
        for number, block in enumerate(blocks):
            shard, record = pending.popleft().result()
            if number + workers < len(blocks):
                pending.append(pool.submit(quantize_block, blocks[number + workers]))
            shards.mark_finished(block, shard, record=record)


def _quantize(name: str, weight: torch.Tensor, scheme: LinearScheme, amax: float | None) -> _LinearResult:
    if scheme.activation_bits is not None and amax is None:
        raise UserError(f"{name}: no calibration sample reached it, so its activation range is unknown; add samples")
    linear = quantize_linear(weight, scheme, amax)
    return _LinearResult(linear, make_linear_record(linear, measure_weight_sqnr(weight, linear), amax))
