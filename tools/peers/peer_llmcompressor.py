"""llmcompressor as a peer: runs one cell of tools/bench/methods.py in its own environment.

A recipe is a list of calls of oneshot. Tower and projector are quantized in one call, the decoder in another. The sequential
pipeline, the default, in which a layer's inputs come from already quantized layers, does not step into the tower: its
modules get hooks but no ranges, and GPTQ fails on them. The basic pipeline does not propagate errors. Smoothing is its own
call, because static activation ranges must be observed after it. AWQ does not work with the basic pipeline: it would search
with uncalibrated quantizers enabled and get outputs of zero. The mappings name every pair of layers that can be equalized in
this model, including those of the tower and up_proj -> down_proj, which the SmoothQuant defaults leave out.

The sequential pipeline traces the model once, so all batches must have the same inputs. Where some have no pictures, it gets
embeddings, in which the features of the pictures are in place already. The recipes with AWQ do not run on such samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from common import Job, Measured, Scheme, batches_of, check_levels, measured, quantizable, run_all, run_cell, with_picture
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQMapping, AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from llmcompressor.utils.helpers import DisableQuantization
from torch.utils.data import DataLoader

# (layer that produces the activation, linears that read it, scope). Under grouped-query attention v_proj and o_proj differ
# in width, so they cannot be paired.
PAIRS = (
    (r"re:.*language_model.*\.input_layernorm$", ("q_proj", "k_proj", "v_proj"), "language_model"),
    (r"re:.*language_model.*\.post_attention_layernorm$", ("gate_proj", "up_proj"), "language_model"),
    (r"re:.*language_model.*\.up_proj$", ("down_proj",), "language_model"),
    (r"re:.*vision_tower.*\.layer_norm1$", ("q_proj", "k_proj", "v_proj"), "vision_tower"),
    (r"re:.*vision_tower.*\.v_proj$", ("out_proj",), "vision_tower"),
    (r"re:.*vision_tower.*\.layer_norm2$", ("fc1",), "vision_tower"),
)


@dataclass(frozen=True)
class Recipe:
    """A method of the benchmark.

    smoothing: None, "smoothquant" or "awq". rounding: "rtn" or "gptq". observer: of the clipping ranges.
    """

    smoothing: str | None
    rounding: str
    observer: str = "minmax"


RECIPES = {
    "rtn": Recipe(None, "rtn"),
    "gptq": Recipe(None, "gptq"),
    "gptq, mse": Recipe(None, "gptq", "mse"),
    "awq": Recipe("awq", "rtn"),
    "awq + gptq": Recipe("awq", "gptq"),
    "smoothquant": Recipe("smoothquant", "rtn"),
    "smoothquant + gptq": Recipe("smoothquant", "gptq"),
    "smoothquant + gptq, mse": Recipe("smoothquant", "gptq", "mse"),
}


class UnpinnedCache(IntermediatesCache):
    """Its base pins memory for a GPU, which raises on a machine without one."""

    def pin_memory(self, batch_index: int, input_names: list[str] | None = None) -> None:
        pass


class AWQWithoutAccelerator(AWQModifier):
    """AWQModifier as released, over caches that do not pin memory."""

    def _apply_smoothing(self, model: torch.nn.Module) -> None:
        for parent, cache in self._parent_args_cache.items():
            self._parent_args_cache[parent] = UnpinnedCache(cache.batch_intermediates, cache.offload_device)
        super()._apply_smoothing(model)


def scheme_of(names: list[str], scheme: Scheme, observer: str, activations: bool = True) -> QuantizationScheme:
    """The scheme on the linears `names`, in llmcompressor's form."""
    strategy = {"strategy": "channel"}
    if scheme.group_size is not None:
        strategy = {"strategy": "group", "group_size": scheme.group_size}
    inputs = None
    if activations and scheme.activation_bits is not None:
        inputs = QuantizationArgs(num_bits=scheme.activation_bits, strategy="tensor", dynamic=False, observer=observer)
    weights = QuantizationArgs(num_bits=scheme.weight_bits, observer=observer, **strategy)
    return QuantizationScheme(targets=names, weights=weights, input_activations=inputs)


def mappings(mapping: type | None = None) -> list[Any]:
    """PAIRS in the form of SmoothQuant, or of the mapping type `mapping`, such as AWQMapping."""
    pairs = [([rf"re:.*{scope}.*\.{name}$" for name in readers], maker) for maker, readers, scope in PAIRS]
    if mapping is None:
        return [[readers, maker] for readers, maker in pairs]
    return [mapping(smooth_layer=maker, balance_layers=readers) for readers, maker in pairs]


