"""The geometry of a LLaVA as the graphs need it: plain numbers, no framework."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class VisionConfig:
    """A CLIP tower. `num_layers` counts the layers that run, up to the one whose output is the feature."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    image_size: int
    patch_size: int
    layer_norm_eps: float
    hidden_act: str
    keep_class_token: bool

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def tokens_per_image(self) -> int:
        return self.num_patches + int(self.keep_class_token)


@dataclass(frozen=True)
class ProjectorConfig:
    """The two linears between tower and decoder."""

    hidden_act: str
    bias: bool


@dataclass(frozen=True)
class TextConfig:
    """A Llama decoder."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    attention_bias: bool
    mlp_bias: bool
    tie_word_embeddings: bool


@dataclass(frozen=True)
class ModelConfig:
    """Tower, projector, decoder, and the token that stands for one image patch."""

    vision: VisionConfig
    projector: ProjectorConfig
    text: TextConfig
    image_token_id: int


@dataclass(frozen=True)
class Limits:
    """What an engine is built for. `max_length` counts prompt, image and generated tokens of one sequence."""

    max_length: int
    max_batch: int = 1
    max_images: int = 4
