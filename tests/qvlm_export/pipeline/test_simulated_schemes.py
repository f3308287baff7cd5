"""Exports with simulated schemes: written as graphs for ONNX Runtime, and usable by every other command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from commands import ANY_ACCURACY, PICTURE, export_onnx, read_files, run_model
from typer import Typer
from typer.testing import CliRunner

import qvlm_export
from qvlm_export.cli.inspect import app as inspect_app
from qvlm_export.cli.validate import app as validate_app
from qvlm_export.pipeline.preparation.recipe import SIMULATED

Llava = Callable[..., Path]
GRAPHS = {"x.onnx", "x.onnx.data", "x.vision.onnx", "x.vision.onnx.data"}
FILES = {"x.json", "x.report.html", "x.calibrated", "x.processor", "x.prefix.safetensors", *GRAPHS}
INT4, INT8 = onnx.TensorProto.INT4, onnx.TensorProto.INT8
SCHEMES = {"sim-w6a6": "W6A6", "sim-w4a4": "W4A4 g128", "sim-w4a8": "W4A8 g128", "sim-w3a16": "W3A16 g128"}


@pytest.fixture(scope="module", params=SIMULATED)
def exported(request: pytest.FixtureRequest, llava: Llava, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A simulated scheme, and the plan path that its export is named after."""
    plan = tmp_path_factory.mktemp("simulated") / "out" / "x.plan"
    result = export_onnx(llava(), plan, "--scheme", request.param, "--max-length", "128")
    assert result.exit_code == 0, result.stderr
    return request.param, plan


def read_json(app: Typer, plan: Path, *arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, [str(plan), "--json", *arguments])
    assert result.exit_code == 0, result.stderr
    content: dict[str, Any] = json.loads(result.stdout)
    return content


def test_graphs_and_calibrated_checkpoint_are_written_but_no_engine(exported: tuple[str, Path]) -> None:
    scheme, plan = exported
    assert {path.name for path in plan.parent.iterdir()} == FILES
    manifest = json.loads(plan.with_suffix(".json").read_text(encoding="utf-8"))
    assert (manifest["scheme"], manifest["backend"]["name"], manifest["plan_check"]) == (scheme, "onnx", [])
    assert set(manifest["linears"].values()) == {SCHEMES[scheme]}
    assert len(manifest["linears"]) == 34
    for name in ("x.onnx", "x.vision.onnx"):
        tensors = onnx.load(plan.with_name(name), load_external_data=False).graph.initializer
        types = {tensor.data_type for tensor in tensors if tensor.name.endswith(".weight_codes")}
        assert types == {INT8 if scheme == "sim-w6a6" else INT4}


def test_the_graphs_answer_a_question(exported: tuple[str, Path]) -> None:
    _, plan = exported
    result = run_model(plan, "--image", PICTURE, "--prompt", "What is this?", "--max-new-tokens", 3)
    assert result.exit_code == 0, result.stderr
    assert "this export has no engine" in result.stderr
    with qvlm_export.load(plan) as model:
        logits = model.logits(np.array([[1, 7, 8, 9]]))
    assert np.isfinite(logits).all()


def test_inspect_shows_the_scheme_and_that_no_engine_was_checked(exported: tuple[str, Path]) -> None:
    scheme, plan = exported
    content = read_json(inspect_app, plan, "--verify")
    assert {linear["scheme"] for linear in content["linears"] if linear["quantized"]} == {SCHEMES[scheme]}
    assert content["plan_check"] == {"checked": 0, "passed": 0}
    sizes = {component["name"]: component for component in content["components"]}
    bits = 8 if scheme == "sim-w6a6" else 4
    # The graph stores codes as INT4 or INT8, whatever their bits, and scales and norms besides.
    assert bits < sizes["language_model"]["bits_per_weight"] < bits + 0.5


def test_validate_finds_the_calibrated_integers_in_the_graph(exported: tuple[str, Path], llava: Llava) -> None:
    scheme, plan = exported
    content = read_json(validate_app, plan, "--reference", str(llava()), "--limit", "2", "--per-layer", *ANY_ACCURACY)
    assert content["scheme"] == scheme
    assert content["weights"] == {"checked": 34, "wrong": []}
    sqnr_db = {c["against"]: c["tokens"]["all"]["sqnr_db"] for c in content["forms"][2]["comparisons"]}
    assert sqnr_db["fake-quant"] > 6 + sqnr_db["float"]
    assert content["loss"]["form"] == "fake-quant"


def test_the_same_export_twice_writes_the_same_bytes(exported: tuple[str, Path], llava: Llava, tmp_path: Path) -> None:
    scheme, plan = exported
    again = tmp_path / "again" / "x.plan"
    assert export_onnx(llava(), again, "--scheme", scheme, "--max-length", "128").exit_code == 0
    assert read_files(again.parent) == read_files(plan.parent)


def test_a_recipe_of_many_schemes(llava: Llava, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "base: sim-w6a6\n"
        "rules:\n"
        "- {match: '*.mlp.gate_proj', scheme: W3A8, group_size: 64}\n"
        "- {match: '*.mlp.up_proj', scheme: W4A16}\n"
        "- {match: '*.o_proj', scheme: W8A16}\n"
        "- {match: 'multi_modal_projector.*', scheme: W8A8}\n"
        "- {match: 'vision_tower.*', scheme: float}\n"
    )
    plan = tmp_path / "out" / "x.plan"
    result = export_onnx(llava(), plan, "--recipe", recipe, "--max-length", "128")
    assert result.exit_code == 0, result.stderr
    content = read_json(validate_app, plan, "--reference", str(llava()), "--limit", "1", *ANY_ACCURACY)
    assert content["weights"] == {"checked": 16, "wrong": []}
    shown = {linear["name"].rpartition(".")[2]: linear["scheme"] for linear in read_json(inspect_app, plan)["linears"]}
    names = ("gate_proj", "up_proj", "o_proj", "down_proj", "linear_1")
    assert [shown[name] for name in names] == ["W3A8 g64", "W4A16 g128", "W8A16", "W6A6", "W8A8"]
