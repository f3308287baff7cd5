"""The comparison with the real Polygraphy: comparator, saved files, printed command lines, and its tools on our graphs."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from damage import copy_export, edit_weight, zero
from polygraphy.comparator import RunResults
from polygraphy.json import load_json
from shell import run_shell

import qvlm_export
from qvlm_export.calibrate.checkpoint.prefix import count_shared
from qvlm_export.calibrate.errors import UserError
from qvlm_export.engines.check.metrics import measure
from qvlm_export.engines.check.polygraphy import (
    RTX_SWITCH,
    RunnerPair,
    engine_runners,
    float32_runners,
    quiet,
    save_case,
    session_runners,
    write_float32_graph,
)
from qvlm_export.engines.manifest import open_prefix, read_manifest
from qvlm_export.engines.runtime.open import open_session
from qvlm_export.validation.validate import read_inputs

DOWN = "language_model.model.layers.1.mlp.down_proj"
SCHEMES = ("int4", "int8")


@pytest.fixture(scope="module")
def manifests(llava, tmp_path_factory):
    """Scheme -> manifest of an export without engines."""
    manifest_of = {}
    for scheme in SCHEMES:
        plan = tmp_path_factory.mktemp(scheme) / "export" / "e.plan"
        qvlm_export.export(str(llava()), plan, scheme=scheme, backend="onnx", samples=4, max_length=128)
        manifest_of[scheme] = read_manifest(plan.with_suffix(".json"))
    return manifest_of


@pytest.fixture(scope="module")
def sample(manifests):
    return read_inputs(manifests["int4"], None, 1)[0].sample


@pytest.fixture(scope="module")
def saved(manifests, sample, tmp_path_factory):
    """Scheme -> comparison saved as with --save-polygraphy, in a folder whose name needs quoting."""
    return {
        scheme: save_case(
            manifest, sample, tmp_path_factory.mktemp(scheme) / "it's a folder", [session_runners(manifest)], False
        )
        for scheme, manifest in manifests.items()
    }


@pytest.mark.parametrize("scheme", SCHEMES)
def test_session_and_graph_pass_the_comparator(saved, scheme):
    verdicts = saved[scheme].verdicts
    assert [(v.part, v.output) for v in verdicts] == [("vision", "image_embeds"), ("language", "logits")]
    for verdict in verdicts:
        assert verdict.runners == ("graph", "session")
        assert verdict.passed
        assert verdict.snr_db > 25


def test_a_damaged_graph_fails_the_comparator(manifests, sample, tmp_path):
    plan = copy_export(manifests["int8"].path.with_suffix(".plan"), tmp_path / "damaged")
    edit_weight(plan.with_suffix(".onnx"), f"{DOWN}.weight_codes", np.uint8, zero)
    damaged = session_runners(read_manifest(plan.with_suffix(".json")))
    verdicts = save_case(manifests["int8"], sample, tmp_path / "case", [damaged], False).verdicts
    assert [v.passed for v in verdicts] == [True, False]
    assert verdicts[1].snr_db < 20


def test_polygraphy_loads_the_saved_files_and_they_hold_inputs_and_outputs(saved, manifests, sample):
    folder, manifest = saved["int4"].folder, manifests["int4"]
    (vision,) = load_json(str(folder / "vision" / "inputs.json"))
    np.testing.assert_array_equal(vision["pixel_values"], sample.pixel_values)
    (language,) = load_json(str(folder / "language" / "inputs.json"))
    types = {entry["name"]: entry["type"] for entry in manifest.interface["language"]["inputs"]}
    assert {name: array.dtype.name for name, array in language.items()} == types
    prefix = open_prefix(manifest)
    np.testing.assert_array_equal(language["input_ids"], sample.input_ids[None, len(prefix) :])
    np.testing.assert_array_equal(language["past_key_values.0.key"][0, :, : len(prefix)], prefix.keys[0].astype(np.float16))
    assert language["position_ids"][0].tolist() == list(range(len(prefix), len(sample.input_ids)))
    assert language["write_index"].tolist() == [len(prefix)]
    golden = {
        name: RunResults.load(str(folder / part / "outputs.json"))[0][1][0][name]
        for part, name in (("vision", "image_embeds"), ("language", "logits"))
    }
    np.testing.assert_array_equal(language["image_embeds"], golden["image_embeds"].astype(np.float16))
    with open_session(manifest, "onnxruntime:cpu", threads=1) as session:
        assert measure(session.runner.embed_images(sample.pixel_values), golden["image_embeds"]).sqnr_db > 25
        logits = session.logits(sample.input_ids[None], sample.pixel_values)
        assert measure(logits[0, len(prefix) :], golden["logits"][0]).sqnr_db > 25


@pytest.mark.parametrize(("scheme", "line"), [("int4", 0), ("int4", 1), ("int8", 1)])
def test_the_command_line_passes(saved, scheme, line):
    assert len(saved[scheme].commands) == 2
    result = run_shell(saved[scheme].commands[line])
    assert result.returncode == 0, result.stdout + result.stderr
    assert "PASSED | simple | All outputs matched" in result.stdout


def test_the_command_line_fails_on_a_damaged_graph(manifests, sample, tmp_path):
    case = save_case(manifests["int4"], sample, tmp_path / "case", [], False)
    edit_weight(tmp_path / "case" / "language" / "model.onnx", f"{DOWN}.weight_codes", np.uint8, zero)
    result = run_shell(case.commands[1])
    assert result.returncode == 1, result.stdout + result.stderr
    assert "Mismatched outputs: ['logits']" in result.stdout


@pytest.mark.parametrize(("backend", "switch"), [("tensorrt-rtx", f"{RTX_SWITCH}=1"), ("tensorrt", None)])
def test_command_lines_for_the_engine_name_plan_files_and_runtime(manifests, sample, tmp_path, backend, switch):
    plans = {f"{part}_plan": {"name": f"e {part}.plan"} for part in ("vision", "language")}
    manifest = manifests["int4"]
    for entry in plans.values():
        (manifest.path.parent / entry["name"]).touch()
    manifest = replace(manifest, backend={"name": backend}, files={**manifest.files, **plans})
    commands = save_case(manifest, sample, tmp_path / "a case", [], True).commands
    assert len(commands) == 4
    for part, command in (("vision", commands[1]), ("language", commands[3])):
        words = shlex.split(command)
        assert (words.pop(0) if switch else None) == switch
        assert words[:6] == ["polygraphy", "run", str(manifest.file(f"{part}_plan")), "--model-type", "engine", "--trt"]
        for option, kind in (("--load-inputs", "inputs"), ("--load-outputs", "outputs")):
            assert Path(words[words.index(option) + 1]) == tmp_path / "a case" / part / f"{kind}.json"
        assert words[-4:] == ["--compare", "snr", "--snr-threshold", "20"]


def test_the_command_line_for_the_engine_reaches_tensorrt_rtx(manifests, sample, tmp_path):
    """Without a driver the engine cannot run, but Polygraphy must understand the command line."""
    pytest.importorskip("tensorrt_rtx")
    plans = {f"{part}_plan": {"name": f"{part}.plan"} for part in ("vision", "language")}
    manifest = manifests["int4"]
    for entry in plans.values():
        (manifest.path.parent / entry["name"]).write_bytes(b"no plan")
    manifest = replace(manifest, backend={"name": "tensorrt-rtx"}, files={**manifest.files, **plans})
    result = run_shell(save_case(manifest, sample, tmp_path / "case", [], True).commands[3])
    assert result.returncode == 1
    assert "unrecognized arguments" not in result.stderr
    assert "Could not deserialize engine" in result.stdout + result.stderr


def test_a_pair_of_runners_computes_what_the_session_does(manifests, sample):
    manifest = manifests["int4"]
    text_only = replace(sample, input_ids=sample.input_ids[-5:], pixel_values=sample.pixel_values[:0], answer_start=5)
    with RunnerPair(manifest, session_runners(manifest)) as pair, open_session(manifest, "onnxruntime:cpu") as session:
        for case in (sample, text_only, sample):
            pixels = case.pixel_values if len(case.pixel_values) else None
            expected = session.logits(case.input_ids[None], pixels)[0]
            actual, behind = pair.logits(case), count_shared(open_prefix(manifest).token_ids, case.input_ids)
            expected = expected[behind:]
            assert (actual.dtype, actual.shape) == (np.float32, expected.shape)
            assert bool(behind) == (case is sample)
            np.testing.assert_allclose(actual, expected, atol=5e-3 * np.abs(expected).max())


def test_the_written_float32_copy_has_one_output_and_the_same_integers(saved, manifests):
    model = ir.load(saved["int4"].folder / "language" / "model.onnx")
    exported = ir.load(manifests["int4"].file("language_onnx"))
    assert [v.name for v in model.graph.outputs] == ["logits"]
    assert [v.name for v in model.graph.inputs] == [v.name for v in exported.graph.inputs]
    assert ir.DataType.FLOAT16 not in {v.dtype for v in (*model.graph.inputs, *model.graph.initializers.values())}
    for name, value in exported.graph.initializers.items():
        if name.endswith("weight_codes"):
            np.testing.assert_array_equal(model.graph.initializers[name].const_value.numpy(), value.const_value.numpy())


def test_polygraphy_prints_nothing(manifests, sample, tmp_path, capfd):
    save_case(manifests["int4"], sample, tmp_path, [session_runners(manifests["int4"])], False)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_an_error_of_polygraphy_is_one_line():
    from polygraphy.logger import G_LOGGER

    with pytest.raises(UserError, match=r"^Polygraphy: no such thing; its own") as caught, quiet():
        G_LOGGER.critical("no such\nthing")
    assert "\n" not in str(caught.value)


def test_a_process_cannot_use_both_tensorrts(manifests, monkeypatch):
    from polygraphy import config

    monkeypatch.setenv(RTX_SWITCH, "0")
    monkeypatch.setattr(config, "USE_TENSORRT_RTX", False)
    with pytest.raises(UserError, match="another TensorRT"):
        engine_runners(replace(manifests["int4"], backend={"name": "tensorrt-rtx"}))


def test_float32_copies_open_from_the_folder_they_were_written_to(manifests, tmp_path):
    (tmp_path / "vision").mkdir()
    write_float32_graph(manifests["int4"].file("vision_onnx"), tmp_path / "vision" / "model.onnx", "image_embeds")
    with quiet(), float32_runners(tmp_path)["vision"] as runner:
        assert list(runner.get_input_metadata()) == ["pixel_values"]


@pytest.mark.parametrize(("scheme", "part"), [("int4", "vision"), ("int4", "language"), ("int8", "language")])
class TestTools:
    """Polygraphy's tools read the exported float16 graphs; the vision graph is the same in both schemes."""

    def test_inspect_model(self, manifests, scheme, part):
        graph = manifests[scheme].file(f"{part}_onnx")
        result = run_shell(f"polygraphy inspect model {graph} --show layers attrs")
        assert result.returncode == 0, result.stdout + result.stderr
        exported = ir.load(graph)
        assert f"---- {len(list(exported.graph))} Node(s) ----" in result.stdout
        for node in exported.graph:
            if node.op_type == "QuantizeLinear":
                assert node.name in result.stdout

    def test_check_lint(self, manifests, scheme, part, tmp_path):
        pytest.importorskip("onnx_graphsurgeon")
        graph = manifests[scheme].file(f"{part}_onnx")
        result = run_shell(f"polygraphy check lint {graph} -o {tmp_path / 'lint.json'}")
        assert result.returncode == 0, result.stdout + result.stderr
        report = json.loads((tmp_path / "lint.json").read_text())
        assert report["summary"]["failing"] == []
        assert len(report["summary"]["passing"]) == len(list(ir.load(graph).graph))
        assert [e for e in report["lint_entries"] if e["level"] != "warning" or "TensorScatter" not in e["message"]] == []

    def test_surgeon_sanitize(self, manifests, scheme, part, tmp_path):
        pytest.importorskip("onnx_graphsurgeon")
        graph, out = manifests[scheme].file(f"{part}_onnx"), tmp_path / "sane.onnx"
        result = run_shell(f"polygraphy surgeon sanitize {graph} --fold-constants --save-external-data -o {out}")
        assert result.returncode == 0, result.stdout + result.stderr
        operators = ("QuantizeLinear", "DequantizeLinear", "MatMul", "Attention", "TensorScatter")
        counts = [{op: sum(node.op_type == op for node in ir.load(path).graph) for op in operators} for path in (graph, out)]
        assert counts[0] == counts[1]  # constant folding must not fold the dequantization
