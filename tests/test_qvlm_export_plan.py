"""Which linear gets which scheme, and how many bytes that makes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from commands import assert_refused, export_onnx

from calibrate.blocks import make_blocks
from calibrate.errors import UserError
from calibrate.scheme import W8A8, LinearScheme, SchemeError
from engines.backend import Backend
from engines.graph import expected_shapes
from qvlm_export.checkpoint import open_checkpoint
from qvlm_export.plan import (
    PRESETS,
    SIMULATED,
    Recipe,
    check_targets,
    plan_linears,
    read_recipe,
    recipe_of_preset,
)
from qvlm_export.preflight import PLAN_OVERHEAD_BYTES, Sizes, disk_needed, estimate_sizes

Llava = Callable[..., Path]
FC1 = "vision_tower.vision_model.encoder.layers.0.mlp.fc1"
LINEAR_1 = "multi_modal_projector.linear_1"
Q_PROJ, DOWN_PROJ = "language_model.model.layers.0.self_attn.q_proj", "language_model.model.layers.0.mlp.down_proj"
SHAPES: dict[str, tuple[int, ...]] = {FC1: (300, 100), LINEAR_1: (256, 100), Q_PROJ: (256, 256), DOWN_PROJ: (256, 192)}


def recipe_of(tmp_path: Path, text: str) -> Recipe:
    (tmp_path / "recipe.yaml").write_text(text)
    return read_recipe(tmp_path / "recipe.yaml")


def int4(group_size: int) -> LinearScheme:
    return LinearScheme(weight_bits=4, activation_bits=None, group_size=group_size)


@pytest.mark.parametrize(
    ("preset", "wanted"),
    [
        ("int4", {FC1: W8A8, LINEAR_1: W8A8, Q_PROJ: int4(128), DOWN_PROJ: int4(64)}),
        ("int8", {FC1: W8A8, LINEAR_1: W8A8, Q_PROJ: W8A8, DOWN_PROJ: W8A8}),
        ("fp16", {}),
    ],
)
def test_presets(preset: str, wanted: dict[str, LinearScheme]) -> None:
    """128 does not divide 192, so its group is 64; 8-bit linears may have any width."""
    assert plan_linears(recipe_of_preset(preset), SHAPES) == wanted


@pytest.mark.parametrize(("preset", "counts"), [("int4", (20, 14)), ("int8", (34, 0)), ("fp16", (0, 0))])
def test_presets_on_a_whole_model(llava: Llava, preset: str, counts: tuple[int, int]) -> None:
    """Three tower layers of six linears, two of the projector; two decoder layers of seven; lm_head never."""
    checkpoint = open_checkpoint(str(llava()))
    shapes = expected_shapes(checkpoint.config)
    names = make_blocks(checkpoint.hf_config).quantizable()
    plan = plan_linears(recipe_of_preset(preset), {name: shapes[f"{name}.weight"] for name in names})
    bits = [scheme.weight_bits for scheme in plan.values()]
    assert (bits.count(8), bits.count(4)) == counts
    assert not any("lm_head" in name or "layers.3" in name for name in plan)


def test_preset_names() -> None:
    assert set(PRESETS) == {"int4", "int8", "fp16"}
    for name in SIMULATED:
        with pytest.raises(UserError, match=rf"--scheme {name}: TensorRT has no kernel for it .* use int4 or int8"):
            recipe_of_preset(name)
    with pytest.raises(UserError, match="--scheme int2: unknown; choose one of int4, int8, fp16"):
        recipe_of_preset("int2")


def test_later_rules_win(tmp_path: Path) -> None:
    recipe = recipe_of(
        tmp_path,
        "base: int8\nrules:\n- {match: 'language_model.*', scheme: float}\n- {match: '*.down_proj', scheme: W4A16}\n",
    )
    assert plan_linears(recipe, SHAPES) == {FC1: W8A8, LINEAR_1: W8A8, DOWN_PROJ: int4(64)}
    turned = recipe.model_copy(update={"rules": recipe.rules[::-1]})
    assert plan_linears(turned, SHAPES) == {FC1: W8A8, LINEAR_1: W8A8}


def test_a_rule_may_ask_for_a_group(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, f"rules: [{{match: {Q_PROJ}, scheme: W4A16, group_size: 64}}]")
    assert plan_linears(recipe, SHAPES)[Q_PROJ] == int4(64)
    recipe = recipe_of(tmp_path, f"rules: [{{match: {DOWN_PROJ}, scheme: W4A16, group_size: 128}}]")
    with pytest.raises(SchemeError, match=f"{DOWN_PROJ}: 128 does not divide its 192 inputs"):
        plan_linears(recipe, SHAPES)


def test_a_rule_may_put_int4_into_the_tower_where_groups_divide(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "rules: [{match: 'vision_tower.*', scheme: W4A16}]")
    with pytest.raises(SchemeError, match=rf"{FC1}: 128 nor 64 does not divide its 100 inputs.*int8"):
        plan_linears(recipe, SHAPES)
    assert plan_linears(recipe, SHAPES | {FC1: (300, 128)})[FC1] == int4(128)
    with pytest.raises(SchemeError, match=f"{FC1}: its 301 outputs are odd"):
        plan_linears(recipe, SHAPES | {FC1: (301, 128)})


def test_empty_recipe_is_its_base(tmp_path: Path) -> None:
    assert recipe_of(tmp_path, "") == recipe_of_preset("int4")
    assert recipe_of(tmp_path, "base: fp16") == recipe_of_preset("fp16")


@pytest.mark.parametrize("target", ["sm80", "sm86", "sm89", "sm120", "sm121", "current"])
def test_targets_with_int4(target: str) -> None:
    check_targets({Q_PROJ: int4(128)}, Backend("tensorrt-rtx", "tensorrt_rtx", "1.7", (target,)))


def test_target_without_int4() -> None:
    turing = Backend("tensorrt-rtx", "tensorrt_rtx", "1.7", ("sm89", "sm75"))
    with pytest.raises(UserError, match="--target sm75: has no INT4; use --scheme int8"):
        check_targets({FC1: W8A8, Q_PROJ: int4(128)}, turing)
    check_targets({FC1: W8A8}, turing)
    check_targets({}, turing)


def test_sizes_by_hand() -> None:
    """INT4: half a byte a weight and two a scale. INT8: one byte a weight and four a scale. The rest: two bytes."""
    shapes = {f"{Q_PROJ}.weight": (256, 256), f"{FC1}.weight": (300, 100), f"{FC1}.bias": (300,)}
    sizes = estimate_sizes(shapes, {Q_PROJ: int4(128), FC1: W8A8})
    assert sizes.float16_bytes == 2 * (256 * 256 + 300 * 100 + 300)
    assert sizes.planned_bytes == (256 * 256 // 2 + 2 * 256 * 2) + (300 * 100 + 4 * 300) + 2 * 300
    assert estimate_sizes(shapes, {}) == Sizes(sizes.float16_bytes, sizes.float16_bytes)
    assert Sizes(300, 100).compression == 3.0


def test_a_large_int4_linear_is_almost_four_times_smaller() -> None:
    """5120x13824 as in LLaVA-13B: 4 bits and 16/128 of a scale a weight."""
    sizes = estimate_sizes({f"{DOWN_PROJ}.weight": (5120, 13824)}, {DOWN_PROJ: int4(128)})
    assert sizes.compression == pytest.approx(16 / (4 + 16 / 128))


def test_disk_holds_every_copy() -> None:
    sizes = Sizes(1000, 400)
    assert disk_needed(sizes, calibrates=False, builds=False) == 400
    assert disk_needed(sizes, calibrates=True, builds=False) == 800
    assert disk_needed(sizes, calibrates=True, builds=True) == 1200 + 2 * PLAN_OVERHEAD_BYTES


# Recipes that are refused


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("base: [", ["cannot be read as YAML"]),
        ("[" * 3000, ["cannot be read as YAML"]),
        ("base: 2021-02-30", ["cannot be read as YAML", "day is out of range"]),
        ("!!python/object/apply:os.system ['true']", ["cannot be read as YAML", "constructor"]),
        ("[]", ["the recipe", "dictionary"]),
        ("false", ["the recipe", "dictionary"]),
        ("int8", ["the recipe", "dictionary"]),
        ("base: int5", ["base", "'int4', 'int8' or 'fp16'"]),
        ("bits: 4", ["bits: Extra inputs are not permitted", "write base, and rules"]),
        ("rules: W8A8", ["rules", "list"]),
        ("rules: [{match: '*'}]", ["rules.0.scheme: Field required"]),
        ("rules: [{match: '*', scheme: W8A8, bits: 8}]", ["rules.0.bits: Extra inputs are not permitted"]),
        ("rules: [{match: '*', scheme: W3A16}]", ["rules.0.scheme", "'W4A16', 'W8A8' or 'float'"]),
        ("rules: [{match: '*', scheme: W4A16, group_size: 32}]", ["rules.0.group_size", "128 or 64"]),
        ("rules: [{match: '*', scheme: W8A8, group_size: 64}]", ["rules.0", "W8A8 has no groups"]),
    ],
)
def test_bad_recipe(llava: Llava, absent: Path, tmp_path: Path, content: str, words: list[str]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    assert_refused(export_onnx(llava(), absent, "--recipe", path), f"--recipe {path}", *words)


def test_recipe_rule_matches_nothing(llava: Llava, absent: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("rules: [{match: '*', scheme: W8A8}, {match: 'language_model.layers.*', scheme: float}]")
    refused = export_onnx(llava(), absent, "--recipe", path)
    assert_refused(refused, "recipe rule 2", "'language_model.layers.*' matches no linear", "names look like vision_tower.")
