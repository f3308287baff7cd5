"""Plants outliers that per-channel equalization cannot undo into the tiny LLaVA: the second model of the benchmark.

    python -m tools.tiny.plant_hard_outliers --model qvlm_export/tiny --out build/tiny-hard

The outliers of tools/tiny/plant_outliers.py are channels that are scaled up in the layer that produces them, so that
equalization removes them exactly. This program plants four kinds that equalization does not remove. Each leaves the function
of the model unchanged, or nearly so:

after GELU      Rows of fc1 (tower) and linear_1 (projector) are scaled by 8 to 32. GELU(s z) / s differs from GELU(z), so
                the factor cannot be moved into the preceding layer. A least-squares refit of the next linear on training
                images compensates for the change (nearly exact). Only a multiplication at run time or clipping helps.
residual        The residual stream is rotated by an orthogonal matrix, which commutes with RMSNorm without a gain (exact).
                The first axes are the directions of the beginning-of-sequence token and of the tokens around the image. So
                these tokens have all their energy in one channel, 16 times the root mean square after a norm, like the
                massive activations of real models. The other tokens use the same channel at ordinary size: a factor that
                makes the few tokens small makes the weights that all tokens need large.
values          In each key-value head a multiple of one value channel is added to another, and o_proj subtracts it again
                (exact, because attention mixes tokens, not channels). Scaling channels cannot undo a shear: the sum is
                large, and the small summand carries the information. Several query heads read each key-value head.
keys            Rows of k_proj are scaled up and those of q_proj down, by the same factor for both channels of a rotary pair
                (exact). No linear reads keys, so nothing in this project quantizes them; a quantized KV cache would.

The weights are computed in float64 and stored in float16, so that the checkpoint has the same bytes on every processor.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from tools.tiny import scenes
from tools.tiny.accuracy import load_torch
from tools.tiny.plant_outliers import FACTORS, save_planted

IMAGES = 256
SHEARS = (8.0, 8.0, 4.0)  # the largest at which W8A8 round-to-nearest still works
RIDGE = 1e-3  # relative to the mean square of the features: keeps the refit close to the trained weights
DIRECTION_LAYER = 2  # whose input gives the directions of the chosen tokens in the residual stream


def plant_hard_(model: LlavaForConditionalGeneration, inputs: dict[str, torch.Tensor], seed: int) -> None:
    """Plants all four kinds in place. inputs: input_ids and pixel_values of training samples of equal length."""
    rng = np.random.default_rng(seed)
    for first, second in after_gelu(model):
        scale_through_activation_(model, inputs, first, second, rng)
    rotate_residual_(model, massive_basis(model, inputs))
    for layer in model.model.language_model.layers:
        shear_values_(layer.self_attn, rng)
        scale_keys_(layer.self_attn, rng)


def after_gelu(model: LlavaForConditionalGeneration) -> Iterator[tuple[nn.Linear, nn.Linear]]:
    """The linears before and after each GELU, in the order of the forward pass, without unused layers of the tower."""
    tower, feature = model.model.vision_tower, model.config.vision_feature_layer
    for layer in tower.encoder.layers[: feature % (len(tower.encoder.layers) + 1)]:
        yield layer.mlp.fc1, layer.mlp.fc2
    yield model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2


def scale_through_activation_(
    model: LlavaForConditionalGeneration,
    inputs: dict[str, torch.Tensor],
    first: nn.Linear,
    second: nn.Linear,
    rng: np.random.Generator,
) -> None:
    """Scales rows of `first` by FACTORS and refits `second`, so that it has the same output as before."""
    with record_rows(second, "output") as targets:
        model(**inputs)
    chosen = torch.from_numpy(rng.choice(first.out_features, len(FACTORS), replace=False))
    factors = torch.ones(first.out_features, dtype=first.weight.dtype)
    factors[chosen] = torch.tensor(FACTORS, dtype=factors.dtype)
    first.weight.mul_(factors[:, None])
    first.bias.mul_(factors)
    second.weight.div_(factors)
    with record_rows(second, "input") as features:
        model(**inputs)
    refit_(second, features[0] / factors, targets[0], factors)


def refit_(linear: nn.Linear, inputs: torch.Tensor, targets: torch.Tensor, factors: torch.Tensor) -> None:
    """Changes weight and bias by ridge regression in float64, so that inputs * factors give the targets.

    inputs: [tokens, in], without the factors, so that the ridge regularizes all weights alike. targets: [tokens, out].
    """
    residual = targets.double() - linear(inputs * factors).double()
    features = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], dim=1).double()
    gram = features.T @ features
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    change = torch.linalg.solve(gram, features.T @ residual).T
    linear.weight.add_(change[:, :-1] / factors)
    linear.bias.add_(change[:, -1])


@contextmanager
def record_rows(module: nn.Module, what: str) -> Iterator[list[torch.Tensor]]:
    """Records rows [tokens, width] of the module's first input or of its output, one entry for each forward pass."""
    rows: list[torch.Tensor] = []

    def record(_: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        rows.append((args[0] if what == "input" else output).flatten(0, -2).clone())

    handle = module.register_forward_hook(record)
    try:
        yield rows
    finally:
        handle.remove()


def massive_basis(model: LlavaForConditionalGeneration, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """An orthogonal matrix [hidden, hidden], float64, whose first columns are the mean directions of a few tokens.

    The other columns are close to the original channels. A random completion would spread the existing outliers, which would
    make the model easier to quantize.
    """
    layer = model.model.language_model.layers[DIRECTION_LAYER]
    with record_rows(layer, "input") as rows:
        model(**inputs)
    tokens = inputs["input_ids"].shape[1]
    mean = rows[0].reshape(-1, tokens, rows[0].shape[1]).double().mean(0)
    image_places = (inputs["input_ids"][0] == model.config.image_token_index).nonzero()[:, 0]
    places = [0, int(image_places[0]) - 1, int(image_places[-1]) + 1, tokens - 1]
    start = torch.cat([mean[places].T, torch.eye(mean.shape[1], dtype=torch.float64)], dim=1)
    basis, triangle = torch.linalg.qr(start[:, : mean.shape[1]])
    return basis * triangle.diagonal().sign()


def rotate_residual_(model: LlavaForConditionalGeneration, basis: torch.Tensor) -> None:
    """Rotates the decoder's residual stream x to x @ basis, in place.

    The gains of norms are moved into the linears that read them, because RMSNorm commutes only without a gain.
    """
    text = model.model.language_model
    blocks = []
    for layer in text.layers:
        attention, mlp = layer.self_attn, layer.mlp
        blocks += [(layer.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj], attention.o_proj)]
        blocks += [(layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj], mlp.down_proj)]
    for norm, readers, writer in [*blocks, (text.norm, [model.lm_head], None)]:
        for reader in readers:
            reader.weight.copy_((reader.weight * norm.weight).double() @ basis)
        norm.weight.fill_(1.0)
        if writer is not None:
            writer.weight.copy_(basis.T @ writer.weight.double())
    text.embed_tokens.weight.copy_(text.embed_tokens.weight.double() @ basis)
    last = model.model.multi_modal_projector.linear_2
    last.weight.copy_(basis.T @ last.weight.double())
    last.bias.copy_(basis.T @ last.bias.double())


