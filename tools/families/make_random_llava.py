"""Writes a LLaVA checkpoint of real geometry with random weights, shard by shard, in the memory of one shard.

    python -m tools.families.make_random_llava --like llava-13b --out /big/disk/llava-13b-random

config.json, tensor names and shapes are those of the llava-hf 1.5 repositories. The weights have a spread like that of
trained ones and a few outlier channels, so that quantizers meet realistic ranges. The tokenizer is that of the tiny model,
which can encode any text; random weights do not need a better one.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from qvlm_export.checkpoints.model_config import model_config
from qvlm_export.engines.graph.float_graphs import expected_shapes
from tools.tiny import model

SHARD_BYTES = 2 * 2**30
OUTLIER_CHANNELS, OUTLIER_FACTOR = 6, 20.0


@dataclass(frozen=True)
class Geometry:
    """A decoder's size; the tower is CLIP ViT-L/14 at 336 pixels unless `small_tower`."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    small_tower: bool = False


GEOMETRIES = {
    "llava-13b": Geometry(5120, 13824, 40, 40, 40),
    "llava-7b": Geometry(4096, 11008, 32, 32, 32),
    "13b-tenth": Geometry(5120, 13824, 4, 40, 40),  # a tenth of its layers, to measure the time and memory of one
    "1b": Geometry(2048, 8192, 16, 32, 8),
    "1b-quarter": Geometry(
        2048, 8192, 4, 32, 8, small_tower=True
    ),  # to profile the decoding of 1b: too large for a processor's caches
    "100m": Geometry(768, 2048, 12, 12, 4, small_tower=True),
}


def make_config(geometry: Geometry, image_token: int) -> LlavaConfig:
    """The configuration of LLaVA 1.5 at this size. image_token: its index in the tokenizer."""
    tower = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    if geometry.small_tower:
        tower = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 6}
    return LlavaConfig(
        vision_config=CLIPVisionConfig(**tower, image_size=336, patch_size=14, projection_dim=768),
        text_config=LlamaConfig(
            vocab_size=32064,
            hidden_size=geometry.hidden_size,
            intermediate_size=geometry.intermediate_size,
            num_hidden_layers=geometry.layers,
            num_attention_heads=geometry.heads,
            num_key_value_heads=geometry.kv_heads,
            max_position_embeddings=4096,
            rms_norm_eps=1e-5,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=3,
        ),
        image_token_index=image_token,
        image_seq_length=576,
        dtype="float16",
    )


def random_tensor(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """A random float16 tensor with a spread that fits its name.

    Norm gains lie around 0.5 with a few outlier channels, matrices have a standard deviation of 1 / sqrt(in), also with
    outlier channels, and biases are small.
    """
    if "norm" in name:
        gain = 0.5 + 0.05 * torch.randn(shape, generator=generator)
        if name.endswith("bias"):
            return (gain - 0.5).half()
        gain[torch.randint(shape[0], (OUTLIER_CHANNELS,), generator=generator)] *= OUTLIER_FACTOR / 4
        return gain.half()
    if len(shape) < 2:
        return (0.02 * torch.randn(shape, generator=generator)).half()
    spread = 0.02 if "embed" in name else 1 / math.sqrt(math.prod(shape[1:]))
    tensor = torch.randn(shape, generator=generator).mul_(spread)
    if len(shape) == 2:
        tensor[:, torch.randint(shape[1], (OUTLIER_CHANNELS,), generator=generator)] *= OUTLIER_FACTOR / 10
    return tensor.half()


def write_checkpoint(out: Path, geometry: Geometry, seed: int) -> None:
    """Writes weights, configuration and processor to the folder `out`; the index of the shards is written last."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = model.train_tokenizer(num_scenes=50)
    config = make_config(geometry, tokenizer.convert_tokens_to_ids("<image>"))
    shapes = expected_shapes(model_config(config, "the new config"))
    generator = torch.Generator().manual_seed(seed)
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}

    def flush() -> None:
        if shard:
            name = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
            save_file(shard, out / name, {"format": "pt"})
            weight_map.update(dict.fromkeys(shard, name))
            shard.clear()

    for name, shape in shapes.items():
        shard[name] = random_tensor(name, shape, generator)
        if sum(t.nbytes for t in shard.values()) > SHARD_BYTES:
            flush()
    flush()
    config.save_pretrained(out)
    processor = model.make_processor(tokenizer)
    processor.image_processor.size = {"shortest_edge": 336}
    processor.image_processor.crop_size = {"height": 336, "width": 336}
    processor.patch_size = 14
    processor.save_pretrained(out)
    index = {"metadata": {}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--like", choices=GEOMETRIES, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_checkpoint(args.out, GEOMETRIES[args.like], args.seed)


if __name__ == "__main__":
    main()
