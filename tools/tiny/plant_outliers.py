"""Plants outlier channels into the trained tiny LLaVA by inverse equalization, and writes the checkpoint that ships.

    python -m tools.tiny.plant_outliers --trained build/tiny/unplanted --out qvlm_export/tiny

Real language models have a few channels with activations tens of times larger than the rest. A model this small has none,
so every quantizer would look good on it. Each planted channel is scaled up by a power of two in the layer that produces it
(norm gain, up_proj row, v_proj row), and the columns of the linears that read it are divided by the same factor. In exact
arithmetic the model computes the same function; in float16 only weights that become subnormal change.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import numpy as np
import torch
from transformers import LlavaForConditionalGeneration

# Powers of two, with a heavy tail as in real models. Larger ones would make W8A8 round-to-nearest fail.
FACTORS = (32.0, 16.0, 16.0, 8.0, 8.0, 8.0)


def random_factors(rng: np.random.Generator, width: int) -> torch.Tensor:
    """A vector of ones with FACTORS at random places, float32 [width]."""
    scale = torch.ones(width)
    scale[torch.from_numpy(rng.choice(width, len(FACTORS), replace=False))] = torch.tensor(FACTORS)
    return scale


def scale_up_(tensors: list[torch.Tensor], scale: torch.Tensor) -> None:
    """Multiplies the rows (of matrices) or elements (of vectors) of the tensors by `scale`, in place."""
    for tensor in tensors:
        tensor.mul_(scale.to(tensor.dtype).reshape(-1, *[1] * (tensor.ndim - 1)))


def scale_down_(linears: list[torch.nn.Linear], scale: torch.Tensor) -> None:
    """Divides the input columns of the linears by `scale`, in place."""
    for linear in linears:
        linear.weight.div_(scale.to(linear.weight.dtype))


def plant_(model: LlavaForConditionalGeneration, seed: int) -> None:
    """Plants outlier channels at the outputs of the layers' norms, up projections and value projections, in place.

    The outliers after norms are in the same channels in all layers.
    """
    rng = np.random.default_rng(seed)
    text = model.model.language_model
    residual = random_factors(rng, text.config.hidden_size)
    for layer in text.layers:
        attention, mlp = layer.self_attn, layer.mlp
        scale_up_([layer.input_layernorm.weight], residual)
        scale_down_([attention.q_proj, attention.k_proj, attention.v_proj], residual)
        scale_up_([layer.post_attention_layernorm.weight], residual)
        scale_down_([mlp.gate_proj, mlp.up_proj], residual)
        inner = random_factors(rng, text.config.intermediate_size)
        scale_up_([mlp.up_proj.weight], inner)
        scale_down_([mlp.down_proj], inner)
        value = random_factors(rng, attention.v_proj.out_features)
        scale_up_([attention.v_proj.weight], value)
        # Grouped-query attention: each value channel is read by all query heads of its group.
        heads = value.reshape(text.config.num_key_value_heads, -1)
        shared = heads.repeat_interleave(text.config.num_attention_heads // text.config.num_key_value_heads, dim=0)
        scale_down_([attention.o_proj], shared.reshape(-1))
    tower = model.model.vision_tower
    patch = random_factors(rng, tower.config.hidden_size)
    for layer in tower.encoder.layers:
        attention = layer.self_attn
        scale_up_([layer.layer_norm1.weight, layer.layer_norm1.bias], patch)
        scale_down_([attention.q_proj, attention.k_proj, attention.v_proj], patch)
        scale_up_([layer.layer_norm2.weight, layer.layer_norm2.bias], patch)
        scale_down_([layer.mlp.fc1], patch)


def save_planted(model: LlavaForConditionalGeneration, source: Path, out: Path) -> None:
    """Writes the model in float16 into the folder `out`, with the tokenizer, processor and chat template of `source`."""
    out.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(out)
    for path in source.iterdir():
        if path.suffix in (".json", ".jinja") and not (out / path.name).exists():
            shutil.copy(path, out / path.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trained", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model = LlavaForConditionalGeneration.from_pretrained(args.trained, dtype=torch.float32)
    with torch.no_grad():
        plant_(model, args.seed)
    save_planted(model, args.trained, args.out)


if __name__ == "__main__":
    main()
