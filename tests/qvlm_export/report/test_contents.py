"""Inspection of an export: sizes, schemes and linears must be those of its ONNX files."""

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
# scheme: (whether the head is tied, bits per weight of the language model, and of the projector, each within 0.1)
CASES = {"int4": (False, 4.1, 8.2), "int8": (True, 8.2, 8.3), "fp16": (True, 16.0, 16.0)}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The engine file of an export of the tiny model. Do not write beside it."""
    plan = tmp_path_factory.mktemp("inspect") / "x.plan"
    qvlm_export.export("tiny", plan, backend="tensorrt-rtx", targets=("sm89",), samples=2)
    return plan


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, llava: Llava, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Scheme and path of an export without engines. Do not write beside it."""
    folder = tmp_path_factory.mktemp("graphs")
    data, plan = write_calibration(folder), folder / "out" / "x.plan"
    tie = CASES[request.param][0]
    qvlm_export.export(str(llava(tie=tie)), plan, backend="onnx", scheme=request.param, calib_data=data)
    return request.param, plan


def tensors(plan: Path) -> dict[str, ir.TensorProtocol]:
    """Every initializer of both graphs by name."""
    graphs = [ir.load(plan.with_suffix(suffix)).graph for suffix in (".vision.onnx", ".onnx")]
    return {str(n): v.const_value for g in graphs for n, v in g.initializers.items() if v.const_value is not None}


def weights_by_component(plan: Path) -> dict[str, int]:
    """Bytes of weights and their scales in the graphs by component, without activation scales and rotary tables."""
    sizes: Counter[str] = Counter()
    for name, tensor in tensors(plan).items():
        part = next((part for part, names in COMPONENTS.items() if name.startswith(names)), None)
        if part is not None and not name.endswith((".input_scale", ".input_scale_float32")):
            sizes[part] += tensor.nbytes
    return dict.fromkeys(COMPONENTS, 0) | dict(sizes)


def stored_sizes(components: tuple[Component, ...]) -> dict[str, int]:
    return {c.name: c.stored_bytes for c in components}


def test_sizes_are_those_of_the_graphs_tensors(case: tuple[str, Path]) -> None:
    _, plan = case
    assert stored_sizes(inspect(plan).components) == weights_by_component(plan)


def test_sizes_with_engines_are_those_of_the_graphs_tensors(engine: Path) -> None:
    assert stored_sizes(inspect(engine).components) == weights_by_component(engine)


def test_the_sizes_add_up_to_those_of_the_data_files(case: tuple[str, Path]) -> None:
    """Except for the two rotary tables, float16 [max_length, head_dim / 2], and tensors too small to be external."""
    _, plan = case
    inspection = inspect(plan)
    manifest, sizes = inspection.manifest, stored_sizes(inspection.components)
    language = sizes["language_model"] + sizes["lm_head"] + sizes["embeddings"]
    tables = 2 * manifest.limits.max_length * manifest.config.text.head_dim
    assert abs(plan.with_suffix(".onnx.data").stat().st_size - language - tables) < 4096
    vision = sizes["vision_tower"] + sizes["projector"]
    assert abs(plan.with_suffix(".vision.onnx.data").stat().st_size - vision) < 16384
    assert inspection.total.stored_bytes == language + vision


def test_bits_per_weight_are_those_of_the_scheme(case: tuple[str, Path]) -> None:
    scheme, plan = case
    bits = {c.name: c.bits_per_weight for c in inspect(plan).components}
    _, language, projector = CASES[scheme]
    assert bits["language_model"] == pytest.approx(language, abs=0.1)
    assert bits["projector"] == pytest.approx(projector, abs=0.1)
    assert bits["embeddings"] == 16


def test_a_tied_head_has_no_parameters_of_its_own(case: tuple[str, Path]) -> None:
    scheme, plan = case
    inspection = inspect(plan)
    text = inspection.manifest.config.text
    sizes = {c.name: c for c in inspection.components}
    table = text.vocab_size * text.hidden_size
    assert sizes["embeddings"] == Component("embeddings", table, 2 * table, 2 * table)
    own = 0 if CASES[scheme][0] else table
    assert sizes["lm_head"] == Component("lm_head", own, 2 * own, 2 * own)
    assert sizes["lm_head"].bits_per_weight == (16 if own else None)
    assert inspection.total.parameters == sum(c.parameters for c in inspection.components)
    assert inspection.summary()["tied_head"] is CASES[scheme][0]


def test_every_tensor_belongs_to_one_component(engine: Path) -> None:
    manifest = read_manifest(engine.with_suffix(".json"))
    shapes = expected_shapes(manifest.config)
    assert {component_of(name) for name in shapes} == set(COMPONENTS)
    for name in shapes:
        assert sum(name.startswith(prefixes) for prefixes in COMPONENTS.values()) == 1, name


