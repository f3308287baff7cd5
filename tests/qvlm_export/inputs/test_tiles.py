"""Placement of tile features: against the model code of transformers, at the sizes of the published checkpoints."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlavaNextProcessor
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

from qvlm_export.calibrate.blockwise.forward import place_image_features
from qvlm_export.calibrate.checkpoint.samples import Placement, join_placements, place_features
from qvlm_export.checkpoints.files.aliases import ALIASES
from qvlm_export.engines.config import ModelConfig
from qvlm_export.inputs.processors import LlavaOnevisionProcessor
from qvlm_export.inputs.tiles import place_tiles, select_tiles, tile_counts

NEXT, ONEVISION = ALIASES["llava-next-7b"].config, ALIASES["llava-onevision-7b"].config
WIDTH = 3
SIZES = st.tuples(st.integers(8, 3000), st.integers(8, 3000))


def make_model_stub(config: ModelConfig) -> Any:
    """An object with the attributes that pack_image_features reads of its model."""
    assert config.tiles is not None
    vision = SimpleNamespace(image_size=config.vision.image_size, patch_size=config.vision.patch_size)
    return SimpleNamespace(
        config=SimpleNamespace(vision_config=vision, image_grid_pinpoints=[list(p) for p in config.tiles.pinpoints])
    )


def pack_reference(
    config: ModelConfig, sizes: list[tuple[int, int]], tiles: torch.Tensor, newline: torch.Tensor
) -> np.ndarray:
    """Packs features with transformers' code: float32 [tiles, patches, width] -> [image tokens, width]."""
    split = torch.split(tiles, tile_counts(config, sizes))
    if config is NEXT:
        features_by_image, _ = LlavaNextModel.pack_image_features(make_model_stub(config), split, sizes, "default", newline)
    else:
        features_by_image, _ = LlavaOnevisionModel.pack_image_features(
            make_model_stub(config), split, sizes, newline, "anyres_max_9"
        )
    return torch.cat(features_by_image).numpy()


def random_features(config: ModelConfig, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, config.vision.num_patches, WIDTH, generator=generator), torch.randn(WIDTH, generator=generator)


@pytest.mark.parametrize("config", [NEXT, ONEVISION], ids=["next", "onevision"])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(sizes=st.lists(SIZES, min_size=1, max_size=2))
def test_placement_is_that_of_the_model_code(config: ModelConfig, sizes: list[tuple[int, int]]) -> None:
    tiles, newline = random_features(config, sum(tile_counts(config, sizes)))
    expected = pack_reference(config, sizes, tiles, newline)
    placement = place_tiles(config, sizes)
    rows = tiles.flatten(0, 1)
    np.testing.assert_allclose(place_features(torch.cat([rows, newline[None]]).numpy(), placement), expected, atol=1e-4)
    np.testing.assert_allclose(place_image_features(rows, newline[None], placement).numpy(), expected, atol=1e-4)
    assert (placement.rows >= -1).all()
    np.testing.assert_allclose(placement.weights.sum(1), 1, atol=1e-5)


@pytest.mark.parametrize("config", [NEXT, ONEVISION], ids=["next", "onevision"])
@settings(max_examples=150, deadline=None, derandomize=True)
@given(size=SIZES)
def test_image_tokens_are_as_many_as_the_processor_writes(config: ModelConfig, size: tuple[int, int]) -> None:
    """There are never more than the limits of the model allow for."""
    assert config.tiles is not None
    side, patches = config.vision.image_size, config.vision.num_patches
    pinpoints = SimpleNamespace(image_grid_pinpoints=[list(p) for p in config.tiles.pinpoints])
    if config is NEXT:
        processor = LlavaNextProcessor.__new__(LlavaNextProcessor)
        processor.patch_size, processor.num_additional_image_tokens = config.vision.patch_size, 0
    else:
        processor = LlavaOnevisionProcessor.__new__(LlavaOnevisionProcessor)
        processor.num_image_tokens, processor.vision_aspect_ratio = patches, "anyres_max_9"
    processor.image_processor = pinpoints
    tokens = len(place_tiles(config, [size]))
    assert tokens == processor._get_number_of_features(*size, side, side)
    assert tokens <= config.most_image_tokens
    assert tile_counts(config, [size])[0] <= config.most_tiles


def test_limits_are_those_of_the_largest_images() -> None:
    assert (NEXT.most_tiles, NEXT.most_image_tokens) == (5, 2928)
    assert len(place_tiles(NEXT, [(1000, 1000)])) == 2928
    assert ONEVISION.most_tiles == 37
    sizes = [(64 * h, 64 * w) for h in range(1, 40, 3) for w in range(1, 40, 3)]
    largest = max(len(place_tiles(ONEVISION, [size])) for size in sizes)
    assert 0.9 * ONEVISION.most_image_tokens < largest <= ONEVISION.most_image_tokens


def test_single_tiles_end_with_the_newline() -> None:
    placement = place_tiles(ONEVISION, [(50, 60), (500, 60)])
    patches = ONEVISION.vision.num_patches
    assert placement.rows[:, 0].tolist() == [*range(patches), -1, *range(patches, 2 * patches), -1]


def test_padding_tiles_of_the_processor_are_dropped() -> None:
    pixels = np.arange(2 * 5).reshape(2, 5, 1, 1, 1) * np.ones((1, 1, 3, 2, 2))
    assert select_tiles(pixels, [3, 5])[:, 0, 0, 0].tolist() == [0, 1, 2, 5, 6, 7, 8, 9]


def test_joined_placements_equal_those_of_each_prompt_alone() -> None:
    """Placements with different k, and images without a placement, can be joined."""
    generator = np.random.default_rng(0)
    sums = Placement(generator.integers(-1, 6, (5, 4)), generator.random((5, 4), np.float32))
    single = Placement(generator.integers(-1, 3, (4, 1)), np.ones((4, 1), np.float32))
    embeds, newline = generator.random((6 + 3 + 2, WIDTH), np.float32), generator.random((1, WIDTH), np.float32)
    joined = join_placements([sums, single, None], [6, 3, 2])
    assert joined is not None
    parts = [
        place_features(np.concatenate([embeds[:6], newline]), sums),
        place_features(np.concatenate([embeds[6:9], newline]), single),
        embeds[9:],
    ]
    got = place_features(np.concatenate([embeds, newline]), joined)
    np.testing.assert_allclose(got, np.concatenate(parts), rtol=1e-6)
    assert join_placements([None, None], [6, 3]) is None


def test_placed_features_keep_their_dtype() -> None:
    embeds = np.ones((4, WIDTH), np.float16)
    for rows in ([[0], [-1]], [[0, 1], [2, -1]]):
        weights = np.full(np.shape(rows), 1 / len(rows[0]), np.float32)
        assert place_features(embeds, Placement(np.array(rows), weights)).dtype == np.float16
