"""The geometry of a LLaVA as the graphs need it: plain numbers, no framework."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class VisionConfig:
    """A CLIP or SigLIP tower. `num_layers` counts the layers that run, up to the last one whose output is a feature.

    feature_layers: after how many layers each feature is taken; features are joined along the width. class_token: CLIP
    puts one before the patches, `keep_class_token` says whether it reaches the projector. pre_norm: a norm before the
    first layer. patch_bias: whether the patch convolution has one.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    image_size: int
    patch_size: int
    layer_norm_eps: float
    hidden_act: str
    keep_class_token: bool
    feature_layers: tuple[int, ...]
    class_token: bool = True
    pre_norm: bool = True
    patch_bias: bool = False

    @property
    def patches_per_side(self) -> int:
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.patches_per_side**2

    @property
    def feature_size(self) -> int:
        return self.hidden_size * len(self.feature_layers)

    @property
    def tokens_per_image(self) -> int:
        return self.num_patches + int(self.keep_class_token)


@dataclass(frozen=True)
class ProjectorConfig:
    """What lies between tower and decoder: one linear or two. norm_eps: of a layer norm before them, None for none."""

    hidden_act: str
    bias: bool
    num_linears: int = 2
    norm_eps: float | None = None


@dataclass(frozen=True)
class TextConfig:
    """A Llama decoder, or one of its kin: Mistral, Qwen2.

    attention_bias: of q, k and v; output_bias: of o. sliding_window: how many positions a token sees, itself included;
    None for all.
    """

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
    output_bias: bool = False
    sliding_window: int | None = None


# How much larger than its limit a grid of features may be (in side, as a factor) before it is made coarser.
COARSER_FROM = 1.1


@dataclass(frozen=True)
class TileConfig:
    """How a picture is cut into tiles of the tower's size, beside a small copy of the whole, the first tile.

    pinpoints: the sizes [height, width] in pixels that a picture may be fitted into. max_tiles: of how many tiles the
    features are kept at most, by making their grid coarser; None for all. single_when_many: pictures that come together in
    one turn have no tiles but the first. The features of the grid lose the padding, and every row of it ends with the
    `image_newline` vector, which the vision graph puts out as its last row.
    """

    pinpoints: tuple[tuple[int, int], ...]
    max_tiles: int | None = None
    single_when_many: bool = False


@dataclass(frozen=True)
class ModelConfig:
    """Tower, projector, decoder, and the token that stands for one image patch. tiles: None for one tile a picture."""

    vision: VisionConfig
    projector: ProjectorConfig
    text: TextConfig
    image_token_id: int
    tiles: TileConfig | None = None

    @property
    def most_tiles(self) -> int:
        """Tiles of the largest picture."""
        if self.tiles is None:
            return 1
        side = self.vision.image_size
        return 1 + max((height // side) * (width // side) for height, width in self.tiles.pinpoints)

    @property
    def most_image_tokens(self) -> int:
        """Tokens of the largest picture."""
        if self.tiles is None:
            return self.vision.tokens_per_image
        patches, side = self.vision.patches_per_side, self.vision.image_size
        grids = [(height // side * patches, width // side * patches) for height, width in self.tiles.pinpoints]
        most = float("inf")
        if self.tiles.max_tiles is not None:  # a grid of more than 1.1 times the side of the limit is scaled down to it
            most = COARSER_FROM**2 * self.tiles.max_tiles * patches**2
        return self.vision.num_patches + max(int(min(rows * columns, most)) + rows for rows, columns in grids)


@dataclass(frozen=True)
class Limits:
    """What an engine is built for. `max_length` counts prompt, image and generated tokens of one sequence.

    max_images: pictures, or tiles of them, that one run of the vision engine takes.
    """

    max_length: int
    max_batch: int = 1
    max_images: int = 4
