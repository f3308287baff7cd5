"""qvlm_export/pipeline/planning/model_sizes.py"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from qvlm_export.checkpoints.aliases import ALIASES


@dataclass(frozen=True)
class ModelSize:
    """Weights that a graph needs: layers of the tower behind the feature are not among them. image_tokens: at most."""

    alias: str
    repository: str
    parameters: int
    float16_bytes: int
    int4_bytes: int
    image_tokens: int


def model_sizes() -> list[ModelSize]:
    """Of every alias, from its geometry alone."""
    from qvlm_export.engines.graph.float_graphs import expected_shapes
    from qvlm_export.engines.graph.weight_sizes import estimate_sizes
    from qvlm_export.pipeline.planning.recipe import plan_linears, recipe_of_preset

    sizes = []
    for name, alias in ALIASES.items():
        shapes = expected_shapes(alias.config)
        linears = {linear: shapes[f"{linear}.weight"] for linear in linear_names(shapes)}
        found = estimate_sizes(shapes, plan_linears(recipe_of_preset("int4"), linears))
        count = sum(map(math.prod, shapes.values()))
        tokens = alias.config.most_image_tokens
        sizes.append(ModelSize(name, alias.repository, count, found.float16_bytes, found.planned_bytes, tokens))
    return sizes


def linear_names(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The linears that presets quantize, by all tensors' shapes: matrices that are neither looked up in nor the head."""
    tables = ("embed_tokens.weight", "position_embedding.weight", "lm_head.weight")
    return [
        name.removesuffix(".weight")
        for name, shape in shapes.items()
        if len(shape) == 2 and name.endswith(".weight") and not name.endswith(tables)
    ]
