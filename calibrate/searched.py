"""The searching calibrator: every block is folded, ranged and rounded towards the float model's output. torch.

Two copies of the samples walk through the blocks together: the first half of the inputs is the float model's, the second
half the quantized model's so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from calibrate.batches import Batches, batches_of
from calibrate.blocks import Block, linear_of
from calibrate.calibrated import CalibratedWriter
from calibrate.errors import UserError
from calibrate.influence import Influence, measure_influence, runs_of
from calibrate.job import BlockWriter, Calibration, Progress, check_outputs, check_weight
from calibrate.method import FAST, FULL, Method
from calibrate.recombine import flat, recombine
from calibrate.record import block_record, labels_of, with_partition
from calibrate.residents import CPU, on, residents
from calibrate.search import BlockSearch
from calibrate.threads import steady_threads
from calibrate.walk import Run, walk_language, walk_vision

# How progress is counted: what tokens count costs about as much for a block as this, searching it as that.
UNITS, SEARCH_UNITS = 10, 40


def calibrate_searched(
    job: Calibration, writer: CalibratedWriter, progress: Progress, method: Method = FAST
) -> dict[str, Any]:
    """Quantizes every planned linear into `writer`'s folder; returns the summary for the record.

    Raises UserError naming tensor or layer when weights or activations are not finite.
    """
    # Of the progress: what is measured before the first block, and all.
    begun = 0 if method.objective == "plain" else UNITS * job.blocks.count()
    whole = begun + SEARCH_UNITS * job.blocks.count()
    shards = BlockWriter(job, writer, lambda done, _, name: progress(begun + SEARCH_UNITS * done, whole, name))
    influence: Influence = {}
    prompts = recombine(job.samples, method.questions, job.blocks.image_token_id, method.seed)
    texts, pictures_of = flat(prompts)

    def step(block: Block, inputs: Sequence[torch.Tensor], run: Run) -> Sequence[torch.Tensor]:
        plan, half = job.plan_of(block), len(inputs) // 2
        own = method if block in job.blocks.text_layers else method.for_vision()
        with resident(block) as module, torch.no_grad():
            for name in plan:
                check_weight(f"{block.prefix}.{name}", linear_of(module, name).weight)
            if not half and plan:
                raise UserError(f"{block.prefix}: no calibration sample reached it, so its ranges are unknown; add samples")
            numbers = pictures_of if block in job.blocks.text_layers else job.shown(block)
            check_outputs(block, inputs, numbers)  # of what came before, such as a NaN in a picture
            batches = batches_of(inputs[:half])
            counted = {} if own.objective == "plain" else _of_block(influence, block, batches)
            counts = {name: on(job.device, parts) for name, parts in counted.items()}
            pictures = batches.merged([torch.full((len(x),), n) for x, n in zip(inputs[:half], numbers, strict=True)])
            search = BlockSearch(module, plan, run, own, counts, pictures)
            found = search.search(*(on(job.device, batches.merged(part)) for part in (inputs[:half], inputs[half:])))
            exact, rounded = (on(CPU, batches.split(part)) for part in found)
            changed = {n: _stored(t, job.source.dtype(f"{block.prefix}.{n}")) for n, t in search.floats().items()}
            record = block_record(block, search, exact, rounded, labels_of(block, job.blocks, prompts))
        outputs = shards.keep(block, [*exact, *rounded], numbers)
        shards.write(block, search.found(), changed, outputs=outputs, record=record)
        return outputs

    with steady_threads(job.blocks), residents(job.blocks, job.source, job.device) as resident:
        influence |= measure_influence(
            job, prompts, method.objective, method.seed, lambda share: progress(int(share * begun), whole, "influence")
        )
        features = walk_vision(job.blocks, job.source, [*job.samples, *job.samples], shards.resumable(step))
        spread = [features[half + number] for half in (0, len(job.samples)) for number in pictures_of]
        walk_language(job.blocks, job.source, [*texts, *texts], spread, shards.resumable(step))
    shards.write_rest()
    marked, thresholds = with_partition(shards.records)
    return {
        "method": asdict(method),
        "samples": len(job.samples),
        "prompts": len(texts),
        "tokens": sum(len(s.input_ids) for s in texts),
        "block_forwards": round(sum(b["forwards"] for b in shards.records)) + 2 * runs_of(job, prompts, method.objective),
        "block_backwards": sum(b["backwards"] for b in shards.records) + runs_of(job, prompts, method.objective),
        "entropy_thresholds": thresholds,
        "blocks": marked,
    }


def _of_block(influence: Influence, block: Block, batches: Batches) -> dict[str, list[torch.Tensor]]:
    """What tokens count in one block, in its batches, by names inside it and under "" for its output."""
    inside = {n: weights for n, weights in influence.items() if f"{n}.".startswith(f"{block.prefix}.")}
    return {n.removeprefix(block.prefix).removeprefix("."): batches.merged(weights) for n, weights in inside.items()}


def calibrate_full(job: Calibration, writer: CalibratedWriter, progress: Progress) -> dict[str, Any]:
    """`calibrate_searched` with learned rounding."""
    return calibrate_searched(job, writer, progress, FULL)


def _stored(tensor: torch.Tensor, source: np.dtype) -> np.ndarray:
    """float32 stays, the rest becomes float16, which folding rounded the gains for; bfloat16 would round them again."""
    return tensor.cpu().numpy().astype(np.float32 if source == np.float32 else np.float16)
