"""Plants outliers that per-channel folding cannot undo into the tiny LLaVA: the benchmark's second model.

    python -m tools.tiny.plant_hard_outliers --model qvlm_export/tiny --out build/tiny-hard

Those of tools/tiny/plant_outliers.py are channels scaled up where a linear or a norm makes them, so dividing them out
again is
exact. Here are four kinds that it does not reach, each leaving the function as it was, or nearly:

after GELU      Rows of fc1 (tower) and linear_1 (projector) are scaled by 8 to 32. GELU(s z) / s is not GELU(z), so no
                producer's row can take the factor back; what the nonlinearity changes, a least-squares refit of the next
                linear on training pictures absorbs (nearly exact). Only a Mul at run time, or a clip, helps.
residual        The stream is rotated by an orthogonal matrix, which RMSNorm without a gain commutes with (exact). Its
                first axes point where the beginning-of-sequence token and the tokens around the picture lie, so these
                tokens put all they have into one channel, 16 times the root mean square after a norm, as the massive
                activations of real models do. The other tokens use the same channel at ordinary size: a factor that
                tames the few tokens magnifies the weights that all need.
values          Inside each key-value head one value channel is added, many times over, to another, and o_proj takes it off
                again (exact: attention mixes tokens, not channels). Dividing channels cannot undo a shear: the sum is
                large, and its small part is what counts. One head is read by several query heads.
keys            Rows of k_proj are scaled up and those of q_proj down, by one factor for both channels of a rotary pair
                (exact). Keys are read by no linear, so nothing here quantizes them; a KV cache would.

Everything is computed in float64 and stored in float16, so that every processor plants the same bytes.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from tools.tiny import scenes
from tools.tiny.accuracy import load_torch
from tools.tiny.plant_outliers import FACTORS

PICTURES = 256
SHEARS = (8.0, 8.0, 4.0)  # what W8A8 round-to-nearest just survives
RIDGE = 1e-3  # of the features' mean square: keeps the refit near the weights that were trained
DIRECTION_LAYER = 2  # where the residual stream of the chosen tokens is looked at


def plant_hard_(model: LlavaForConditionalGeneration, given: dict[str, torch.Tensor], seed: int) -> None:
    """All four kinds, in place. given: input_ids and pixel_values of training samples of equal length."""
    rng = np.random.default_rng(seed)
    for first, second in after_gelu(model):
        scale_through_activation_(model, given, first, second, rng)
    rotate_residual_(model, massive_basis(model, given))
    for layer in model.model.language_model.layers:
        shear_values_(layer.self_attn, rng)
        scale_keys_(layer.self_attn, rng)


def after_gelu(model: LlavaForConditionalGeneration) -> Iterator[tuple[nn.Linear, nn.Linear]]:
    """The linears before and after each GELU, in the order they run; the tower's unused layers are left out."""
    tower, feature = model.model.vision_tower, model.config.vision_feature_layer
    for layer in tower.encoder.layers[: feature % (len(tower.encoder.layers) + 1)]:
        yield layer.mlp.fc1, layer.mlp.fc2
    yield model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2


def scale_through_activation_(
    model: LlavaForConditionalGeneration,
    given: dict[str, torch.Tensor],
    first: nn.Linear,
    second: nn.Linear,
    rng: np.random.Generator,
) -> None:
    """Scales rows of `first` by FACTORS and refits `second` to give what it gave before."""
    with kept(second, "output") as wanted:
        model(**given)
    chosen = torch.from_numpy(rng.choice(first.out_features, len(FACTORS), replace=False))
    factors = torch.ones(first.out_features, dtype=first.weight.dtype)
    factors[chosen] = torch.tensor(FACTORS, dtype=factors.dtype)
    first.weight.mul_(factors[:, None])
    first.bias.mul_(factors)
    second.weight.div_(factors)
    with kept(second, "input") as inputs:
        model(**given)
    refit_(second, inputs[0] / factors, wanted[0], factors)


def refit_(linear: nn.Linear, inputs: torch.Tensor, wanted: torch.Tensor, factors: torch.Tensor) -> None:
    """A small change of weight and bias after which inputs * factors give wanted, in float64: ridge regression.

    inputs: [tokens, in], of one size in all channels, so that the ridge holds all weights back alike; wanted: [tokens, out].
    """
    missing = wanted.double() - linear(inputs * factors).double()
    features = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], dim=1).double()
    gram = features.T @ features
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    change = torch.linalg.solve(gram, features.T @ missing).T
    linear.weight.add_(change[:, :-1] / factors)
    linear.bias.add_(change[:, -1])


