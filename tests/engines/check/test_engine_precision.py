"""The engine precision check on built plans: linears that run on integers, and linears quantized in the graph only."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import pytest
from small_export import LIMITS, PARTS, calibrate, of_part, open_small, schemes_of, write_quantized
from small_graphs import INPUTS, LINEAR, build, int4_model, int8_model

from qvlm_export.calibrate.checkpoint.scheme import W8A8, LinearScheme
from qvlm_export.calibrate.errors import UserError
from qvlm_export.engines.backend import choose_backend
from qvlm_export.engines.builder.build import BuildJob, build_engines, language_profile, vision_profile
from qvlm_export.engines.check.engine_precision import (
    LinearCheck,
    check_engine_precision,
    read_gemms,
    require_integer_products,
)

W4A16 = LinearScheme(weight_bits=4, activation_bits=None, group_size=128)
W8A16 = LinearScheme(weight_bits=8, activation_bits=None, group_size=None)


@pytest.fixture(scope="module")
def built(llava, tmp_path_factory):
    """(preset, part) -> path of the plan and the schemes of its linears; the decoder is built for both presets."""
    checkpoint = open_small(llava())
    profiles = {"vision": vision_profile(checkpoint.config, LIMITS), "language": language_profile(checkpoint.config, LIMITS)}
    folder = tmp_path_factory.mktemp("plans")
    plans, jobs = {}, []
    schemes = {preset: schemes_of(checkpoint, preset) for preset in ("int4", "int8")}
    schemes["w8a16"] = {name: replace(scheme, activation_bits=None) for name, scheme in schemes["int8"].items()}
    for preset, chosen in schemes.items():
        calibrated = calibrate(checkpoint, chosen, folder / f"{preset}.calibrated")
        for part in PARTS if preset == "int4" else ("language",):
            onnx_file = write_quantized(checkpoint, calibrated, part, ir.DataType.FLOAT16, folder / preset)
            jobs.append(BuildJob(str(onnx_file), str(onnx_file.with_suffix(".plan")), profiles[part]))
            plans[preset, part] = (onnx_file.with_suffix(".plan"), of_part(calibrated.schemes, part))
    build_engines(choose_backend("tensorrt-rtx", ("sm89",)), jobs, lambda *_: None)
    return plans


EXECUTED = {
    ("int4", "vision"): ("W8A8", "int8 x int8 -> float", 20),
    ("int4", "language"): ("W4A16", "half x int4 -> half", 14),
    ("int8", "language"): ("W8A8", "int8 x int8 -> float", 14),
    ("w8a16", "language"): ("W8A16", "half x int8 -> half", 14),
}


@pytest.mark.parametrize("case", EXECUTED, ids="-".join)
def test_every_linear_with_a_scheme_runs_on_integers(built, case):
    plan, schemes = built[case]
    scheme, executed, count = EXECUTED[case]
    checks = check_engine_precision(plan, schemes)
    assert checks == [LinearCheck(name, scheme, executed, True) for name in schemes]
    assert len(checks) == count
    require_integer_products(plan, checks)


def test_linears_without_a_scheme_run_in_float16(built):
    plan, _ = built["int4", "language"]
    heads = [gemm for gemm in read_gemms(plan) if "language_model.lm_head" in gemm.linears]
    assert [gemm.operands[:2] for gemm in heads] == [("half", "half")]


def test_linears_of_another_scheme_fail(built):
    plan, schemes = built["int4", "language"]
    assert not any(check.passed for check in check_engine_precision(plan, dict.fromkeys(schemes, W8A8)))
    assert not any(check.passed for check in check_engine_precision(plan, dict.fromkeys(schemes, LinearScheme(4, 8, 128))))
    plan, schemes = built["int8", "language"]
    assert not any(check.passed for check in check_engine_precision(plan, dict.fromkeys(schemes, W4A16)))
    assert not any(check.passed for check in check_engine_precision(plan, dict.fromkeys(schemes, W8A16)))
    plan, schemes = built["w8a16", "language"]
    assert not any(check.passed for check in check_engine_precision(plan, dict.fromkeys(schemes, W8A8)))
    plan, schemes = built["int8", "language"]
    assert not any(check.passed for check in check_engine_precision(plan, dict.fromkeys(schemes, LinearScheme(6, 6, None))))


def test_a_linear_that_is_missing_from_the_plan_fails(built):
    plan, schemes = built["int4", "language"]
    name = "language_model.model.layers.7.mlp.up_proj"
    checks = check_engine_precision(plan, schemes | {name: W4A16})
    assert checks[-1] == LinearCheck(name, "W4A16", "nothing under this name", False)
    with pytest.raises(
        UserError, match=re.escape(f"language.plan: 1 of 15 quantized linears do not run as they should; {name}")
    ):
        require_integer_products(plan, checks)


WRONG = {
    # model, scheme of its linear, types that are executed
    "int4-per-channel": (lambda: int4_model(block_size=None), W4A16, "half x half -> half"),
    "int8-per-channel-activation": (lambda: int8_model(activation_scales=INPUTS), W8A8, "float x int8 -> half"),
    "int8-half-sums": (lambda: int8_model(dequantize_type="float16"), W8A8, "int8 x int8 -> half"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_linear_that_builds_but_runs_on_other_types_fails(tmp_path, case):
    make, scheme, executed = WRONG[case]
    build(make(), tmp_path)
    checks = check_engine_precision(tmp_path / "small.plan", {LINEAR: scheme})
    assert checks == [LinearCheck(LINEAR, scheme.name, executed, False)]
    with pytest.raises(UserError) as caught:
        require_integer_products(tmp_path / "small.plan", checks)
    message = str(caught.value)
    assert message.startswith(f"small.plan: 1 of 1 quantized linears do not run as they should; {LINEAR} is {scheme.name}")
    assert executed in message
    assert "\n" not in message


@pytest.mark.parametrize("case", ["int4", "int8"])
def test_the_same_linears_in_the_form_that_fuses_pass(tmp_path, case):
    model, scheme = (int4_model(block_size=128), W4A16) if case == "int4" else (int8_model(), W8A8)
    build(model, tmp_path)
    assert [check.passed for check in check_engine_precision(tmp_path / "small.plan", {LINEAR: scheme})] == [True]


@pytest.mark.parametrize("content", [random.Random(0).randbytes(100_000), b"x", b""], ids=["random", "one-byte", "empty"])
def test_a_file_without_programs_is_an_error(tmp_path, content):
    path = tmp_path / "random.plan"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"^random\.plan: holds no readable program, so what it executes cannot be proven"):
        check_engine_precision(path, {LINEAR: W8A8})


def test_a_truncated_plan_does_not_pass(built, tmp_path):
    plan, schemes = built["int8", "language"]
    content = plan.read_bytes()
    (tmp_path / "cut.plan").write_bytes(content[: content.index(b"fully_connected=")])
    with pytest.raises(UserError, match=r"cut\.plan"):
        require_integer_products(tmp_path / "cut.plan", check_engine_precision(tmp_path / "cut.plan", schemes))


def test_a_tied_head_is_stored_once_with_the_embeddings(llava: Callable[..., Path], tmp_path: Path) -> None:
    sizes = {}
    for tie in (False, True):
        checkpoint = open_small(llava(tie=tie, text={"vocab_size": 16384}))
        calibrated = calibrate(checkpoint, schemes_of(checkpoint, "int4"), tmp_path / f"{tie}.calibrated")
        onnx_file = write_quantized(checkpoint, calibrated, "language", ir.DataType.FLOAT16, tmp_path / f"{tie}")
        job = BuildJob(str(onnx_file), str(tmp_path / f"{tie}.plan"), language_profile(checkpoint.config, LIMITS))
        build_engines(choose_backend("tensorrt-rtx", ("sm89",)), [job], lambda *_: None)
        plan = tmp_path / f"{tie}.plan"
        sizes[tie] = plan.stat().st_size, onnx_file.with_suffix(".onnx.data").stat().st_size
        heads = [gemm for gemm in read_gemms(plan) if "language_model.lm_head" in gemm.linears]
        assert [gemm.operands[:2] for gemm in heads] == [("half", "half")]
    table = 2 * 16384 * checkpoint.config.text.hidden_size
    for apart, together in zip(sizes[False], sizes[True], strict=True):
        assert apart - together == pytest.approx(table, rel=0.01)
