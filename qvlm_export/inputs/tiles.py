"""Where the features of a picture's tiles go: the arithmetic of LLaVA-NeXT and LLaVA-OneVision, done on row numbers.

The vision engine gives rows for tiles; image tokens are those rows (or sums of four of them) in another order, without the
padding, with the `image_newline` vector at the end of every row of the picture. Grids and unpadding are transformers' own.
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

NEWLINE = -1


def tile_counts(config: ModelConfig, sizes: Sequence[tuple[int, int]]) -> list[int]:
    """How many tiles each picture of one turn has. sizes: height and width in pixels."""
    tiles = config.tiles
    if tiles is None or (tiles.single_when_many and len(sizes) > 1):
        return [1] * len(sizes)
    return [image_size_to_num_patches(size, _pinpoints(tiles), config.vision.image_size) for size in sizes]


def select_tiles(pixel_values: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    """[pictures, most tiles, 3, R, R], padded by the processor -> [tiles, 3, R, R]."""
    return np.concatenate([picture[:count] for picture, count in zip(pixel_values, counts, strict=True)])


def place_tiles(config: ModelConfig, sizes: Sequence[tuple[int, int]]) -> Placement:
    """The placement of the features of one turn's pictures. sizes: height and width in pixels."""
    found, start = [], 0
    for size, count in zip(sizes, tile_counts(config, sizes), strict=True):
        found.append(_picture(config, size, count, start))
        start += count * config.vision.num_patches
    widest = max(rows.shape[1] for rows, _ in found)
    return Placement(
        np.concatenate([np.pad(rows, ((0, 0), (0, widest - rows.shape[1])), mode="edge") for rows, _ in found]),
        np.concatenate([np.pad(weights, ((0, 0), (0, widest - weights.shape[1]))) for _, weights in found]),
    )


def _picture(config: ModelConfig, size: tuple[int, int], count: int, start: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows int64 [N, k] and weights float32 [N, k] of one picture whose features begin at row `start`."""
    patches = config.vision.num_patches
    base = np.arange(start, start + patches)[:, None]
    if count == 1 or config.tiles is None:
        rows = np.concatenate([base, [[NEWLINE]]])
        return rows, np.ones(rows.shape, np.float32)
    grid = _grid(config, config.tiles, size) + start + patches
    rows, weights = grid[..., None], np.ones((*grid.shape, 1), np.float32)
    limit = config.tiles.max_tiles
    ratio = 0.0 if limit is None else math.sqrt(grid.size / (limit * patches))
    if ratio > COARSER_FROM:
        rows, weights = _coarser(grid, int(grid.shape[0] // ratio), int(grid.shape[1] // ratio))
    height, _, parts = rows.shape
    rows = np.concatenate([rows, np.full((height, 1, parts), NEWLINE)], axis=1).reshape(-1, parts)
    ends = np.zeros((height, 1, parts), np.float32)
    ends[..., 0] = 1
    weights = np.concatenate([weights, ends], axis=1).reshape(-1, parts)
    first = np.zeros((patches, parts), np.float32)
    first[:, 0] = 1
    return np.concatenate([base.repeat(parts, 1), rows]), np.concatenate([first, weights])


def _grid(config: ModelConfig, tiles: TileConfig, size: tuple[int, int]) -> np.ndarray:
    """The row of every feature behind the first tile's, as they lie in the picture, padding cut off: int64 [h, w]."""
    side = config.vision.patches_per_side
    down, across = get_anyres_image_grid_shape(size, _pinpoints(tiles), config.vision.image_size)
    rows = torch.arange(down * across * side * side).view(down, across, side, side)
    whole = rows.permute(0, 2, 1, 3).reshape(1, down * side, across * side)
    cut: np.ndarray = unpad_image(whole, size)[0].numpy()
    return cut


def _coarser(grid: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Bilinear sampling of a grid of rows: rows int64 and weights float32 [height, width, 4]."""
    (y, y_next, y_part), (x, x_next, x_part) = (
        _between(*lengths) for lengths in zip(grid.shape, (height, width), strict=True)
    )
    corners = [(y, x), (y, x_next), (y_next, x), (y_next, x_next)]
    rows = np.stack([grid[np.ix_(down, across)] for down, across in corners], -1)
    parts = [(1 - y_part, 1 - x_part), (1 - y_part, x_part), (y_part, 1 - x_part), (y_part, x_part)]
    return rows, np.stack([np.outer(down, across) for down, across in parts], -1).astype(np.float32)


def _between(length: int, wanted: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The neighbours and the share of the second for each of `wanted` samples of a line of `length` points.

    A ramp that torch resamples says where its samples lie.
    """
    ramp = torch.arange(length, dtype=torch.float64)[None, None]
    place = interpolate(ramp, wanted, mode="linear")[0, 0].numpy()
    first = np.floor(place).astype(np.int64)
    return first, np.minimum(first + 1, length - 1), place - first


def _pinpoints(tiles: TileConfig) -> list[list[int]]:
    return [list(point) for point in tiles.pinpoints]
