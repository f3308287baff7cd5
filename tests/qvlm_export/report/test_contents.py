"""What is said about an export is what its ONNX files hold: sizes, schemes, linears."""

from __future__ import annotations

import math
import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import pytest
from commands import write_calibration

import qvlm_export
from qvlm_export.calibrate.errors import UserError
from qvlm_export.engines.graph.float_graphs import expected_shapes
from qvlm_export.engines.manifest import read_manifest, write_manifest
from qvlm_export.report.contents import COMPONENTS, Component, component_of, component_sizes, inspect

Llava = Callable[..., Path]
# scheme, whether the head is tied, bits per weight of the language model and of the projector to a tenth
CASES = {"int4": (False, 4.1, 8.2), "int8": (True, 8.2, 8.3), "fp16": (True, 16.0, 16.0)}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plan of the tiny model with engines. Do not write beside it."""
    plan = tmp_path_factory.mktemp("inspect") / "x.plan"
    qvlm_export.export("tiny", plan, backend="tensorrt-rtx", targets=("sm89",), samples=2)
    return plan


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, llava: Llava, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Scheme and plan of an export without engines. Do not write beside it."""
    folder = tmp_path_factory.mktemp("graphs")
    data, plan = write_calibration(folder), folder / "out" / "x.plan"
    tie = CASES[request.param][0]
    qvlm_export.export(str(llava(tie=tie)), plan, backend="onnx", scheme=request.param, calib_data=data)
    return request.param, plan


def tensors(plan: Path) -> dict[str, ir.TensorProtocol]:
    """Every constant of both graphs."""
    graphs = [ir.load(plan.with_suffix(suffix)).graph for suffix in (".vision.onnx", ".onnx")]
    return {str(n): v.const_value for g in graphs for n, v in g.initializers.items() if v.const_value is not None}


def weights_by_component(plan: Path) -> dict[str, int]:
    """Bytes of weights and their scales in the graphs; activation scales and tables of the graph are none."""
    found: Counter[str] = Counter()
    for name, tensor in tensors(plan).items():
        part = next((part for part, names in COMPONENTS.items() if name.startswith(names)), None)
        if part is not None and not name.endswith((".input_scale", ".input_scale_float32")):
            found[part] += tensor.nbytes
    return dict(found)


def stored(components: tuple[Component, ...]) -> dict[str, int]:
    return {c.name: c.stored_bytes for c in components}


def test_sizes_are_those_of_the_graphs_tensors(case: tuple[str, Path]) -> None:
    _, plan = case
    assert stored(inspect(plan).components) == weights_by_component(plan)


def test_sizes_with_engines_are_those_of_the_graphs_tensors(engine: Path) -> None:
    assert stored(inspect(engine).components) == weights_by_component(engine)


def test_the_sum_is_the_size_of_the_data_files(case: tuple[str, Path]) -> None:
    """But for the rotary tables, float16 [max_length, head_dim / 2] twice, and tensors too small to be external."""
    _, plan = case
    found = inspect(plan)
    manifest, sizes = found.manifest, stored(found.components)
    language = sizes["language_model"] + sizes["lm_head"] + sizes["embeddings"]
    tables = 2 * manifest.limits.max_length * manifest.config.text.head_dim
    assert abs(plan.with_suffix(".onnx.data").stat().st_size - language - tables) < 4096
    vision = sizes["vision_tower"] + sizes["projector"]
    assert abs(plan.with_suffix(".vision.onnx.data").stat().st_size - vision) < 16384
    assert found.total.stored_bytes == language + vision


def test_bits_per_weight(case: tuple[str, Path]) -> None:
    scheme, plan = case
    bits = {c.name: c.bits_per_weight for c in inspect(plan).components}
    _, language, projector = CASES[scheme]
    assert bits["language_model"] == pytest.approx(language, abs=0.1)
    assert bits["projector"] == pytest.approx(projector, abs=0.1)
    assert bits["embeddings"] == 16


def test_a_tied_head_has_no_parameters_of_its_own(case: tuple[str, Path]) -> None:
    scheme, plan = case
    found = inspect(plan)
    text = found.manifest.config.text
    sizes = {c.name: c for c in found.components}
    table = text.vocab_size * text.hidden_size
    assert sizes["embeddings"] == Component("embeddings", table, 2 * table, 2 * table)
    own = 0 if CASES[scheme][0] else table
    assert sizes["lm_head"] == Component("lm_head", own, 2 * own, 2 * table)
    assert sizes["lm_head"].bits_per_weight == (16 if own else None)
    assert found.total.parameters == sum(c.parameters for c in found.components)
    assert found.summary()["tied_head"] is CASES[scheme][0]


