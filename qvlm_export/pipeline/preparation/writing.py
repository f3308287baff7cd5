"""What it costs when the float model writes its own calibration set (`inference/self_calibration.py`): memory and time."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from qvlm_export.calibrate.blockwise.blocks import ModelBlocks
from qvlm_export.calibrate.calibrators.block_cost import count_forward
from qvlm_export.calibrate.checkpoint.samples import Sample
from qvlm_export.engines.config import ModelConfig
from qvlm_export.inference.self_calibration import BATCH, Draft, count_steps, most_tokens
from qvlm_export.inference.torch_runner import DTYPES, SLOT_STEP
from qvlm_export.inference.torch_session import choose_batch
from qvlm_export.pipeline.preparation.estimate import CUDA_BYTES, PROGRAM_BYTES, SURELY, Estimate
from qvlm_export.pipeline.preparation.machine import Machine

# A step of decoding: bytes of weights that it reads in a second, as one core of a server does, and seconds for a layer
# beside that, for attention, norms, caches and its share of sampling. Fitted to 157 million parameters on one thread.
STEP_BYTES, LAYER_SECONDS = 8e9, 0.005
WRITE = "write"  # in estimates and progress


@dataclass(frozen=True)
class Writing:
    """Cost of writing a calibration set.

    prefill_flops, decode_flops: of prompts and of written tokens. step_bytes: of weights that the steps of decoding read,
    in sum. step_layers: how many decoder layers they run, in sum.
    """

    prefill_flops: float
    decode_flops: float
    step_bytes: float
    step_layers: int


def installed_memory(device: str) -> int:
    """Returns how many bytes of memory the device surely has for the model."""
    if device == "cuda":
        return int(SURELY * torch.cuda.mem_get_info()[1])
    return int(SURELY * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def writing_memory(config: ModelConfig, float16_bytes: int, device: str) -> int:
    """Returns the bytes of the float model, and of a batch's key/value caches and logits. float16_bytes: of all weights."""
    text, size, item = config.text, choose_batch(config, BATCH), DTYPES[device].itemsize
    prefilled, whole = most_tokens(config.most_image_tokens)
    cache = 2 * item * size * (whole + SLOT_STEP) * text.num_layers * text.num_kv_heads * text.head_dim
    logits = 4 * size * prefilled * text.vocab_size
    return (PROGRAM_BYTES if device == "cpu" else CUDA_BYTES) + float16_bytes * item // 2 + cache + logits


def count_writing(
    blocks: ModelBlocks, config: ModelConfig, drafts: Sequence[Draft], samples: Sequence[Sample], float16_bytes: int
) -> Writing:
    """Returns the cost of writing what the samples stand in for, one for each draft. float16_bytes: of all weights."""
    begun, written, pictures = [], [], []
    for draft, sample in zip(drafts, samples, strict=True):
        times = 1 if draft.prompt is not None else 2  # the picture is read for the prompt, and again for the answer
        begun += [max(1, len(sample.input_ids) - draft.kind.answer_tokens)] * times
        written += (
            [draft.kind.answer_tokens] if draft.prompt is not None else [draft.kind.prompt_tokens, draft.kind.answer_tokens]
        )
        pictures += [blocks.num_patches()] * (times * len(sample.pixel_values))
    head = 2.0 * config.text.vocab_size * config.text.hidden_size
    prefill = count_forward(blocks.vision(), pictures).flops + count_forward(blocks.text_layers, begun).flops
    decode = count_forward(blocks.text_layers, [1]).flops * sum(written) + head * sum(written)
    size = choose_batch(config, BATCH)
    batches = [drafts[start : start + size] for start in range(0, len(drafts), size)]
    steps = sum(count_steps(batch) for batch in batches)
    return Writing(prefill + head * sum(begun), decode, float(steps * 2 * float16_bytes), steps * config.text.num_layers)


def add_writing(found: Estimate, writing: Writing, machine: Machine, memory_bytes: int) -> Estimate:
    """Returns the estimate of an export that begins with writing. memory_bytes: from `writing_memory`.

    Products of few rows, as in decoding, are computed by one thread, so that their last bits do not depend on the number
    of threads.
    """
    seconds = writing.prefill_flops / machine.flops + writing.decode_flops / machine.single_flops
    seconds += writing.step_bytes / STEP_BYTES + writing.step_layers * LAYER_SECONDS
    return replace(
        found,
        seconds={WRITE: round(seconds / machine.cpu_share, 1), **found.seconds},
        memory_bytes=max(found.memory_bytes, memory_bytes),
    )
