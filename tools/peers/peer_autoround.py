"""auto-round, in its own environment: one cell of tools/bench/methods.py.

It tunes blocks, of tower and decoder. The projector is no block and stays float, so it is rounded to nearest afterwards,
in the same scheme. Samples are fed one by one and eight gradients added up: batches of padded samples break it. amp is off:
else it turns the whole model into bfloat16, which costs more than the rounding.
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
    """auto-round as a peer: calibrates one cell and writes its logits."""
    if job.scheme.activation_bits is not None:
        raise ValueError(f"{job.column}: auto-round's row is for weights only")
    processor = LlavaProcessor.from_pretrained(job.model)
    inputs, names = inputs_of(job.calibration), quantizable(model)
    before = {name: model.get_submodule(name).weight.detach().clone() for name in names}
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
        left = [name for name in names if torch.equal(model.get_submodule(name).weight, before[name])]
        for name in left:
            weight = model.get_submodule(name).weight
            with torch.no_grad():
                weight.copy_(rounded(weight, job.scheme))
    result.settings = {**settings, "rounded_to_nearest_afterwards": left}
    if any("multi_modal_projector" not in name for name in left):
        raise ValueError(f"auto-round left {left} in float")
    check_levels({name: model.get_submodule(name).weight for name in names}, {}, job.scheme)
    return model, result


def rounded(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Round to nearest with the largest magnitude of each group."""
    qmax = 2 ** (scheme.weight_bits - 1) - 1
    groups = weight.reshape(len(weight), -1, scheme.group_size or weight.shape[1])
    scale = groups.abs().amax(2, keepdim=True).clamp(min=1e-9) / qmax
    return ((groups / scale).round().clamp(-qmax - 1, qmax) * scale).reshape(weight.shape)


if __name__ == "__main__":
    run_cell(calibrate, ["auto-round"])