def test_linears_are_those_of_the_graphs(case: tuple[str, Path]) -> None:
    scheme, plan = case
    linears = inspect(plan).linears
    constants = tensors(plan)
    codes, floats = ".weight_codes", ".weight_transposed"
    for suffix, quantized in ((codes, True), (floats, False)):
        expected = {n.removesuffix(suffix): (*t.shape.numpy()[::-1],) for n, t in constants.items() if n.endswith(suffix)}
        if CASES[scheme][0] and not quantized:  # the head is the embedding table
            expected["language_model.lm_head"] = (*constants["language_model.model.embed_tokens.weight"].shape.numpy(),)
        assert {linear.name: linear.shape for linear in linears if linear.quantized is quantized} == expected


def test_schemes_and_kernels_of_an_engine(engine: Path) -> None:
    counts = Counter((linear.component, linear.scheme, linear.executed) for linear in inspect(engine).linears)
    assert counts == {
        ("vision_tower", "W8A8", "int8 x int8 -> float"): 18,
        ("projector", "W8A8", "int8 x int8 -> float"): 2,
        ("language_model", "W4A16 g128", "half x int4 -> half"): 28,
        ("lm_head", "float16", None): 1,
    }


def test_without_engines_there_are_no_kernels(case: tuple[str, Path]) -> None:
    _, plan = case
    inspection = inspect(plan)
    assert {linear.executed for linear in inspection.linears} == {None}
    assert inspection.summary()["plan_check"] == {"checked": 0, "passed": 0}


def test_changed_and_missing_files_are_reported(engine: Path, tmp_path: Path) -> None:
    shutil.copytree(engine.parent, tmp_path / "copy")
    plan = tmp_path / "copy" / "x.plan"
    plan.write_bytes(plan.read_bytes() + b"x")
    shutil.rmtree(plan.with_suffix(".calibrated"))
    (plan.with_suffix(".processor") / "tokenizer.json").unlink()
    inspection = inspect(plan)
    assert {file.name: file.state for file in inspection.files if file.state != "present"} == {
        "x.plan": "changed",
        "x.calibrated": "missing",
        "x.processor": "changed",
    }
    assert len(inspection.files) == 10
    assert inspection.verified is None


def test_verification_reads_every_file(engine: Path) -> None:
    fractions: list[float] = []
    inspection = inspect(engine, verify=True, progress=fractions.append)
    folders = {
        f"x.{role}": [path for path in engine.with_suffix(f".{role}").rglob("*") if path.is_file()]
        for role in ("processor", "calibrated")
    }
    count = 8 + sum(map(len, folders.values()))
    assert (inspection.verified, len(fractions), fractions[-1]) == (count, count, 1.0)
    assert Counter(file.state for file in inspection.files) == {"verified": 10}
    sizes = {file.name: (file.bytes, file.sha256) for file in inspection.files if file.name in folders}
    assert sizes == {name: (sum(path.stat().st_size for path in paths), None) for name, paths in folders.items()}


@pytest.mark.parametrize(
    ("linear", "scheme", "words"),
    [
        ("language_model.no_such", "W8A8", "linear language_model.no_such as W8A8"),
        ("multi_modal_projector.linear_1", "W8A8 and more", "as W8A8 and more"),
        ("multi_modal_projector.linear_1", "W5A16 g128", "W5A16: weights have"),
        ("multi_modal_projector.linear_1", "W4A16", "group_size"),
    ],
)
def test_a_manifest_with_impossible_linears_is_refused(
    engine: Path, tmp_path: Path, linear: str, scheme: str, words: str
) -> None:
    manifest = read_manifest(engine.with_suffix(".json"))
    path = tmp_path / "x.json"
    write_manifest(replace(manifest, path=path, linears={**manifest.linears, linear: scheme}))
    with pytest.raises(
        UserError, match=f"^{re.escape(str(path))}: the manifest is damaged .*{re.escape(words)}.*export again"
    ):
        inspect(path)


def test_sizes_follow_the_schemes(engine: Path) -> None:
    """Without the scheme of one INT4 linear, its weights take 16 bits instead of 4 bits and a float16 scale for 128."""
    manifest = read_manifest(engine.with_suffix(".json"))
    name = "language_model.model.layers.0.mlp.up_proj"
    shapes = expected_shapes(manifest.config)
    fewer = replace(manifest, linears={n: s for n, s in manifest.linears.items() if n != name})
    before, after = stored_sizes(component_sizes(manifest, shapes)), stored_sizes(component_sizes(fewer, shapes))
    count = math.prod(shapes[f"{name}.weight"])
    grown = count * (16 - 4) // 8 - count // 128 * 2
    assert after == {**before, "language_model": before["language_model"] + grown}
