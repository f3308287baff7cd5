"""nvidia-modelopt as a peer: runs one cell of tools/bench/methods.py in its own environment.

A recipe is a list of algorithms that run one after the other, in the form of mtq.quantize. The `two-step` recipes are not
offered by modelopt, which smooths at W8A8 only: here the model is smoothed at 8 bits, the number of bits is lowered, and the
last algorithm calibrates again. Quantizers are enabled by name on the linears of the scheme only, because modelopt's presets
would leave out the tower and the projector, and "*input_quantizer" would quantize the inputs of LayerNorms.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from common import Job, Measured, Scheme, batches_of, check_levels, measured, quantizable, run_all, run_cell, with_picture
from modelopt.torch.quantization.conversion import set_quantizer_by_cfg

FINE_MSE = {"method": "mse", "step_size": 0.02, "start_multiplier": 0.4, "stop_multiplier": 1.0}


@dataclass(frozen=True)
class Recipe:
    """A method of the benchmark.

    algorithms: run at the bits of the column. smooth_alpha: if set, the model is smoothed at W8A8 before.
    """

    algorithms: tuple[str | dict[str, Any], ...]
    smooth_alpha: float | None = None


def smoothquant(alpha: float) -> dict[str, Any]:
    """The SmoothQuant algorithm in the form of mtq.quantize."""
    return {"method": "smoothquant", "alpha": alpha}


RECIPES = {
    "max": Recipe(("max",)),
    "mse": Recipe(({"method": "mse"},)),
    "gptq": Recipe(("gptq",)),
    "smoothquant 1.0": Recipe((smoothquant(1.0),)),
    "smoothquant 0.5": Recipe((smoothquant(0.5),)),
    "smoothquant 0.5 + gptq": Recipe((smoothquant(0.5), "gptq")),
    "awq_lite": Recipe(({"method": "awq_lite", "alpha_step": 0.1},)),
    "awq_full": Recipe(({"method": "awq_full", "alpha_step": 0.1},)),
    "awq_lite + gptq": Recipe(({"method": "awq_lite", "alpha_step": 0.1}, "gptq")),
    "two-step 0.5, max": Recipe(("max",), 0.5),
    "two-step 0.5, mse": Recipe((FINE_MSE,), 0.5),
    "two-step 0.5, gptq": Recipe(("gptq",), 0.5),
    "two-step 1.0, gptq": Recipe(("gptq",), 1.0),
}


def quantizer_config(names: list[str], scheme: Scheme) -> list[dict[str, Any]]:
    """modelopt's configuration that quantizes the linears `names` and nothing else."""
    weight: dict[str, Any] = {"num_bits": scheme.weight_bits, "axis": 0}
    if scheme.group_size is not None:
        weight = {"num_bits": scheme.weight_bits, "block_sizes": {-1: scheme.group_size, "type": "static"}}
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for name in names:
        entries.append({"quantizer_name": f"{name}.weight_quantizer", "cfg": weight})
        if scheme.activation_bits is not None:
            entries.append(
                {"quantizer_name": f"{name}.input_quantizer", "cfg": {"num_bits": scheme.activation_bits, "axis": None}}
            )
    return entries


def calibrate(job: Job, model: Any) -> tuple[Any, Measured]:
    """Runs one cell of the benchmark with nvidia-modelopt and writes its logits."""
    recipe, names = RECIPES[job.row], quantizable(model)
    inputs = batches_of(job.calibration)
    config = quantizer_config(names, job.scheme)

    def forward_loop(quantized: torch.nn.Module) -> None:
        run_all(quantized, inputs)

    with measured() as result, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if recipe.smooth_alpha is None:
            model = mtq.quantize(model, {"quant_cfg": config, "algorithm": list(recipe.algorithms)}, forward_loop)
        else:
            w8a8 = quantizer_config(names, Scheme(8, 8, None))
            smooth = {"quant_cfg": w8a8, "algorithm": smoothquant(recipe.smooth_alpha)}
            model = lower_bits_(mtq.quantize(model, smooth, forward_loop), names, config)
            for algorithm in recipe.algorithms:
                model = mtq.calibrate(model, algorithm, forward_loop)
    result.settings = {"algorithms": recipe.algorithms, "smoothed_at_w8a8": recipe.smooth_alpha, "quant_cfg": config[1:3]}
    messages = {str(w.message) for w in caught if "skip" in str(w.message)}
    if skipped := [name for name in names if any(name in message for message in messages)]:
        raise ValueError(f"modelopt left out {len(skipped)} linears, the first {skipped[0]}")
    check(model, names, job, with_picture(inputs))
    return model, result


def lower_bits_(model: Any, names: list[str], config: list[dict[str, Any]]) -> Any:
    """Sets the bits of the smoothed model's quantizers to those of the column and resets their ranges, in place.

    The smoothing stays; raises ValueError if it does not.
    """
    smoothing = {name: model.get_submodule(name).input_quantizer.pre_quant_scale.clone() for name in names}
    for name in names:
        for quantizer in (model.get_submodule(name).input_quantizer, model.get_submodule(name).weight_quantizer):
            quantizer.reset_amax()
    set_quantizer_by_cfg(model, config)
    for name, scale in smoothing.items():
        if not torch.equal(model.get_submodule(name).input_quantizer.pre_quant_scale, scale):
            raise ValueError(f"{name}: lost its smoothing when its bits were lowered")
    return model


def check(model: Any, names: list[str], job: Job, sample: dict[str, torch.Tensor]) -> None:
    """Raises ValueError if a linear is not quantized as its scheme says, or if anything else is quantized."""
    weights: dict[str, torch.Tensor] = {}
    inputs: dict[str, torch.Tensor] = {}
    handles = []
    for name, quantizer in model.named_modules():
        if not hasattr(quantizer, "is_enabled") or not name.endswith("quantizer") or not quantizer.is_enabled:
            continue
        linear, _, kind = name.rpartition(".")
        if linear not in names:
            raise ValueError(f"{name}: is quantized and should not be")
        if kind == "input_quantizer" and quantizer.amax is not None and quantizer.amax.numel() != 1:
            raise ValueError(f"{name}: {quantizer.amax.numel()} activation scales where the scheme has one")
        if kind == "weight_quantizer":
            with torch.no_grad():
                weights[linear] = quantizer(model.get_submodule(linear).weight)
        else:
            handles.append(quantizer.register_forward_hook(make_hook(inputs, linear)))
    run_all(model, [sample])
    for handle in handles:
        handle.remove()
    expected = set(names)
    if set(weights) != expected or (job.scheme.activation_bits and set(inputs) != expected):
        raise ValueError(f"quantized {len(weights)} weights and {len(inputs)} inputs of {len(expected)} linears")
    check_levels(weights, inputs, job.scheme)


def make_hook(outputs: dict[str, torch.Tensor], name: str) -> Callable[..., None]:
    """A hook that stores a copy of a quantizer's output in `outputs`."""

    def hook(_: Any, __: Any, output: torch.Tensor) -> None:
        outputs[name] = output.clone()

    return hook


if __name__ == "__main__":
    run_cell(calibrate, ["nvidia-modelopt"])
