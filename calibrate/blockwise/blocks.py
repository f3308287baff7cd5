"""A LLaVA model as a sequence of blocks (layers and projector), one of which is in memory at a time.

The modules are those of transformers, made on the meta device without memory. A block's weights are loaded from the
checkpoint when it runs and released afterwards, so the arithmetic is the reference's and a 13B model needs the memory of
one layer.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig

from qvlm_export.calibrate.blockwise.float_model import attention_window, declared, make_float_model
from qvlm_export.calibrate.checkpoint.prefix import PrefixCache
from qvlm_export.calibrate.checkpoint.tensor_source import TensorSource
from qvlm_export.calibrate.errors import UserError
from qvlm_export.calibrate.numerics.activation_functions import use_deterministic_activations
from qvlm_export.calibrate.numerics.matmul import use_matmul_linears
from qvlm_export.calibrate.numerics.threads import one_thread

# Parameters of a block below which a second thread gains nothing, while how it divides small matrices changes last bits.
SMALL_BLOCK = 2**22
SINGLE_LINEAR = "single_linear_projector"  # a key of ours in configurations that were converted


@dataclass(frozen=True)
class Block:
    """A part of the model that is loaded as one.

    prefix: of the canonical names of its tensors. module: on the meta device except while it is loaded.
    """

    prefix: str
    module: nn.Module

    def linear_names(self) -> list[str]:
        """Canonical names of the block's linears."""
        return [f"{self.prefix}.{n}" for n, m in self.module.named_modules() if isinstance(m, nn.Linear)]

    def tensor_names(self) -> list[str]:
        """Canonical names of the block's parameters."""
        return [f"{self.prefix}.{n}" for n, _ in self.module.named_parameters()]


@dataclass(frozen=True)
class ModelBlocks:
    """The model's blocks in the order they run, and what runs between them.

    entries: patch embeddings, and the norm after them where a tower has one. features: after how many vision layers each
    feature is taken. rotary: computes cos and sin for the decoder layers. drop_first: whether the first token of a feature,
    CLIP's class token, is left out. vocabulary: number of the decoder's tokens. sliding_window: how many positions a token
    attends to, itself included; None for all. final_epsilon: of the decoder's last norm. prefix: keys and values of the
    tokens that all prompts begin with, behind which the decoder layers start; None where they compute all tokens.
    """

    entries: tuple[Block, ...]
    vision_layers: tuple[Block, ...]
    features: tuple[int, ...]
    projector: Block
    text_layers: tuple[Block, ...]
    rotary: nn.Module
    drop_first: bool
    image_token_id: int
    vocabulary: int
    sliding_window: int | None = None
    final_epsilon: float = 1e-6
    prefix: PrefixCache | None = None

    def vision(self) -> tuple[Block, ...]:
        """Tower layers and projector, in the order they run."""
        return (*self.vision_layers, self.projector)

    def all(self) -> tuple[Block, ...]:
        """Every block that a calibration pass visits, in the order they run."""
        return (*self.vision(), *self.text_layers)

    def quantizable(self) -> list[str]:
        """Canonical names of all linears that can be quantized, in the order they run; lm_head is not among them."""
        return [name for block in self.all() for name in block.linear_names()]

    def text_width(self) -> int:
        """The width of the decoder's hidden states."""
        return self.text_layers[0].module.get_parameter("input_layernorm.weight").numel()

    def num_patches(self) -> int:
        """How many tokens an image has in the vision tower."""
        return int(self.entries[0].module.get_parameter("position_embedding.weight").shape[0])

    def layer_number(self, block: Block) -> int | None:
        """The number of a decoder layer, counted from 0; None for other blocks."""
        return self.text_layers.index(block) if block in self.text_layers else None

    def num_blocks(self) -> int:
        """How many blocks a calibration pass visits."""
        return len(self.all())


def make_blocks(config: PreTrainedConfig) -> ModelBlocks:
    """Splits a model of this configuration into blocks without weights, leaving out vision layers after the last feature."""
    model = make_float_model(config)
    use_matmul_linears(model)
    use_deterministic_activations(model)
    return split_model(model, config, attention_window(config.text_config))


def split_model(model: Any, config: PreTrainedConfig, window: int | None) -> ModelBlocks:
    """Splits transformers' model, on the meta device, into blocks. window: as from `attention_window`."""
    tower, text = model.model.vision_tower, model.model.language_model
    vision = "vision_tower.vision_model"
    entries = ("embeddings", "pre_layrnorm")  # as CLIP checkpoints spell it
    features = feature_layers(config)
    projector = model.model.multi_modal_projector
    if has_single_linear_projector(config):
        projector = SingleLinearProjector(projector.linear_1)
    return ModelBlocks(
        entries=tuple(Block(f"{vision}.{name}", getattr(tower, name)) for name in entries if hasattr(tower, name)),
        vision_layers=tuple(
            Block(f"{vision}.encoder.layers.{i}", layer) for i, layer in enumerate(tower.encoder.layers[: max(features)])
        ),
        features=features,
        projector=Block("multi_modal_projector", projector),
        text_layers=tuple(Block(f"language_model.model.layers.{i}", layer) for i, layer in enumerate(text.layers)),
        rotary=type(text.rotary_emb)(config=config.text_config),
        drop_first=has_class_token(config) and not keeps_class_token(config),
        image_token_id=config.image_token_index,
        vocabulary=text.embed_tokens.num_embeddings,
        sliding_window=window,
        final_epsilon=config.text_config.rms_norm_eps,
    )


