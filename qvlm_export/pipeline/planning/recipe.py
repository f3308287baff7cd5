"""Which linear gets which scheme: a preset, or a recipe on top of one."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from qvlm_export.calibrate.checkpoint.scheme import (
    GROUP_SIZES,
    GROUPED_BITS,
    LinearScheme,
    SchemeError,
    fit_scheme,
    parse_scheme_bits,
)
from qvlm_export.calibrate.errors import UserError
from qvlm_export.engines.backend import INT4_TARGETS, Backend

FLOAT = "float"
REASON = "(its INT4 is weight-only, INT8 needs 8 bits on both sides)"


@dataclass(frozen=True)
class Preset:
    """Schemes of the decoder's linears and of tower and projector: W4A16 and the like, or float. lm_head stays float."""

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
# What papers report and TensorRT cannot run: fake-quantized, in torch and on ONNX Runtime.
SIMULATED = tuple(name for name in PRESETS if name.startswith("sim-"))


class Rule(BaseModel):
    """Linears whose name matches the glob `match` get `scheme`; later rules win."""

    model_config = ConfigDict(extra="forbid")
    match: str
    scheme: str
    group_size: Literal[128, 64] | None = None

    @field_validator("scheme")
    @classmethod
    def _bits_that_exist(cls, scheme: str) -> str:
        if scheme != FLOAT:
            try:
                parse_scheme_bits(scheme)
            except SchemeError as error:
                raise ValueError(f"{error}, or {FLOAT}") from error
        return scheme

    @model_validator(mode="after")
    def _groups_are_for_few_bits(self) -> Rule:
        if self.group_size is not None and (self.scheme == FLOAT or parse_scheme_bits(self.scheme)[0] > GROUPED_BITS):
            raise ValueError(f"{self.scheme} has no groups, leave group_size out")
        return self


class Recipe(BaseModel):
    """The YAML of --recipe."""

    model_config = ConfigDict(extra="forbid")
    base: Literal["int4", "int8", "fp16", "sim-w6a6", "sim-w4a4", "sim-w4a8", "sim-w3a16"] = "int4"
    rules: list[Rule] = []


def choose_recipe(scheme: str, path: Path | None, backend: str) -> Recipe:
    """What --recipe says, or the preset --scheme where there is none.

    Raises UserError for one that cannot be read or is unknown, and for a simulated preset with a `--backend` that builds
    engines: before a backend is chosen, as nobody shall install TensorRT first to be told that it cannot help.
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
    """Raises UserError naming the file and the field."""
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
    """Raises UserError for an unknown preset."""
    if scheme not in PRESETS:
        raise UserError(f"--scheme {scheme}: unknown; choose one of {', '.join(PRESETS)}")
    return Recipe.model_validate({"base": scheme})


def plan_linears(recipe: Recipe, shapes: dict[str, tuple[int, ...]]) -> dict[str, LinearScheme]:
    """linear name -> scheme, for linears that are not float. shapes: name -> [out, in] of every linear that may be planned.

    Raises UserError for a rule that matches nothing, and SchemeError for a width that no group divides.
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


def check_engine_schemes(plan: dict[str, LinearScheme], backend: Backend) -> None:
    """Raises UserError naming the first linear that an engine, or one of its targets, cannot have."""
    if backend.module is None:
        return
    for name, scheme in plan.items():
        if not scheme.deployable:
            raise UserError(
                f"--recipe: {name} is {scheme.name}, for which TensorRT has no kernel {REASON}, so it cannot be in an "
                "engine; add --backend onnx to simulate it, or make it W4A16, W8A8 or float"
            )
    check_targets(plan, backend)


def check_targets(plan: dict[str, LinearScheme], backend: Backend) -> None:
    """Raises UserError when a target has no INT4 and the plan wants it."""
    if backend.name != "tensorrt-rtx" or not any(s.weight_bits == 4 for s in plan.values()):
        return
    for target in backend.targets:
        if target not in INT4_TARGETS and target != "current":
            raise UserError(f"--target {target}: has no INT4; use --scheme int8, or targets among {', '.join(INT4_TARGETS)}")
