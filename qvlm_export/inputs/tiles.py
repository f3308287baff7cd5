"""AnyRes tiling: which features of an image's tiles become which image tokens, as row indices and weights.

The vision engine gives one row of features for each patch of each tile. The image tokens are these rows (or weighted sums of
four of them) in the order of the whole image, without the padding, with the `image_newline` vector at the end of every row
of the image. Grid shapes and unpadding are computed by transformers' own functions, on row indices instead of features.
Source: Liu et al. 2024 (LLaVA-NeXT), Li et al. 2024 (LLaVA-OneVision, section 3.2, for the bilinear limit).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.functional import interpolate
from transformers.models.llava_next.modeling_llava_next import (
    get_anyres_image_grid_shape,
    image_size_to_num_patches,
    unpad_image,
)

from qvlm_export.calibrate.checkpoint.samples import Placement
from qvlm_export.engines.config import COARSER_FROM, ModelConfig, TileConfig

NEWLINE = -1  # the row index of the `image_newline` vector, which is the last row


def tile_counts(config: ModelConfig, sizes: Sequence[tuple[int, int]]) -> list[int]:
    """Returns the number of tiles of each image of one turn. sizes: height and width of the images in pixels."""
    tiles = config.tiles
    if tiles is None or (tiles.single_when_many and len(sizes) > 1):
        return [1] * len(sizes)
    return [image_size_to_num_patches(size, _pinpoints(tiles), config.vision.image_size) for size in sizes]


def select_tiles(pixel_values: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    """Drops the processor's padding tiles: [images, most tiles, 3, R, R] -> [tiles, 3, R, R]. counts: tiles by image."""
    return np.concatenate([image[:count] for image, count in zip(pixel_values, counts, strict=True)])


def place_tiles(config: ModelConfig, sizes: Sequence[tuple[int, int]]) -> Placement:
    """Returns the placement of the features of one turn's images. sizes: height and width of the images in pixels."""
    parts, start = [], 0
    for size, count in zip(sizes, tile_counts(config, sizes), strict=True):
        parts.append(_place_image(config, size, count, start))
        start += count * config.vision.num_patches
    widest = max(rows.shape[1] for rows, _ in parts)
    return Placement(
        np.concatenate([np.pad(rows, ((0, 0), (0, widest - rows.shape[1])), mode="edge") for rows, _ in parts]),
        np.concatenate([np.pad(weights, ((0, 0), (0, widest - weights.shape[1]))) for _, weights in parts]),
    )


def _place_image(config: ModelConfig, size: tuple[int, int], count: int, start: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns rows int64 [N, k] and weights float32 [N, k] of one image, whose features begin at row `start`."""
    patches = config.vision.num_patches
    base = np.arange(start, start + patches)[:, None]
    if count == 1 or config.tiles is None:
        rows = np.concatenate([base, [[NEWLINE]]])
        return rows, np.ones(rows.shape, np.float32)
    grid = _unpadded_grid(config, config.tiles, size) + start + patches
    rows, weights = grid[..., None], np.ones((*grid.shape, 1), np.float32)
    limit = config.tiles.max_tiles
    ratio = 0.0 if limit is None else math.sqrt(grid.size / (limit * patches))
    if ratio > COARSER_FROM:
        rows, weights = _resample_grid(grid, int(grid.shape[0] // ratio), int(grid.shape[1] // ratio))
    height, _, terms = rows.shape  # terms: rows that are summed for one image token, 1 or 4
    rows = np.concatenate([rows, np.full((height, 1, terms), NEWLINE)], axis=1).reshape(-1, terms)
    newline_weights = np.zeros((height, 1, terms), np.float32)
    newline_weights[..., 0] = 1
    weights = np.concatenate([weights, newline_weights], axis=1).reshape(-1, terms)
    base_weights = np.zeros((patches, terms), np.float32)
    base_weights[:, 0] = 1
    return np.concatenate([base.repeat(terms, 1), rows]), np.concatenate([base_weights, weights])


def _unpadded_grid(config: ModelConfig, tiles: TileConfig, size: tuple[int, int]) -> np.ndarray:
    """Returns int64 [h, w]: the rows of an image's features without the padding; 0 is the first row of the second tile."""
    side = config.vision.patches_per_side
    down, across = get_anyres_image_grid_shape(size, _pinpoints(tiles), config.vision.image_size)
    rows = torch.arange(down * across * side * side).view(down, across, side, side)
    padded = rows.permute(0, 2, 1, 3).reshape(1, down * side, across * side)
    unpadded: np.ndarray = unpad_image(padded, size)[0].numpy()
    return unpadded


def _resample_grid(grid: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Bilinear resampling of a grid of rows [h, w]: returns rows int64 and weights float32, both [height, width, 4]."""
    (y, y_next, y_fraction), (x, x_next, x_fraction) = (
        _interpolation_points(*lengths) for lengths in zip(grid.shape, (height, width), strict=True)
    )
    corners = [(y, x), (y, x_next), (y_next, x), (y_next, x_next)]
    rows = np.stack([grid[np.ix_(down, across)] for down, across in corners], -1)
    factors = [
        (1 - y_fraction, 1 - x_fraction),
        (1 - y_fraction, x_fraction),
        (y_fraction, 1 - x_fraction),
        (y_fraction, x_fraction),
    ]
    return rows, np.stack([np.outer(down, across) for down, across in factors], -1).astype(np.float32)


def _interpolation_points(length: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns, for each of `count` linear samples of `length` points, its two neighbours (int64) and the second's weight.

    torch resamples a ramp of indices, whose values are then the places of the samples, so that they are torch's own.
    """
    ramp = torch.arange(length, dtype=torch.float64)[None, None]
    places = interpolate(ramp, count, mode="linear")[0, 0].numpy()
    first = np.floor(places).astype(np.int64)
    return first, np.minimum(first + 1, length - 1), places - first


def _pinpoints(tiles: TileConfig) -> list[list[int]]:
    return [list(point) for point in tiles.pinpoints]