class SingleLinearProjector(nn.Module):
    """A projector of a single linear, as in LLaVA before 1.5."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear_1 = linear

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Projects features [images, tokens, feature width] to [images, tokens, decoder width]."""
        projected: torch.Tensor = self.linear_1(features)
        return projected


def has_single_linear_projector(config: PreTrainedConfig) -> bool:
    """Whether the projector is a single linear.

    transformers always builds two. A checkpoint in the layout of LLaVA's authors that has one gets an identity as its
    second, which need not be computed; its converted configuration says so under SINGLE_LINEAR.
    """
    return config.projector_hidden_act == "linear" and getattr(config, SINGLE_LINEAR, False) is True


def has_class_token(config: PreTrainedConfig) -> bool:
    """Whether the tower puts a class token before the patches, as CLIP does and SigLIP does not."""
    return config.vision_config.model_type == "clip_vision_model"


def keeps_class_token(config: PreTrainedConfig) -> bool:
    """Whether the class token reaches the projector; VIP-LLaVA's config has no such field, as there it never does."""
    return bool(declared(config, "vision_feature_select_strategy", "default") == "full")


def feature_layers(config: PreTrainedConfig) -> tuple[int, ...]:
    """After how many vision layers each feature is taken, in the order the features are concatenated."""
    total, features = config.vision_config.num_hidden_layers, config.vision_feature_layer
    chosen = (features,) if isinstance(features, int) else tuple(features)
    return tuple(feature if feature >= 0 else total + 1 + feature for feature in chosen)


def get_linear(module: nn.Module, name: str) -> nn.Linear:
    """The linear `name` inside a block's module; TypeError when that is another kind of module."""
    layer = module.get_submodule(name)
    if not isinstance(layer, nn.Linear):
        raise TypeError(f"{name} is a {type(layer).__name__}, not a linear")
    return layer


@contextmanager
def load_block(block: Block, source: TensorSource) -> Iterator[nn.Module]:
    """The block's module with float32 weights from `source`, which are released on leaving the context.

    Raises UserError naming the tensor when a weight is NaN or infinite.
    """
    state = {name: load_finite(source, f"{block.prefix}.{name}") for name, _ in block.module.named_parameters()}
    with fill_block(block, state) as module:
        yield module


@contextmanager
def fill_block(block: Block, state: Mapping[str, torch.Tensor]) -> Iterator[nn.Module]:
    """The block's module with these tensors, by name inside it, which are released on leaving the context."""
    module = block.module
    module.load_state_dict(state, strict=False, assign=True)
    for name, buffer in list(module.named_buffers()):
        if name.endswith("position_ids"):  # a tower's only buffer; its content follows from its shape
            module.get_submodule(name.rpartition(".")[0]).position_ids = torch.arange(buffer.shape[-1])[None]
    try:
        yield module
    finally:
        module.to("meta")


def load_finite(source: TensorSource, name: str, device: torch.device | None = None) -> torch.Tensor:
    """A float32 copy of the tensor on `device`, or on the CPU; UserError when it holds NaN or infinity."""
    array = source.load(name)
    check_finite(name, array)
    stored = as_tensor(array)
    return stored.to(torch.float32, copy=True) if device is None else stored.to(device).float()


def as_tensor(array: np.ndarray) -> torch.Tensor:
    """A tensor on the array's memory; also for bfloat16, which `torch.from_numpy` does not accept."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the array may be read-only
        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)


def check_finite(name: str, array: np.ndarray) -> None:
    """Raises UserError naming the tensor when it holds NaN or infinity."""
    if array.size and not all(math.isfinite(bound) for bound in as_tensor(array).aminmax()):  # both NaN if any value is
        raise UserError(f"{name}: holds NaN or infinite values; the checkpoint is damaged, download it again")


@contextmanager
def deterministic_threads(blocks: ModelBlocks) -> Iterator[None]:
    """Inside this context torch uses one thread if all layers are small (SMALL_BLOCK), else as many threads as before."""
    largest = max(sum(p.numel() for p in b.module.parameters()) for b in (*blocks.vision_layers, *blocks.text_layers))
    with nullcontext() if largest >= SMALL_BLOCK else one_thread():
        yield