def test_every_tensor_belongs_to_one_component(engine: Path) -> None:
    manifest = read_manifest(engine.with_suffix(".json"))
    shapes = expected_shapes(manifest.config)
    assert {component_of(name) for name in shapes} == set(COMPONENTS)
    for name in shapes:
        assert sum(name.startswith(beginnings) for beginnings in COMPONENTS.values()) == 1, name


def test_linears_are_those_of_the_graphs(case: tuple[str, Path]) -> None:
    _, plan = case
    found = inspect(plan).linears
    constants = tensors(plan)
    codes, floats = ".weight_codes", ".weight_transposed"
    for suffix, quantized in ((codes, True), (floats, False)):
        wanted = {n.removesuffix(suffix): (*t.shape.numpy()[::-1],) for n, t in constants.items() if n.endswith(suffix)}
        assert {linear.name: linear.shape for linear in found if linear.quantized is quantized} == wanted


def test_schemes_and_kernels(engine: Path) -> None:
    found = Counter((linear.component, linear.scheme, linear.executed) for linear in inspect(engine).linears)
    assert found == {
        ("vision_tower", "W8A8", "int8 x int8 -> float"): 18,
        ("projector", "W8A8", "int8 x int8 -> float"): 2,
        ("language_model", "W4A16 g128", "half x int4 -> half"): 28,
        ("lm_head", "float16", None): 1,
    }


def test_without_engines_no_kernel_is_claimed(case: tuple[str, Path]) -> None:
    _, plan = case
    found = inspect(plan)
    assert {linear.executed for linear in found.linears} == {None}
    assert found.summary()["plan_check"] == {"checked": 0, "passed": 0}


def test_files_and_their_states(engine: Path, tmp_path: Path) -> None:
    shutil.copytree(engine.parent, tmp_path / "copy")
    plan = tmp_path / "copy" / "x.plan"
    plan.write_bytes(plan.read_bytes() + b"x")
    shutil.rmtree(plan.with_suffix(".calibrated"))
    (plan.with_suffix(".processor") / "tokenizer.json").unlink()
    found = inspect(plan)
    assert {file.name: file.state for file in found.files if file.state != "present"} == {
        "x.plan": "changed",
        "x.calibrated": "missing",
        "x.processor": "changed",
    }
    assert len(found.files) == 9
    assert found.verified is None


def test_verified_files(engine: Path) -> None:
    fractions: list[float] = []
    found = inspect(engine, verify=True, progress=fractions.append)
    inside = {
        f"x.{role}": [path for path in engine.with_suffix(f".{role}").rglob("*") if path.is_file()]
        for role in ("processor", "calibrated")
    }
    count = 7 + sum(map(len, inside.values()))
    assert (found.verified, len(fractions), fractions[-1]) == (count, count, 1.0)
    assert Counter(file.state for file in found.files) == {"verified": 9}
    sizes = {file.name: (file.bytes, file.sha256) for file in found.files if file.name in inside}
    assert sizes == {name: (sum(path.stat().st_size for path in paths), None) for name, paths in inside.items()}


@pytest.mark.parametrize(
    ("linear", "scheme", "words"),
    [
        ("language_model.no_such", "W8A8", "linear language_model.no_such as W8A8"),
        ("multi_modal_projector.linear_1", "W8A8 and more", "as W8A8 and more"),
        ("multi_modal_projector.linear_1", "W5A16 g128", "W5A16: weights have"),
        ("multi_modal_projector.linear_1", "W4A16", "group_size"),
    ],
)
def test_linears_that_cannot_be(engine: Path, tmp_path: Path, linear: str, scheme: str, words: str) -> None:
    manifest = read_manifest(engine.with_suffix(".json"))
    path = tmp_path / "x.json"
    write_manifest(replace(manifest, path=path, linears={**manifest.linears, linear: scheme}))
    with pytest.raises(
        UserError, match=f"^{re.escape(str(path))}: the manifest is damaged .*{re.escape(words)}.*export again"
    ):
        inspect(path)


def test_sizes_follow_the_plan(engine: Path) -> None:
    """One INT4 linear less: its weights take 16 bits instead of 4 and a float16 scale for 128."""
    manifest = read_manifest(engine.with_suffix(".json"))
    name = "language_model.model.layers.0.mlp.up_proj"
    shapes = expected_shapes(manifest.config)
    fewer = replace(manifest, linears={n: s for n, s in manifest.linears.items() if n != name})
    before, after = stored(component_sizes(manifest, shapes)), stored(component_sizes(fewer, shapes))
    count = math.prod(shapes[f"{name}.weight"])
    grown = count * (16 - 4) // 8 - count // 128 * 2
    assert after == {**before, "language_model": before["language_model"] + grown}
