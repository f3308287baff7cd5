"""Model configuration of a LLaVA: the numbers that the graphs and engines are built from.

Plain data. It is read from a checkpoint's config.json, and from the manifest of an export.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# What the graphs can compute between two linears, by transformers' names.
Activation = Literal["quick_gelu", "gelu", "gelu_pytorch_tanh", "silu", "linear"]


@dataclass(frozen=True)
class VisionConfig:
    """A CLIP or SigLIP vision tower.

    num_layers: layers that run, up to the last one whose output is a feature. image_size, patch_size: side in pixels.
    feature_layers: after how many layers each feature is taken; features are concatenated along the width. class_token:
    whether a class token precedes the patches, as in CLIP. keep_class_token: whether it reaches the projector. pre_norm:
    whether there is a norm before the first layer. patch_bias: whether the patch convolution has a bias.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    image_size: int
    patch_size: int
    layer_norm_eps: float
    hidden_act: Activation
    keep_class_token: bool
    feature_layers: tuple[int, ...]
    class_token: bool = True
    pre_norm: bool = True
    patch_bias: bool = False

    @property
    def patches_per_side(self) -> int:
        """Patches along one side of an image."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of one image."""
        return self.patches_per_side**2

    @property
    def feature_size(self) -> int:
        """Width of the concatenated features."""
        return self.hidden_size * len(self.feature_layers)

    @property
    def tokens_per_image(self) -> int:
        """Tokens that one image, or one tile, becomes: its patches and a class token that is kept."""
        return self.num_patches + int(self.keep_class_token)


@dataclass(frozen=True)
class ProjectorConfig:
    """The projector between tower and decoder: one or two linears.

    hidden_act: activation between two linears. norm_eps: epsilon of a layer norm before the linears, None without one.
    """

    hidden_act: Activation
    bias: bool
    num_linears: int = 2
    norm_eps: float | None = None


@dataclass(frozen=True)
class TextConfig:
    """A decoder of the Llama kind: Llama, Mistral or Qwen2.

    attention_bias: whether q, k and v have a bias; output_bias: whether o has one. sliding_window: number of positions
    that a token attends to, itself included; None for all. rope_frequencies: radians per position of each pair of channels,
    [head_dim / 2], empty where only sizes are known; rope_scale: the factor of cos and sin.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    attention_bias: bool
    mlp_bias: bool
    tie_word_embeddings: bool
    output_bias: bool = False
    sliding_window: int | None = None
    hidden_act: Activation = "silu"
    rope_frequencies: tuple[float, ...] = ()
    rope_scale: float = 1.0


# A grid of features is downscaled to its limit when its side exceeds the side of the limit by more than this factor.
COARSER_FROM = 1.1


@dataclass(frozen=True)
class TileConfig:
    """How an image is cut into tiles of the tower's size; the first tile is a small copy of the whole image.

    pinpoints: sizes (height, width) in pixels that an image may be fitted into. max_tiles: a larger grid of features is
    downscaled to the size of so many tiles; None for no limit. single_when_many: images that come together in one turn have
    the first tile only. Features of padding are removed, and every row of the grid ends with the `image_newline` vector,
    which is the last row of the vision graph's output.
    """

    pinpoints: tuple[tuple[int, int], ...]
    max_tiles: int | None = None
    single_when_many: bool = False


@dataclass(frozen=True)
class ModelConfig:
    """A whole LLaVA: tower, projector, decoder.

    image_token_id: the token that stands for one image feature. tiles: None for one tile an image.
    """

    vision: VisionConfig
    projector: ProjectorConfig
    text: TextConfig
    image_token_id: int
    tiles: TileConfig | None = None

    @property
    def most_tiles(self) -> int:
        """Number of tiles of the largest image."""
        if self.tiles is None:
            return 1
        side = self.vision.image_size
        return 1 + max((height // side) * (width // side) for height, width in self.tiles.pinpoints)

    @property
    def most_image_tokens(self) -> int:
        """Number of tokens of the largest image."""
        if self.tiles is None:
            return self.vision.tokens_per_image
        patches, side = self.vision.patches_per_side, self.vision.image_size
        grids = [(height // side * patches, width // side * patches) for height, width in self.tiles.pinpoints]
        max_features = float("inf")
        if self.tiles.max_tiles is not None:
            max_features = COARSER_FROM**2 * self.tiles.max_tiles * patches**2
        return self.vision.num_patches + max(int(min(rows * columns, max_features)) + rows for rows, columns in grids)


@dataclass(frozen=True)
class Limits:
    """The largest inputs that an engine is built for.

    max_length: prompt, image and generated tokens of one sequence together. max_batch: sequences. max_images: images, or
    tiles of them, in one run of the vision engine.
    """

    max_length: int
    max_batch: int = 1
    max_images: int = 4