@contextmanager
def kept(module: nn.Module, what: str) -> Iterator[list[torch.Tensor]]:
    """Rows [tokens, width] of the module's first input or its output, while the context is open."""
    rows: list[torch.Tensor] = []

    def keep(_: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        rows.append((args[0] if what == "input" else output).flatten(0, -2).clone())

    handle = module.register_forward_hook(keep)
    try:
        yield rows
    finally:
        handle.remove()


def massive_basis(model: LlavaForConditionalGeneration, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """An orthogonal matrix [hidden, hidden], float64: its first columns are where a few tokens lie, the rest stay close to
    the channels there were. A random completion would spread the outliers that are there, which makes a model easier."""
    layer = model.model.language_model.layers[DIRECTION_LAYER]
    with kept(layer, "input") as rows:
        model(**given)
    tokens = given["input_ids"].shape[1]
    mean = rows[0].reshape(-1, tokens, rows[0].shape[1]).double().mean(0)
    is_image = (given["input_ids"][0] == model.config.image_token_index).nonzero()[:, 0]
    places = [0, int(is_image[0]) - 1, int(is_image[-1]) + 1, tokens - 1]
    start = torch.cat([mean[places].T, torch.eye(mean.shape[1], dtype=torch.float64)], dim=1)
    basis, triangle = torch.linalg.qr(start[:, : mean.shape[1]])
    return basis * triangle.diagonal().sign()


def rotate_residual_(model: LlavaForConditionalGeneration, basis: torch.Tensor) -> None:
    """Turns the decoder's residual stream x into x @ basis. Norm gains go into the readers: only then do norms commute."""
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
    """The weight by heads, a view: [heads, head_dim, in]."""
    return linear.weight.view(-1, head_dim, linear.in_features)


def shear_values_(attention: nn.Module, rng: np.random.Generator) -> None:
    """In each key-value head, adds SHEARS times one channel to another; o_proj of all its query heads takes it off."""
    size = attention.head_dim
    values = head_rows(attention.v_proj, size)
    reader = attention.o_proj.weight.view(attention.o_proj.out_features, len(values), -1, size)  # [out, kv, group, dim]
    for head, value in enumerate(values):
        channels = rng.choice(size, 2 * len(SHEARS), replace=False)
        for shear, to, source in zip(SHEARS, channels[::2], channels[1::2], strict=True):
            value[to] += shear * value[source]
            reader[:, head, :, source] -= shear * reader[:, head, :, to]


def scale_keys_(attention: nn.Module, rng: np.random.Generator) -> None:
    """Scales rotary pairs of keys by FACTORS, those of the queries that meet them by the inverse."""
    size = attention.head_dim
    keys, queries = head_rows(attention.k_proj, size), head_rows(attention.q_proj, size)
    queries = queries.view(len(keys), -1, size, attention.q_proj.in_features)
    for head, key in enumerate(keys):
        pairs = rng.choice(size // 2, len(FACTORS), replace=False)
        for factor, pair in zip(FACTORS, pairs, strict=True):
            both = [int(pair), int(pair) + size // 2]
            key[both] *= factor
            queries[head][:, both] /= factor


def training_samples(processor: LlavaProcessor, count: int = PICTURES) -> dict[str, torch.Tensor]:
    """One question on many training pictures, so that all have one length."""
    drawn = [scenes.draw(scenes.make_scene("train", index)) for index in range(count)]
    text = "USER: <image>\nDescribe the picture. ASSISTANT:"
    given = processor(images=drawn, text=[text] * count, return_tensors="pt")
    return {"input_ids": given["input_ids"], "pixel_values": given["pixel_values"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("qvlm_export/tiny"))
    parser.add_argument("--out", type=Path, default=Path("build/tiny-hard"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model, processor = load_torch(args.model)
    given = training_samples(processor)
    with torch.inference_mode():
        plant_hard_(model.double(), {**given, "pixel_values": given["pixel_values"].double()}, args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(args.out)
    for path in args.model.iterdir():
        if path.suffix in (".json", ".jinja") and not (args.out / path.name).exists():
            shutil.copy(path, args.out / path.name)


if __name__ == "__main__":
    main()
