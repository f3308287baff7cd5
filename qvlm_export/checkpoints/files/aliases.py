"""Table of short names (aliases) for well-known Hugging Face repositories, for --model.

Every alias has the geometry of its model, so that its sizes can be listed without a download.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qvlm_export.engines.config import ModelConfig, ProjectorConfig, TextConfig, TileConfig, VisionConfig

TINY = "tiny"  # the model shipped with the package


@dataclass(frozen=True)
class Alias:
    """A Hugging Face repository and its geometry. Only the sizes in `config` are exact, not epsilons, for example."""

    repository: str
    config: ModelConfig


def _clip(image_size: int = 336, feature_layers: tuple[int, ...] = (23,)) -> VisionConfig:
    """Returns CLIP ViT-L/14 up to the layer before the last."""
    return VisionConfig(1024, 4096, 23, 16, image_size, 14, 1e-5, "quick_gelu", False, feature_layers)


_SIGLIP = VisionConfig(
    1152, 4304, 26, 16, 384, 14, 1e-6, "gelu_pytorch_tanh", False, (26,), class_token=False, pre_norm=False, patch_bias=True
)


def _decoder(sizes: tuple[int, int, int, int, int], vocabulary: int, **overrides: Any) -> TextConfig:
    """Returns a Llama decoder. sizes: hidden_size, intermediate_size, layers, heads, key/value heads.

    overrides: other fields of TextConfig; head_dim is hidden_size / heads where it is not among them.
    """
    hidden, intermediate, layers, heads, kv_heads = sizes
    defaults = {"attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False, "head_dim": hidden // heads}
    return TextConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        rms_norm_eps=1e-5,
        max_position_embeddings=4096,
        **{**defaults, **overrides},
    )


_VICUNA_7B, _VICUNA_13B = (4096, 11008, 32, 32, 32), (5120, 13824, 40, 40, 40)
_GQA_8B = (4096, 14336, 32, 32, 8)  # Mistral 7B, Llama 3 8B: grouped-query attention
_YI_34B = (7168, 20480, 60, 56, 8)
_QWEN1_05B, _QWEN1_7B, _QWEN1_72B = (1024, 2816, 24, 16, 16), (4096, 11008, 32, 32, 32), (8192, 24576, 80, 64, 64)
_QWEN2_05B, _QWEN2_7B, _QWEN2_72B = (896, 4864, 24, 14, 2), (3584, 18944, 28, 28, 4), (8192, 29568, 80, 64, 8)
_TWO_LINEARS, _ONE_LINEAR = ProjectorConfig("gelu", True), ProjectorConfig("linear", True, num_linears=1)
_NEXT = TileConfig(((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)))
_ONEVISION = TileConfig(tuple((384 * h, 384 * w) for h in range(1, 7) for w in range(1, 7)), 9, single_when_many=True)
_VIP_LAYERS = (23, 20, 17, 14, 6)


def _llava(text: TextConfig, **overrides: Any) -> ModelConfig:
    image_token_id = text.vocab_size - 1
    defaults: dict[str, Any] = {"vision": _clip(), "projector": _TWO_LINEARS, "text": text, "image_token_id": image_token_id}
    return ModelConfig(**{**defaults, **overrides})


def _vip(text: TextConfig) -> ModelConfig:
    return _llava(text, vision=_clip(feature_layers=_VIP_LAYERS), projector=ProjectorConfig("gelu", True, norm_eps=1e-5))


def _qwen(sizes: tuple[int, int, int, int, int], vocabulary: int, *, tie: bool = False) -> TextConfig:
    return _decoder(sizes, vocabulary, attention_bias=True, tie_word_embeddings=tie)


ALIASES = {
    "llava-7b": Alias("llava-hf/llava-1.5-7b-hf", _llava(_decoder(_VICUNA_7B, 32064))),
    "llava-13b": Alias("llava-hf/llava-1.5-13b-hf", _llava(_decoder(_VICUNA_13B, 32064))),
    "llava-7b-original": Alias("liuhaotian/llava-v1.5-7b", _llava(_decoder(_VICUNA_7B, 32064))),
    "llava-13b-original": Alias("liuhaotian/llava-v1.5-13b", _llava(_decoder(_VICUNA_13B, 32064))),
    "llava-13b-scienceqa": Alias(
        "liuhaotian/llava-lcs558k-scienceqa-vicuna-13b-v1.3",
        _llava(_decoder(_VICUNA_13B, 32064), vision=_clip(224), projector=_ONE_LINEAR),
    ),
    "bakllava-7b": Alias("llava-hf/bakLlava-v1-hf", _llava(_decoder(_GQA_8B, 32064))),
    "vip-llava-7b": Alias("llava-hf/vip-llava-7b-hf", _vip(_decoder(_VICUNA_7B, 32064))),
    "vip-llava-13b": Alias("llava-hf/vip-llava-13b-hf", _vip(_decoder(_VICUNA_13B, 32064))),
    "llava-next-7b": Alias("llava-hf/llava-v1.6-vicuna-7b-hf", _llava(_decoder(_VICUNA_7B, 32064), tiles=_NEXT)),
    "llava-next-13b": Alias("llava-hf/llava-v1.6-vicuna-13b-hf", _llava(_decoder(_VICUNA_13B, 32064), tiles=_NEXT)),
    "llava-next-mistral-7b": Alias("llava-hf/llava-v1.6-mistral-7b-hf", _llava(_decoder(_GQA_8B, 32064), tiles=_NEXT)),
    "llava-next-llama3-8b": Alias("llava-hf/llama3-llava-next-8b-hf", _llava(_decoder(_GQA_8B, 128320), tiles=_NEXT)),
    "llava-next-34b": Alias("llava-hf/llava-v1.6-34b-hf", _llava(_decoder(_YI_34B, 64064), tiles=_NEXT)),
    "llava-next-72b": Alias("llava-hf/llava-next-72b-hf", _llava(_qwen(_QWEN1_72B, 152064), tiles=_NEXT)),
    "llava-interleave-0.5b": Alias(
        "llava-hf/llava-interleave-qwen-0.5b-hf", _llava(_qwen(_QWEN1_05B, 152000, tie=True), vision=_SIGLIP)
    ),
    "llava-interleave-7b": Alias("llava-hf/llava-interleave-qwen-7b-hf", _llava(_qwen(_QWEN1_7B, 152000), vision=_SIGLIP)),
    "llava-onevision-0.5b": Alias(
        "llava-hf/llava-onevision-qwen2-0.5b-ov-hf",
        _llava(_qwen(_QWEN2_05B, 152000, tie=True), vision=_SIGLIP, tiles=_ONEVISION),
    ),
    "llava-onevision-7b": Alias(
        "llava-hf/llava-onevision-qwen2-7b-ov-hf", _llava(_qwen(_QWEN2_7B, 152128), vision=_SIGLIP, tiles=_ONEVISION)
    ),
    "llava-onevision-72b": Alias(
        "llava-hf/llava-onevision-qwen2-72b-ov-hf", _llava(_qwen(_QWEN2_72B, 152128), vision=_SIGLIP, tiles=_ONEVISION)
    ),
}
