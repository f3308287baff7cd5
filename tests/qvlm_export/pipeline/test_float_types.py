"""--dtype: activations beyond float16's range are refused by name, and bfloat16 graphs and engines hold them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import assert_refused, copy_checkpoint, export_onnx, export_to, run_export, write_calibration
from logits import question, reference_logits, relative_l2
from safetensors.torch import load_file, save_file

import qvlm_export
from qvlm_export.calibrate.checkpoint.calibrated import CalibratedCheckpoint
from qvlm_export.engines.check.engine_precision import read_gemms

Llava = Callable[..., Path]
DOWN, UP = "language_model.model.layers.0.mlp.down_proj.weight", "language_model.model.layers.1.mlp.up_proj.weight"


def scale_tensors(source: Path, folder: Path, factors: dict[str, float]) -> Path:
    """A copy of the checkpoint with some tensors multiplied by a factor."""
    copy_checkpoint(source, folder)
    path = folder / "model.safetensors"
    tensors: dict[str, torch.Tensor] = load_file(path)
    for name, factor in factors.items():
        tensors[name] = tensors[name] * factor
    save_file(tensors, path, {"format": "pt"})
    return folder


@pytest.fixture
def huge(llava: Llava, tmp_path: Path) -> Path:
    """A bfloat16 checkpoint whose residual stream exceeds 65504 behind the first layer of the decoder."""
    return scale_tensors(llava(dtype="bfloat16"), tmp_path / "huge", {DOWN: 2.0**15})


@pytest.mark.parametrize("arguments", [("--scheme", "fp16"), (), ("--scheme", "int8"), ("--effort", "fast")], ids=repr)
def test_activations_beyond_float16_are_refused_by_name(huge: Path, absent: Path, arguments: tuple[str, ...]) -> None:
    assert np.isfinite(reference_logits(huge)).all()
    place = "language_model.model.layers.0.mlp.down_proj.output"
    assert_refused(export_onnx(huge, absent, *arguments), place, "beyond float16's 65504", "add --dtype bfloat16")


def test_a_product_inside_a_block_is_seen_too(llava: Llava, absent: Path, tmp_path: Path) -> None:
    factors = {UP: 2.0**18, UP.replace("up_proj", "down_proj"): 2.0**-18}
    model = scale_tensors(llava(dtype="bfloat16"), tmp_path / "product", factors)
    assert_refused(export_onnx(model, absent), "layers.1.mlp.up_proj.output", "--dtype bfloat16")


def test_logits_beyond_float16_are_seen_too(llava: Llava, absent: Path, tmp_path: Path) -> None:
    model = scale_tensors(llava(dtype="bfloat16"), tmp_path / "logits", {"language_model.lm_head.weight": 2.0**14})
    assert_refused(export_onnx(model, absent), "language_model.lm_head.output", "--dtype bfloat16")


def test_a_search_on_a_float16_checkpoint_sees_them_in_its_own_passes(llava: Llava, absent: Path, tmp_path: Path) -> None:
    factors = {DOWN: 2.0**10, DOWN.replace("down", "up"): 2.0**6}
    model = scale_tensors(llava(), tmp_path / "float16", factors)
    assert_refused(export_onnx(model, absent, "--effort", "fast"), "layers.0.mlp.down_proj.output", "--dtype bfloat16")


@pytest.mark.parametrize("scheme", ["fp16", "int4", "int8"])
def test_a_bfloat16_graph_holds_them(huge: Path, tmp_path: Path, scheme: str) -> None:
    plan = tmp_path / "out" / "x.plan"
    export_to(huge, plan, "--backend", "onnx", "--scheme", scheme, "--dtype", "bfloat16", "--calib-data",
              write_calibration(tmp_path))  # fmt: skip
    with qvlm_export.load(plan, "onnxruntime") as model:
        assert model.manifest.float_type == "bfloat16"
        logits = model.logits(*question(huge))
    assert np.isfinite(logits).all()
    if scheme == "fp16":  # rotary tables and biases are rounded to bfloat16
        assert relative_l2(logits, reference_logits(huge)) < 0.02


@pytest.mark.parametrize("effort", ["rtn", "fast"])
def test_scales_of_a_bfloat16_graph_are_bfloat16(huge: Path, tmp_path: Path, effort: str) -> None:
    plan = tmp_path / "out" / "x.plan"
    export_to(huge, plan, "--backend", "onnx", "--dtype", "bfloat16", "--effort", effort, "--calib-data",
              write_calibration(tmp_path))  # fmt: skip
    calibrated = CalibratedCheckpoint(plan.parent / "x.calibrated")
    for name, scheme in calibrated.schemes.items():
        assert scheme.float_type == "bfloat16"
        if scheme.group_size is not None:
            scale = torch.from_numpy(calibrated.scale(name)).float()
            assert torch.equal(scale.bfloat16().float(), scale)
        if (input_scale := calibrated.input_scale(name)) is not None:
            assert float(torch.tensor(input_scale).bfloat16()) == input_scale


def test_the_record_holds_the_largest_activations(llava: Llava, tmp_path: Path) -> None:
    def read_summary(*arguments: str) -> dict[str, Any]:
        plan = tmp_path / "-".join(arguments) / "x.plan"
        export_to(
            llava(dtype="bfloat16"), plan, "--backend", "onnx", "--calib-data", write_calibration(tmp_path), *arguments
        )
        record: dict[str, Any] = json.loads((plan.parent / "x.calibrated" / "calibration.json").read_text())
        return record["summary"]

    searched = {block["name"]: block["largest_activations"] for block in read_summary("--effort", "fast")["blocks"]}
    measured = read_summary("--effort", "rtn")["largest_activations"]
    assert set(measured) == {*searched, "logits"}
    block = "language_model.model.layers.1"
    assert {"output", "self_attn.q_proj.output", "mlp.down_proj.input"} <= set(measured[block])
    assert 0.5 < measured[block]["output"] / searched[block]["output"] < 2


@pytest.mark.parametrize("scheme", ["int4", "int8"])
def test_engines_in_bfloat16_run_on_the_same_integers(llava: Llava, tmp_path: Path, scheme: str) -> None:
    plan = tmp_path / "out" / "x.plan"
    content = export_to(llava(), plan, "--scheme", scheme, "--dtype", "bfloat16", "--target", "sm89")
    assert content["linears"]["checked_integer"] == content["linears"]["quantized"] > 0
    operands = {gemm.operands[:2] for gemm in read_gemms(plan)}
    assert {("bf16", "int4")} < operands if scheme == "int4" else ("int8", "int8") in operands
    assert not any("half" in pair for pair in operands)


def test_an_unknown_type_is_refused(llava: Llava, absent: Path) -> None:
    assert_refused(run_export(llava(), absent, "--dtype", "float32"), "--dtype float32: unknown", "float16, bfloat16")


@pytest.mark.parametrize("effort", ["rtn", "fast"])
def test_an_activation_scale_may_be_beyond_float16(llava: Llava, tmp_path: Path, effort: str) -> None:
    norm = "language_model.model.layers.0.input_layernorm.weight"
    model = scale_tensors(llava(dtype="bfloat16"), tmp_path / "norm", {norm: 2.0**24})
    plan = tmp_path / "out" / "x.plan"
    export_to(model, plan, "--backend", "onnx", "--scheme", "int8", "--dtype", "bfloat16", "--effort", effort,
              "--strict", "--calib-data", write_calibration(tmp_path))  # fmt: skip
    scale = CalibratedCheckpoint(plan.parent / "x.calibrated").input_scale("language_model.model.layers.0.self_attn.q_proj")
    assert scale is not None
    assert 65504 < scale < 2.0**24
    assert float(torch.tensor(scale).bfloat16()) == scale


def test_a_weight_beyond_the_scales_of_groups_is_refused(llava: Llava, absent: Path, tmp_path: Path) -> None:
    model = scale_tensors(llava(dtype="bfloat16"), tmp_path / "weight", {UP: 2.0**24})
    assert_refused(export_onnx(model, absent, "--dtype", "bfloat16"), UP, "beyond what W4A16 can hold", "--scheme int8")


def test_a_float_export_that_would_answer_nan_is_refused(llava: Llava, absent: Path, tmp_path: Path) -> None:
    model = scale_tensors(llava(dtype="float32"), tmp_path / "inf", {UP: 1e37, UP.replace("up_proj", "down_proj"): 1e10})
    for dtype in ("float16", "bfloat16"):
        refused = export_onnx(model, absent, "--scheme", "fp16", "--dtype", dtype)
        assert_refused(refused, "language_model.model.layers.")


def test_the_calibrated_checkpoint_names_its_float_type(llava: Llava, tmp_path: Path) -> None:
    plan = tmp_path / "out" / "x.plan"
    export_to(llava(), plan, "--backend", "onnx", "--dtype", "bfloat16", "--calib-data", write_calibration(tmp_path))
    config = json.loads((plan.parent / "x.calibrated" / "config.json").read_text())
    assert {config["dtype"], config["text_config"]["dtype"], config["vision_config"]["dtype"]} == {"bfloat16"}
