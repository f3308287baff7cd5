"""Recipes: which linear gets which scheme, how many bytes that makes, and which recipes are refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import assert_refused, export_onnx, run_export

from qvlm_export.calibrate.blockwise.blocks import make_blocks
from qvlm_export.calibrate.checkpoint.scheme import W8A8, LinearScheme, SchemeError
from qvlm_export.calibrate.errors import UserError
from qvlm_export.checkpoints.checkpoint import open_checkpoint
from qvlm_export.engines.backend import Backend
from qvlm_export.engines.graph.float_graphs import expected_shapes
from qvlm_export.engines.graph.weight_sizes import Sizes, estimate_sizes
from qvlm_export.pipeline.preparation.recipe import (
    PRESETS,
    SIMULATED,
    Recipe,
    assign_schemes,
    check_engine_schemes,
    check_targets,
    choose_recipe,
    read_recipe,
    recipe_of_preset,
)

Llava = Callable[..., Path]
FC1 = "vision_tower.vision_model.encoder.layers.0.mlp.fc1"
LINEAR_1 = "multi_modal_projector.linear_1"
Q_PROJ, DOWN_PROJ = "language_model.model.layers.0.self_attn.q_proj", "language_model.model.layers.0.mlp.down_proj"
SHAPES: dict[str, tuple[int, ...]] = {FC1: (300, 100), LINEAR_1: (256, 100), Q_PROJ: (256, 256), DOWN_PROJ: (256, 192)}


def write_recipe(tmp_path: Path, text: str) -> Recipe:
    (tmp_path / "recipe.yaml").write_text(text)
    return read_recipe(tmp_path / "recipe.yaml")


def int4(group_size: int) -> LinearScheme:
    return LinearScheme(weight_bits=4, activation_bits=None, group_size=group_size)


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("int4", {FC1: W8A8, LINEAR_1: W8A8, Q_PROJ: int4(128), DOWN_PROJ: int4(64)}),
        ("int8", {FC1: W8A8, LINEAR_1: W8A8, Q_PROJ: W8A8, DOWN_PROJ: W8A8}),
        ("fp16", {}),
        ("sim-w6a6", dict.fromkeys(SHAPES, LinearScheme(6, 6, None))),
    ],
)
def test_presets(preset: str, expected: dict[str, LinearScheme]) -> None:
    """down_proj has groups of 64, as 128 does not divide 192. Schemes of 6 and 8 bits have no groups and fit any width."""
    assert assign_schemes(recipe_of_preset(preset), SHAPES) == expected


@pytest.mark.parametrize(
    ("preset", "counts"),
    [
        ("int4", {"W8A8": 20, "W4A16": 14}),
        ("int8", {"W8A8": 34}),
        ("fp16", {}),
        ("sim-w6a6", {"W6A6": 34}),
        ("sim-w4a4", {"W4A4": 34}),
        ("sim-w4a8", {"W4A8": 34}),
        ("sim-w3a16", {"W3A16": 34}),
    ],
)
def test_presets_on_a_whole_model(llava: Llava, preset: str, counts: dict[str, int]) -> None:
    """Three layers of the tower with six linears each, two of the projector, two decoder layers with seven; no lm_head."""
    checkpoint = open_checkpoint(str(llava()))
    shapes = expected_shapes(checkpoint.config)
    names = make_blocks(checkpoint.hf_config).quantizable()
    schemes = assign_schemes(recipe_of_preset(preset), {name: shapes[f"{name}.weight"] for name in names})
    assert Counter(scheme.name for scheme in schemes.values()) == counts
    assert not any("lm_head" in name or "layers.3" in name for name in schemes)


def test_preset_names() -> None:
    assert set(PRESETS) == {"int4", "int8", "fp16", *SIMULATED}
    assert set(SIMULATED) == {"sim-w6a6", "sim-w4a4", "sim-w4a8", "sim-w3a16"}
    for name in PRESETS:
        assert recipe_of_preset(name) == Recipe(base=name)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="--scheme int2: unknown; choose one of int4, int8, fp16, sim-w6a6"):
        recipe_of_preset("int2")


@pytest.mark.parametrize("backend", ["auto", "tensorrt", "tensorrt-rtx"])
@pytest.mark.parametrize("name", ["sim-w6a6", "sim-w4a4", "sim-w4a8", "sim-w3a16"])
def test_simulated_presets_are_for_the_onnx_backend(name: str, backend: str) -> None:
    bits = name.removeprefix("sim-").upper()
    with pytest.raises(UserError) as caught:
        choose_recipe(name, None, backend)
    assert str(caught.value) == (
        f"--scheme {name}: TensorRT has no kernel for {bits} (its INT4 is weight-only, INT8 takes INT8 or float "
        "activations), so it cannot be an engine; add --backend onnx to simulate it, or take int4 or int8 for an engine"
    )
    assert choose_recipe(name, None, "onnx") == recipe_of_preset(name)
    assert choose_recipe("int4", None, backend) == recipe_of_preset("int4")


def test_the_first_linear_that_no_engine_can_execute_is_named() -> None:
    schemes = {FC1: W8A8, Q_PROJ: LinearScheme(4, 8, 128), DOWN_PROJ: LinearScheme(3, None, 64)}
    rtx = Backend("tensorrt-rtx", "tensorrt_rtx", "1.7", ("sm89",))
    with pytest.raises(UserError, match=f"^--recipe: {Q_PROJ} is W4A8, for which TensorRT has no kernel .*--backend onnx"):
        check_engine_schemes(schemes, rtx)
    check_engine_schemes(schemes, Backend("onnx", None, None, ()))
    check_engine_schemes({FC1: W8A8, Q_PROJ: int4(64)}, rtx)


def test_later_rules_win(tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path,
        "base: int8\nrules:\n- {match: 'language_model.*', scheme: float}\n- {match: '*.down_proj', scheme: W4A16}\n",
    )
    assert assign_schemes(recipe, SHAPES) == {FC1: W8A8, LINEAR_1: W8A8, DOWN_PROJ: int4(64)}
    reversed_rules = recipe.model_copy(update={"rules": recipe.rules[::-1]})
    assert assign_schemes(reversed_rules, SHAPES) == {FC1: W8A8, LINEAR_1: W8A8}


def test_a_rule_may_set_the_group_size(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, f"rules: [{{match: {Q_PROJ}, scheme: W4A16, group_size: 64}}]")
    assert assign_schemes(recipe, SHAPES)[Q_PROJ] == int4(64)
    recipe = write_recipe(tmp_path, f"rules: [{{match: {DOWN_PROJ}, scheme: W4A16, group_size: 128}}]")
    with pytest.raises(SchemeError, match=f"{DOWN_PROJ}: 128 does not divide its 192 inputs"):
        assign_schemes(recipe, SHAPES)


def test_a_rule_may_make_the_tower_int4_where_a_group_size_divides(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, "rules: [{match: 'vision_tower.*', scheme: W4A16}]")
    with pytest.raises(SchemeError, match=rf"{FC1}: 128 nor 64 does not divide its 100 inputs.*int8"):
        assign_schemes(recipe, SHAPES)
    assert assign_schemes(recipe, SHAPES | {FC1: (300, 128)})[FC1] == int4(128)
    with pytest.raises(SchemeError, match=f"{FC1}: its 301 outputs are odd"):
        assign_schemes(recipe, SHAPES | {FC1: (301, 128)})


@pytest.mark.parametrize("weight", [3, 4, 6, 8])
@pytest.mark.parametrize("activation", [4, 6, 8, 16])
def test_a_rule_may_name_any_scheme_that_a_linear_can_have(tmp_path: Path, weight: int, activation: int) -> None:
    recipe = write_recipe(tmp_path, f"rules: [{{match: {Q_PROJ}, scheme: W{weight}A{activation}}}]")
    group = 128 if weight <= 4 else None
    expected = LinearScheme(weight, None if activation == 16 else activation, group)
    assert assign_schemes(recipe, SHAPES)[Q_PROJ] == expected


def test_rules_override_a_simulated_base(tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path, "base: sim-w6a6\nrules: [{match: '*q_proj', scheme: W3A4, group_size: 64}, {match: '*1', scheme: float}]"
    )
    six = LinearScheme(6, 6, None)
    assert assign_schemes(recipe, SHAPES) == {Q_PROJ: LinearScheme(3, 4, 64), DOWN_PROJ: six}


def test_empty_recipe_is_its_base(tmp_path: Path) -> None:
    assert write_recipe(tmp_path, "") == recipe_of_preset("int4")
    assert write_recipe(tmp_path, "base: fp16") == recipe_of_preset("fp16")


@pytest.mark.parametrize("target", ["sm80", "sm86", "sm89", "sm120", "sm121", "current"])
def test_targets_with_int4(target: str) -> None:
    check_targets({Q_PROJ: int4(128)}, Backend("tensorrt-rtx", "tensorrt_rtx", "1.7", (target,)))


def test_target_without_int4() -> None:
    turing = Backend("tensorrt-rtx", "tensorrt_rtx", "1.7", ("sm89", "sm75"))
    with pytest.raises(UserError, match="--target sm75: has no INT4; use --scheme int8"):
        check_targets({FC1: W8A8, Q_PROJ: int4(128)}, turing)
    check_targets({FC1: W8A8}, turing)
    check_targets({}, turing)


def test_sizes_counted_by_hand() -> None:
    """INT4 takes half a byte for a weight and two for a scale, INT8 one and four; the rest is float16."""
    shapes = {f"{Q_PROJ}.weight": (256, 256), f"{FC1}.weight": (300, 100), f"{FC1}.bias": (300,)}
    sizes = estimate_sizes(shapes, {Q_PROJ: int4(128), FC1: W8A8})
    assert sizes.float16_bytes == 2 * (256 * 256 + 300 * 100 + 300)
    assert sizes.quantized_bytes == (256 * 256 // 2 + 2 * 256 * 2) + (300 * 100 + 4 * 300) + 2 * 300
    assert sizes.int4_bytes == 256 * 256 // 2
    assert estimate_sizes(shapes, {}) == Sizes(sizes.float16_bytes, sizes.float16_bytes)
    assert Sizes(300, 100).compression == 3.0


def test_simulated_codes_are_stored_in_whole_int4_and_int8() -> None:
    shapes = {f"{Q_PROJ}.weight": (256, 256)}
    three, six = (estimate_sizes(shapes, {Q_PROJ: s}) for s in (LinearScheme(3, 8, 128), LinearScheme(6, 6, None)))
    assert three.quantized_bytes == estimate_sizes(shapes, {Q_PROJ: int4(128)}).quantized_bytes
    assert six.quantized_bytes == estimate_sizes(shapes, {Q_PROJ: W8A8}).quantized_bytes


def test_a_large_int4_linear_is_almost_four_times_smaller() -> None:
    """5120 x 13824, as in LLaVA-13B: a weight takes 4 bits, and 16/128 bits of a scale."""
    sizes = estimate_sizes({f"{DOWN_PROJ}.weight": (5120, 13824)}, {DOWN_PROJ: int4(128)})
    assert sizes.compression == pytest.approx(16 / (4 + 16 / 128))


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
        ("base: int5", ["base", "'int4', 'int8', 'fp16', 'sim-w6a6', 'sim-w4a4', 'sim-w4a8' or 'sim-w3a16'"]),
        ("bits: 4", ["bits: Extra inputs are not permitted", "write base, and rules"]),
        ("rules: W8A8", ["rules", "list"]),
        ("rules: [{match: '*'}]", ["rules.0.scheme: Field required"]),
        ("rules: [{match: '*', scheme: W8A8, bits: 8}]", ["rules.0.bits: Extra inputs are not permitted"]),
        (
            "rules: [{match: '*', scheme: W5A16}]",
            ["rules.0.scheme", "W5A16: weights have 3, 4, 6 or 8 bits, activations 4, 6"],
        ),
        (
            "rules: [{match: '*', scheme: W4A2}]",
            ["rules.0.scheme", "W4A2: weights have", "write W4A16, for example, or float"],
        ),
        ("rules: [{match: '*', scheme: int4}]", ["rules.0.scheme", "int4: weights have", "write W4A16"]),
        ("rules: [{match: '*', scheme: 4}]", ["rules.0.scheme", "string"]),
        ("rules: [{match: '*', scheme: W4A16, group_size: 32}]", ["rules.0.group_size", "128 or 64"]),
        ("rules: [{match: '*', scheme: W8A8, group_size: 64}]", ["rules.0", "W8A8 has no groups"]),
        ("rules: [{match: '*', scheme: W6A4, group_size: 64}]", ["rules.0", "W6A4 has no groups"]),
        ("rules: [{match: '*', scheme: float, group_size: 64}]", ["rules.0", "float has no groups"]),
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


# Simulated schemes and engines


@pytest.mark.parametrize("backend", [(), ("--backend", "tensorrt-rtx"), ("--backend", "tensorrt"), ("--target", "sm89")])
@pytest.mark.parametrize("scheme", SIMULATED)
def test_an_engine_with_a_simulated_preset_is_refused(
    llava: Llava, absent: Path, scheme: str, backend: tuple[str, ...]
) -> None:
    refused = run_export(llava(), absent, "--scheme", scheme, *backend)
    assert_refused(
        refused, f"--scheme {scheme}: TensorRT has no kernel", "INT4 is weight-only", "add --backend onnx", "int8"
    )


def test_a_simulated_preset_is_refused_before_model_and_backend_are_opened(absent: Path, tmp_path: Path) -> None:
    refused = run_export(tmp_path / "no-model", absent, "--scheme", "sim-w4a4", "--dry-run")
    assert_refused(refused, "--scheme sim-w4a4: TensorRT has no kernel for W4A4")


@pytest.mark.parametrize("recipe", ["base: sim-w4a8", f"rules: [{{match: {Q_PROJ}, scheme: W4A8}}]"])
def test_an_engine_with_a_simulated_linear_is_refused(llava: Llava, absent: Path, tmp_path: Path, recipe: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe)
    first = "vision_tower.vision_model.encoder.layers.0.self_attn.k_proj" if "base" in recipe else Q_PROJ
    refused = run_export(llava(), absent, "--recipe", path, "--backend", "tensorrt-rtx")
    assert_refused(refused, f"--recipe: {first} is W4A8, for which TensorRT has no kernel", "add --backend onnx", "W4A16")


def test_a_simulated_base_may_be_an_engine_when_rules_replace_all_of_it(llava: Llava, absent: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("base: sim-w4a8\nrules: [{match: '*', scheme: W8A8}]")
    result = run_export(llava(), absent, "--recipe", path, "--backend", "tensorrt-rtx", "--dry-run")
    assert result.exit_code == 0, result.stderr
