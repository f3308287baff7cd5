"""Which linear gets which scheme: a preset, or a recipe on top of one."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from calibrate.errors import UserError
from calibrate.scheme import GROUP_SIZES, W8A8, LinearScheme, w4a16
from engines.backend import INT4_TARGETS, Backend

SchemeName = Literal["W4A16", "W8A8", "float"]


@dataclass(frozen=True)
class Preset:
    """Schemes of the decoder's linears and of tower and projector. lm_head stays float in all of them."""

    language_model: SchemeName
    vision: SchemeName


PRESETS = {
    "int4": Preset(language_model="W4A16", vision="W8A8"),
    "int8": Preset(language_model="W8A8", vision="W8A8"),
    "fp16": Preset(language_model="float", vision="float"),
}
SIMULATED = ("sim-w6a6", "sim-w4a4", "sim-w4a8", "sim-w3a16")


class Rule(BaseModel):
    """Linears whose name matches the glob `match` get `scheme`; later rules win."""

    model_config = ConfigDict(extra="forbid")
    match: str
    scheme: SchemeName
    group_size: Literal[128, 64] | None = None

    @model_validator(mode="after")
    def _groups_are_for_int4(self) -> Rule:
        if self.group_size is not None and self.scheme != "W4A16":
            raise ValueError(f"{self.scheme} has no groups, leave group_size out")
        return self


class Recipe(BaseModel):
    """The YAML of --recipe."""

    model_config = ConfigDict(extra="forbid")
    base: Literal["int4", "int8", "fp16"] = "int4"
    rules: list[Rule] = []


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
    """Raises UserError for an unknown preset, and for a simulated one with the reason."""
    if scheme in SIMULATED:
        raise UserError(
            f"--scheme {scheme}: TensorRT has no kernel for it (its INT4 is weight-only, INT8 needs 8 bits on both sides), "
            "so it cannot be an engine; use int4 or int8"
        )
    if scheme not in PRESETS:
        raise UserError(f"--scheme {scheme}: unknown; choose one of {', '.join(PRESETS)}")
    return Recipe.model_validate({"base": scheme})


def plan_linears(recipe: Recipe, shapes: dict[str, tuple[int, ...]]) -> dict[str, LinearScheme]:
    """linear name -> scheme, for linears that are not float. shapes: name -> [out, in] of every linear that may be planned.

    Raises UserError for a rule that matches nothing, and SchemeError for a width that no group divides.
    """
    preset = PRESETS[recipe.base]
    chosen: dict[str, tuple[SchemeName, int | None]] = {
        name: (preset.language_model if name.startswith("language_model.") else preset.vision, None) for name in shapes
    }
    for number, rule in enumerate(recipe.rules, start=1):
        matched = fnmatch.filter(shapes, rule.match)
        if not matched:
            raise UserError(f"recipe rule {number}: {rule.match!r} matches no linear; names look like {next(iter(shapes))}")
        chosen |= dict.fromkeys(matched, (rule.scheme, rule.group_size))
    plan = {}
    for name, (scheme, group_size) in chosen.items():
        if scheme == "W8A8":
            plan[name] = W8A8
        elif scheme == "W4A16":
            plan[name] = w4a16(name, shapes[name], GROUP_SIZES if group_size is None else (group_size,))
    return plan


def check_targets(plan: dict[str, LinearScheme], backend: Backend) -> None:
    """Raises UserError when a target has no INT4 and the plan wants it."""
    if backend.name != "tensorrt-rtx" or not any(s.weight_bits == 4 for s in plan.values()):
        return
    for target in backend.targets:
        if target not in INT4_TARGETS and target != "current":
            raise UserError(f"--target {target}: has no INT4; use --scheme int8, or targets among {', '.join(INT4_TARGETS)}")