def passes_of(recipe: Recipe, names: list[str], scheme: Scheme) -> list[tuple[str, list[Any]]]:
    """Pipeline and modifiers of each call of oneshot for a recipe."""

    def make_modifier(modifier: type, part: list[str]) -> Any:
        return modifier(config_groups={"all": scheme_of(part, scheme, recipe.observer)})

    passes: list[tuple[str, list[Any]]] = []
    if recipe.smoothing == "smoothquant":
        passes.append(("basic", [SmoothQuantModifier(smoothing_strength=0.5, mappings=mappings())]))
    elif recipe.smoothing == "awq":
        # AWQ evaluates its factors with the scheme of the weights, which a modifier of the same call must declare.
        scheme_modifier = QuantizationModifier(
            config_groups={"all": scheme_of(names, scheme, recipe.observer, activations=False)}
        )
        awq = AWQWithoutAccelerator(mappings=mappings(AWQMapping), duo_scaling="both")
        passes.append(("independent", [awq, scheme_modifier]))
    if recipe.rounding == "rtn":
        return [*passes, ("basic", [make_modifier(QuantizationModifier, names)])]
    vision = [name for name in names if "language_model" not in name]
    passes.append(("basic", [make_modifier(GPTQModifier, vision)]))
    passes.append(("sequential", [make_modifier(GPTQModifier, [name for name in names if name not in vision])]))
    return passes


def embed(model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The batch with embeddings instead of tokens and pictures, float32 [B, tokens, hidden].

    Quantizers are off, as they are while the sequential pipeline computes them.
    """
    with torch.no_grad(), DisableQuantization(model):
        embeds = model.get_input_embeddings()(batch["input_ids"])
        if "pixel_values" in batch:
            features = torch.cat(list(model.get_image_features(batch["pixel_values"], return_dict=True).pooler_output))
            places = (batch["input_ids"] == model.config.image_token_id)[..., None].expand_as(embeds)
            embeds = embeds.masked_scatter(places, features)
    return {"inputs_embeds": embeds, "attention_mask": batch["attention_mask"]}


def calibrate(job: Job, model: Any) -> tuple[Any, Measured]:
    """Runs one cell of the benchmark with llmcompressor and writes its logits."""
    recipe, names = RECIPES[job.row], quantizable(model)
    inputs = batches_of(job.calibration)
    passes = passes_of(recipe, names, job.scheme)
    mixed = not all("pixel_values" in batch for batch in inputs)
    if mixed and recipe.smoothing == "awq":
        raise ValueError("llmcompressor's AWQ does not run on samples of which some have no picture")
    with measured() as result:
        for pipeline, modifiers in passes:
            embedded = mixed and pipeline == "sequential"
            loader = DataLoader([embed(model, batch) for batch in inputs] if embedded else inputs, batch_size=None)
            model = oneshot(model=model, dataset=loader, recipe=modifiers, pipeline=pipeline, clear_sparse_session=True)
    result.settings = {
        "passes": [[pipeline, *(type(m).__name__ for m in modifiers)] for pipeline, modifiers in passes],
        "observer": recipe.observer,
        "smoothing_strength": 0.5 if recipe.smoothing == "smoothquant" else None,
        "awq_duo_scaling": "both" if recipe.smoothing == "awq" else None,
    }
    check(model, names, job, with_picture(inputs))
    return model, result


def check(model: Any, names: list[str], job: Job, sample: dict[str, torch.Tensor]) -> None:
    """Raises ValueError if a linear is not quantized as its scheme says, or if anything else is quantized."""
    quantized = {name: module for name, module in model.named_modules() if hasattr(module, "quantization_scheme")}
    if set(quantized) != set(names):
        raise ValueError(f"quantized {len(quantized)} of {len(names)} linears")
    observed: dict[str, torch.Tensor] = {}
    handles = [module.register_forward_pre_hook(make_hook(observed, name)) for name, module in quantized.items()]
    run_all(model, [sample])
    for handle in handles:
        handle.remove()
    weights, inputs = {}, {}
    for name, module in quantized.items():
        scheme = module.quantization_scheme
        weights[name] = forward_quantize(module, module.weight, "weight", scheme.weights)
        if scheme.input_activations is not None:
            inputs[name] = forward_quantize(module, observed[name], "input", scheme.input_activations)
            if module.input_scale.numel() != 1 or bool(module.input_zero_point.any()):
                raise ValueError(f"{name}: its activations have more than one scale, or are not symmetric")
    check_levels(weights, inputs, job.scheme)


def make_hook(inputs: dict[str, torch.Tensor], name: str) -> Callable[..., None]:
    """A hook that stores a copy of a linear's input in `inputs`."""

    def hook(_: Any, args: tuple[torch.Tensor, ...]) -> None:
        inputs[name] = args[0].clone()

    return hook


if __name__ == "__main__":
    run_cell(calibrate, ["llmcompressor", "compressed-tensors"])
