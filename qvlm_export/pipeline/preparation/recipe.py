"""Quantization recipes: a preset, or a YAML file with rules on top of one, assigns a scheme to every linear.

Schemes that TensorRT cannot execute are refused here, unless only graphs are exported.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from qvlm_export.calibrate.checkpoint.regular_file import check_regular_file
from qvlm_export.calibrate.checkpoint.scheme import (
    BFLOAT16,
    FLOAT16,
    GROUP_SIZES,
    GROUPED_BITS,
    LinearScheme,
    SchemeError,
    fit_scheme,
    parse_scheme_bits,
)
from qvlm_export.calibrate.errors import UserError
from qvlm_export.engines.backend import BFLOAT16_TARGETS, INT4_TARGETS, WEIGHT_ONLY_INT8_TARGETS, Backend

FLOAT = "float"
REASON = "(its INT4 is weight-only, INT8 takes INT8 or float activations)"


@dataclass(frozen=True)
class Preset:
    """The scheme, such as W4A16 or float, of the decoder's linears and of those of the vision tower and the projector.

    lm_head always stays in float.
    """

    language_model: str
    vision: str


PRESETS = {
    "int4": Preset(language_model="W4A16", vision="W8A8"),
    "int8": Preset(language_model="W8A8", vision="W8A8"),
    "fp16": Preset(language_model=FLOAT, vision=FLOAT),
    "sim-w6a6": Preset(language_model="W6A6", vision="W6A6"),
    "sim-w4a4": Preset(language_model="W4A4", vision="W4A4"),
    "sim-w4a8": Preset(language_model="W4A8", vision="W4A8"),
    "sim-w3a16": Preset(language_model="W3A16", vision="W3A16"),
}
# Schemes that papers report and TensorRT cannot run. They are simulated by fake quantization, in torch and ONNX Runtime.
SIMULATED = tuple(name for name in PRESETS if name.startswith("sim-"))


class Rule(BaseModel):
    """One rule of a recipe: linears whose name matches the glob `match` get `scheme`. Later rules win."""

    model_config = ConfigDict(extra="forbid")
    match: str
    scheme: str
    group_size: Literal[128, 64] | None = None

    @field_validator("scheme")
    @classmethod
    def _check_bits(cls, scheme: str) -> str:
        if scheme != FLOAT:
            try:
                parse_scheme_bits(scheme)
            except SchemeError as error:
                raise ValueError(f"{error}, or {FLOAT}") from error
        return scheme

    @model_validator(mode="after")
    def _check_group_size(self) -> Rule:
        if self.group_size is not None and (self.scheme == FLOAT or parse_scheme_bits(self.scheme)[0] > GROUPED_BITS):
            raise ValueError(f"{self.scheme} has no groups, leave group_size out")
        return self


class Recipe(BaseModel):
    """The content of a `--recipe` file."""

    model_config = ConfigDict(extra="forbid")
    base: Literal["int4", "int8", "fp16", "sim-w6a6", "sim-w4a4", "sim-w4a8", "sim-w3a16"] = "int4"
    rules: list[Rule] = []


def choose_recipe(scheme: str, path: Path | None, backend: str) -> Recipe:
    """Returns the recipe in the file `path`, or the one of the preset `scheme` when `path` is None.

    backend: as `--backend` names it. Raises UserError for a recipe that cannot be read, for an unknown preset, and for a
    simulated preset with a backend that builds engines. This comes before the backend is looked for, as nobody should
    install TensorRT only to be told that it cannot run the scheme.
    """
    if path is not None:
        return read_recipe(path)
    recipe = recipe_of_preset(scheme)
    if scheme in SIMULATED and backend != "onnx":
        raise UserError(
            f"--scheme {scheme}: TensorRT has no kernel for {PRESETS[scheme].language_model} {REASON}, so it cannot be an "
            "engine; add --backend onnx to simulate it, or take int4 or int8 for an engine"
        )
    return recipe


def read_recipe(path: Path) -> Recipe:
    """Returns the recipe in a YAML file. Raises UserError naming the file and the field that is wrong."""
    try:
        check_regular_file(path, "a recipe")
    except UserError as error:
        raise UserError(f"--recipe {error}") from error
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:  # YAML's dates raise ValueError
        raise UserError(f"--recipe {path}: cannot be read as YAML ({' '.join(str(error).split())})") from error
    try:
        return Recipe.model_validate({} if content is None else content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the recipe"
        raise UserError(
            f"--recipe {path}: {field}: {first['msg']}; write base, and rules of match, scheme and group_size"
        ) from error


def recipe_of_preset(scheme: str) -> Recipe:
    """Returns the recipe of a preset, without rules. Raises UserError for an unknown preset."""
    if scheme not in PRESETS:
        raise UserError(f"--scheme {scheme}: unknown; choose one of {', '.join(PRESETS)}")
    return Recipe.model_validate({"base": scheme})


def assign_schemes(recipe: Recipe, shapes: dict[str, tuple[int, ...]]) -> dict[str, LinearScheme]:
    """Returns the scheme of every linear that does not stay in float, by name.

    shapes: the weight's shape [out, in] of every linear that may be quantized, by name. Raises UserError for a rule that
    matches nothing, and SchemeError for a width that no group size divides.
    """
    preset = PRESETS[recipe.base]
    chosen: dict[str, tuple[str, tuple[int, ...]]] = {
        name: (preset.language_model if name.startswith("language_model.") else preset.vision, GROUP_SIZES)
        for name in shapes
    }
    for number, rule in enumerate(recipe.rules, start=1):
        matched = fnmatch.filter(shapes, rule.match)
        if not matched:
            raise UserError(f"recipe rule {number}: {rule.match!r} matches no linear; names look like {next(iter(shapes))}")
        group_sizes = GROUP_SIZES if rule.group_size is None else (rule.group_size,)
        chosen |= dict.fromkeys(matched, (rule.scheme, group_sizes))
    return {
        name: fit_scheme(name, shapes[name], *parse_scheme_bits(scheme), group_sizes)
        for name, (scheme, group_sizes) in chosen.items()
        if scheme != FLOAT
    }


def check_engine_schemes(schemes: dict[str, LinearScheme], backend: Backend, float_type: str = FLOAT16) -> None:
    """Raises UserError naming the first linear whose scheme an engine, or one of the targets, cannot execute.

    float_type: of the graphs, which a target may lack, too.
    """
    if backend.module is None:
        return
    for name, scheme in schemes.items():
        if not scheme.deployable:
            raise UserError(
                f"--recipe: {name} is {scheme.name}, for which TensorRT has no kernel {REASON}, so it cannot be in an "
                "engine; add --backend onnx to simulate it, or make it W4A16, W8A8, W8A16 or float"
            )
    check_targets(schemes, backend, float_type)


def is_weight_only_int8(scheme: LinearScheme) -> bool:
    """Returns whether a scheme is W8A16."""
    return (scheme.weight_bits, scheme.activation_bits) == (8, None)


def runs_weight_only_int8(target: str) -> bool:
    """Returns whether a target of TensorRT-RTX multiplies float16 activations with int8 weights."""
    return target in (*WEIGHT_ONLY_INT8_TARGETS, "current")


def check_targets(schemes: dict[str, LinearScheme], backend: Backend, float_type: str = FLOAT16) -> None:
    """Raises UserError when a target lacks what is needed of INT4, W8A16 and bfloat16.

    Only TensorRT-RTX builds for chosen targets.
    """
    needs_int4 = any(scheme.weight_bits == 4 for scheme in schemes.values())
    for target in backend.targets if backend.name == "tensorrt-rtx" else ():
        if needs_int4 and target not in (*INT4_TARGETS, "current"):
            raise UserError(f"--target {target}: has no INT4; use --scheme int8, or targets among {', '.join(INT4_TARGETS)}")
        if any(is_weight_only_int8(scheme) for scheme in schemes.values()) and not runs_weight_only_int8(target):
            raise UserError(
                f"--target {target}: has no product of float16 and int8 weights (W8A16); use W8A8, or targets among "
                f"{', '.join(WEIGHT_ONLY_INT8_TARGETS)}"
            )
        if float_type == BFLOAT16 and target not in (*BFLOAT16_TARGETS, "current"):
            raise UserError(
                f"--target {target}: has no bfloat16; leave --dtype out, or use targets among {', '.join(BFLOAT16_TARGETS)}"
            )
