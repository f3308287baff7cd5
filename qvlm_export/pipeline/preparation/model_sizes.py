"""Sizes of the models that `--list-models` names, in float16 and in INT4.

They follow from the geometry that is stored with each alias, without downloading anything.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from qvlm_export.checkpoints.files.aliases import ALIASES


@dataclass(frozen=True)
class ModelSize:
    """One alias of `--model` with the sizes of its model.

    parameters, float16_bytes, int4_bytes: of the weights that the graphs contain; layers of the vision tower behind the last
    one whose features are used are not among them. int4_bytes: with `--scheme int4`. image_tokens: of the largest image.
    """

    alias: str
    repository: str
    parameters: int
    float16_bytes: int
    int4_bytes: int
    image_tokens: int


def model_sizes() -> list[ModelSize]:
    """Returns the sizes of every alias."""
    from qvlm_export.engines.graph.float_graphs import expected_shapes
    from qvlm_export.engines.graph.weight_sizes import estimate_sizes
    from qvlm_export.pipeline.preparation.recipe import assign_schemes, recipe_of_preset

    sizes = []
    for name, alias in ALIASES.items():
        shapes = expected_shapes(alias.config)
        linears = {linear: shapes[f"{linear}.weight"] for linear in _list_linear_names(shapes)}
        weights = estimate_sizes(shapes, assign_schemes(recipe_of_preset("int4"), linears))
        count = sum(map(math.prod, shapes.values()))
        tokens = alias.config.most_image_tokens
        sizes.append(ModelSize(name, alias.repository, count, weights.float16_bytes, weights.quantized_bytes, tokens))
    return sizes


def _list_linear_names(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Returns the names of the linears that presets may quantize: those of all matrices but embeddings and lm_head.

    shapes: the shape of every tensor by name.
    """
    tables = ("embed_tokens.weight", "position_embedding.weight", "lm_head.weight")
    return [
        name.removesuffix(".weight")
        for name, shape in shapes.items()
        if len(shape) == 2 and name.endswith(".weight") and not name.endswith(tables)
    ]
