"""Q-VLM (arXiv 2410.08119): entropy partition, joint search of percentile clipping ranges, visual-encoder optimization.

It is the method as printed, in a form that can be deployed: symmetric quantizers with static ranges and round-to-nearest,
without equalization and without GPTQ. The gains and biases of the visual encoder are optimized first. Then the float model
is observed, and blocks are formed by the entropy of their inputs and the paper's rule. Each block is searched jointly, with
inputs from the already quantized preceding blocks. Every linear keeps its scheme: the paper has no other to fall back to.

Cost in block forwards for each sample: 1 to observe, and for the search 1 in float, 1 to pass on what was chosen, and up to
160 / 4 for the activations and as many for the weights, when three of a block's four layers are searched jointly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from qvlm_export.calibrate.blockwise.block_loader import open_block_loader
from qvlm_export.calibrate.blockwise.block_writer import BlockWriter, convert_to_stored_dtypes
from qvlm_export.calibrate.blockwise.blocks import Block, deterministic_threads, get_linear
from qvlm_export.calibrate.blockwise.forward import Run, run_decoder_blocks, run_vision_blocks
from qvlm_export.calibrate.blockwise.job import CalibrationJob, Progress, check_images, check_weight, non_finite_error
from qvlm_export.calibrate.checkpoint.calibrated import CalibratedWriter
from qvlm_export.calibrate.quantization.activation_range import check_range
from qvlm_export.calibrate.qvlm.block_search import ModuleInputs, search_both
from qvlm_export.calibrate.qvlm.config import QVLM, QvlmConfig
from qvlm_export.calibrate.qvlm.observe import observe_inputs
from qvlm_export.calibrate.qvlm.partition import Blocks, LayerInput, partition_by_entropy, partition_layerwise
from qvlm_export.calibrate.qvlm.record import make_block_record, summarize_vision
from qvlm_export.calibrate.qvlm.vision_optimization import VisionOptimization, optimize_vision

# Units of progress for each block. The parts cost about in this proportion.
VISION_UNITS, OBSERVE_UNITS, SEARCH_UNITS = 5, 1, 50


def calibrate_qvlm(
    job: CalibrationJob, writer: CalibratedWriter, progress: Progress, config: QvlmConfig = QVLM
) -> dict[str, Any]:
    """Quantizes every linear of `job.schemes` into `writer`'s folder; returns the summary for the record.

    Raises UserError naming tensor or layer when weights or activations are not finite, or where images are missing.
    """
    check_images(job)
    _check_pixels(job)
    count = job.blocks.num_blocks()
    before, total = (VISION_UNITS + OBSERVE_UNITS) * count, (VISION_UNITS + OBSERVE_UNITS + SEARCH_UNITS) * count

    def report(done: float, name: str) -> None:
        progress(int(done * count), total, name)

    with deterministic_threads(job.blocks):
        vision = optimize_vision(job, config, lambda share: report(VISION_UNITS * share, "vision"))
        inputs, observed = observe_inputs(
            job, vision.tensors(), lambda share: report(VISION_UNITS + OBSERVE_UNITS * share, "observe")
        )
        blocks, thresholds = _partition(inputs, config)
        shards = BlockWriter(job, writer, lambda done, _, name: progress(before + SEARCH_UNITS * done, total, name))
        _search_blocks(job, shards, PartitionedLayers(inputs, blocks), vision)
    shards.write_rest()
    return {
        "method": asdict(config),
        "samples": len(job.samples),
        "tokens": sum(len(s.input_ids) for s in job.samples),
        "block_forwards": round(sum(record["forwards"] for record in shards.records)) + observed + vision.forwards,
        "block_backwards": sum(record["backwards"] for record in shards.records) + vision.backwards,
        "entropy_thresholds": thresholds,
        "vision_optimization": summarize_vision(vision),
        "blocks": shards.records,
    }


def _partition(inputs: Sequence[LayerInput], config: QvlmConfig) -> tuple[Blocks, dict[str, float]]:
    """Returns the blocks, and h0 in nats by number of bits where there is one."""
    return (partition_layerwise(len(inputs)), {}) if config.partition == "layers" else partition_by_entropy(inputs)


def _check_pixels(job: CalibrationJob) -> None:
    """Raises UserError naming the sample whose pixels are not finite, before anything is measured on a part of them."""
    for number, sample in enumerate(job.samples):
        if not np.isfinite(sample.pixel_values).all():
            raise non_finite_error(job.blocks.vision()[0].prefix, number)


@dataclass(frozen=True)
class PartitionedLayers:
    """The layers of a model and their partition into blocks."""

    inputs: Sequence[LayerInput]
    blocks: Blocks

    def inside(self, block: Block) -> list[list[LayerInput]]:
        """Returns the layers of one module, by blocks."""
        return [[self.inputs[k] for k in part] for part in self.blocks if self.inputs[part.start].block == block.prefix]


def _search_blocks(job: CalibrationJob, shards: BlockWriter, layers: PartitionedLayers, vision: VisionOptimization) -> None:
    """Searches and writes all modules that are not finished yet."""

    def step(block: Block, inputs: Sequence[torch.Tensor], run: Run) -> Sequence[torch.Tensor]:
        tuned, inside = vision.blocks.get(block.prefix), layers.inside(block)
        with resident(block) as module, torch.inference_mode():
            for name, scheme in job.block_schemes(block).items():
                check_weight(f"{block.prefix}.{name}", get_linear(module, name).weight, scheme)
            tensors = {} if tuned is None else tuned.tensors
            module_inputs = ModuleInputs(job.block_schemes(block), run, inputs, tensors)
            found = search_both(module, inside, module_inputs, job.device)
        check_range(block.prefix, found.largest, job.float_type)
        record = make_block_record(job, block, inside, found, tuned)
        stored, linears = shards.store_outputs(block, [*found.float_outputs, *found.outputs]), found.linears()
        shards.write(block, linears, convert_to_stored_dtypes(tensors, block, job), outputs=stored, record=record)
        return stored

    with open_block_loader(job.blocks, job.source, job.device) as resident:
        samples = [*job.samples, *job.samples]
        features = run_vision_blocks(job.blocks, job.source, samples, shards.skip_finished(step))
        run_decoder_blocks(job.blocks, job.source, samples, features, shards.skip_finished(step))