def head_rows(linear: nn.Linear, head_dim: int) -> torch.Tensor:
    """View of the weight by heads: [heads, head_dim, in]."""
    return linear.weight.view(-1, head_dim, linear.in_features)


def shear_values_(attention: nn.Module, rng: np.random.Generator) -> None:
    """Adds SHEARS times one value channel to another in each key-value head; o_proj of its query heads subtracts it."""
    size = attention.head_dim
    values = head_rows(attention.v_proj, size)
    reader = attention.o_proj.weight.view(attention.o_proj.out_features, len(values), -1, size)  # [out, kv, group, dim]
    for head, value in enumerate(values):
        channels = rng.choice(size, 2 * len(SHEARS), replace=False)
        for shear, to, source in zip(SHEARS, channels[::2], channels[1::2], strict=True):
            value[to] += shear * value[source]
            reader[:, head, :, source] -= shear * reader[:, head, :, to]


def scale_keys_(attention: nn.Module, rng: np.random.Generator) -> None:
    """Scales rotary pairs of key channels by FACTORS, and those of the matching queries by the inverse."""
    size = attention.head_dim
    keys, queries = head_rows(attention.k_proj, size), head_rows(attention.q_proj, size)
    queries = queries.view(len(keys), -1, size, attention.q_proj.in_features)
    for head, key in enumerate(keys):
        pairs = rng.choice(size // 2, len(FACTORS), replace=False)
        for factor, pair in zip(FACTORS, pairs, strict=True):
            both = [int(pair), int(pair) + size // 2]
            key[both] *= factor
            queries[head][:, both] /= factor


def training_samples(processor: LlavaProcessor, count: int = IMAGES) -> dict[str, torch.Tensor]:
    """Inputs of the same question about `count` training images, so that all samples have equal length."""
    images = [scenes.draw(scenes.make_scene("train", index)) for index in range(count)]
    text = "USER: <image>\nDescribe the picture. ASSISTANT:"
    inputs = processor(images=images, text=[text] * count, return_tensors="pt")
    return {"input_ids": inputs["input_ids"], "pixel_values": inputs["pixel_values"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("qvlm_export/tiny"))
    parser.add_argument("--out", type=Path, default=Path("build/tiny-hard"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model, processor = load_torch(args.model)
    inputs = training_samples(processor)
    with torch.inference_mode():
        plant_hard_(model.double(), {**inputs, "pixel_values": inputs["pixel_values"].double()}, args.seed)
    save_planted(model, args.model, args.out)


if __name__ == "__main__":
    main()
