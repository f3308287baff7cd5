"""auto-round as a peer: runs one cell of tools/bench/methods.py in its own environment.

auto-round tunes the blocks of tower and decoder. The projector is not a block and stays float, so it is rounded to nearest
afterwards, in the same scheme. Samples are processed one at a time and eight gradients are accumulated, because auto-round
fails on batches of padded samples. amp is off, because it converts the whole model to bfloat16, which costs more accuracy
than the rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from auto_round import AutoRound
from common import Job, Measured, Scheme, check_levels, inputs_of, measured, quantizable, run_cell
from transformers import LlavaProcessor

STEPS = {"200 steps": 200, "1000 steps": 1000}
BATCH = 8


def calibrate(job: Job, model: Any) -> tuple[Any, Measured]:
    """Runs one cell of the benchmark with auto-round and writes its logits."""
    if job.scheme.activation_bits is not None:
        raise ValueError(f"{job.column}: auto-round's row is for weights only")
    processor = LlavaProcessor.from_pretrained(job.model)
    inputs, names = inputs_of(job.calibration), quantizable(model)
    float_weights = {name: model.get_submodule(name).weight.detach().clone() for name in names}
    unused = [
        n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n not in names and "lm_head" not in n
    ]
    settings: dict[str, Any] = {
        "bits": job.scheme.weight_bits,
        "group_size": job.scheme.group_size,
        "sym": True,
        "iters": STEPS[job.row],
        "nsamples": len(inputs),
        "batch_size": 1,
        "gradient_accumulate_steps": BATCH,
        "quant_nontext_module": True,
        "amp": False,
    }
    with measured() as result:
        rounder = AutoRound(
            model,
            processor.tokenizer,
            processor=processor,
            dataset=inputs,
            device_map="cpu",
            enable_torch_compile=False,
            layer_config={name: {"bits": 16} for name in unused},
            seed=int(job.calibration.stem.rpartition("-")[2]),
            **settings,
        )
        model, _ = rounder.quantize()
        if any(p.dtype != torch.float32 for p in model.parameters()):
            raise ValueError("auto-round changed the type of the model's floats")
        unchanged = [name for name in names if torch.equal(model.get_submodule(name).weight, float_weights[name])]
        for name in unchanged:
            weight = model.get_submodule(name).weight
            with torch.no_grad():
                weight.copy_(round_to_nearest(weight, job.scheme))
    result.settings = {**settings, "rounded_to_nearest_afterwards": unchanged}
    if any("multi_modal_projector" not in name for name in unchanged):
        raise ValueError(f"auto-round left {unchanged} in float")
    check_levels({name: model.get_submodule(name).weight for name in names}, {}, job.scheme)
    return model, result


def round_to_nearest(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """The weight [out, in], rounded to nearest with the absmax range of each group."""
    qmax = 2 ** (scheme.weight_bits - 1) - 1
    groups = weight.reshape(len(weight), -1, scheme.group_size or weight.shape[1])
    scale = groups.abs().amax(2, keepdim=True).clamp(min=1e-9) / qmax
    return ((groups / scale).round().clamp(-qmax - 1, qmax) * scale).reshape(weight.shape)


if __name__ == "__main__":
    run_cell(calibrate, ["auto-round"])
