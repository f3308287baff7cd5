"""The searching calibrator: every block is folded, ranged and rounded towards the float model's output. torch.

Two copies of the samples walk through the blocks together: the first half of the inputs is the float model's, the second
half the quantized model's so far.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from calibrate.blocks import Block, linear_of, resident
from calibrate.calibrated import CalibratedWriter
from calibrate.errors import UserError
from calibrate.job import BlockWriter, Calibration, Progress, check_outputs, check_weight
from calibrate.search import BlockSearch
from calibrate.walk import Run, walk_language, walk_vision


def calibrate_searched(job: Calibration, writer: CalibratedWriter, progress: Progress) -> dict[str, Any]:
    """Quantizes every planned linear into `writer`'s folder; returns the summary for the record.

    Raises UserError naming tensor or layer when weights or activations are not finite.
    """
    shards = BlockWriter(job, writer, progress)
    forwards = 0

    def step(block: Block, inputs: list[torch.Tensor], run: Run) -> list[torch.Tensor]:
        nonlocal forwards
        plan, half = job.plan_of(block), len(inputs) // 2
        with resident(block, job.source) as module, torch.inference_mode():
            for name in plan:
                check_weight(f"{block.prefix}.{name}", linear_of(module, name).weight)
            if not half and plan:
                raise UserError(f"{block.prefix}: no calibration sample reached it, so its ranges are unknown; add samples")
            search = BlockSearch(module, plan, run)
            exact, rounded = search.search(inputs[:half], inputs[half:])
            check_outputs(block, [*exact, *rounded])
            kept = [n for n, _ in module.named_parameters() if n.removesuffix(".weight") not in search.found]
            changed = {n: _stored(module.get_parameter(n), job.source.dtype(f"{block.prefix}.{n}")) for n in kept}
        shards.write(block, search.found, changed)
        forwards += search.forwards
        return [*exact, *rounded]

    samples = [*job.samples, *job.samples]
    features = walk_vision(job.blocks, job.source, samples, step)
    walk_language(job.blocks, job.source, samples, features, step)
    shards.write_rest()
    return {
        "method": "searched",
        "samples": len(job.samples),
        "tokens": sum(len(s.input_ids) for s in job.samples),
        "block_forwards": forwards,
    }


def _stored(tensor: torch.Tensor, source: np.dtype) -> np.ndarray:
    """float32 stays, the rest becomes float16, which folding rounded the gains for; bfloat16 would round them again."""
    return tensor.numpy().astype(np.float32 if source == np.float32 else np.float16)
