"""One block of random weights of each kind of decoder and tower."""

from __future__ import annotations

import torch
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, MistralConfig, Qwen2Config, SiglipVisionConfig
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

from qvlm_export.calibrate.blockwise.forward import Run

TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
VISION = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
TOWERS = {"clip": (CLIPEncoderLayer, CLIPVisionConfig), "siglip": (SiglipEncoderLayer, SiglipVisionConfig)}
DECODERS = {
    "llama": (LlamaDecoderLayer, LlamaConfig),
    "mistral": (MistralDecoderLayer, MistralConfig),
    "qwen2": (Qwen2DecoderLayer, Qwen2Config),
}
KINDS = (*TOWERS, *DECODERS)


def make_block(kind: str) -> tuple[nn.Module, Run]:
    """A block of random weights, and how to run it."""
    torch.manual_seed(0)
    if kind in TOWERS:
        layer, config = TOWERS[kind]
        return layer(config(**VISION)).eval().requires_grad_(False), lambda module, x: module(x, attention_mask=None)
    layer, config = DECODERS[kind]
    rotary = LlamaRotaryEmbedding(LlamaConfig(**TEXT))

    def run(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(x.shape[1])[None]
        return module(x, attention_mask=None, position_ids=positions, position_embeddings=rotary(x, positions))

    return layer(config(**TEXT), 0).eval().requires_grad_(False), run
