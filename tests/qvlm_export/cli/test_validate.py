"""`qvlm-validate` as its users see it: exit codes, the table, JSON, and one line for each mistake."""

from __future__ import annotations

import json
import subprocess

import numpy as np
import pytest
from damage import copy_export, edit_weight, zero
from rich.console import Console
from shell import run_shell
from typer.testing import CliRunner

import qvlm_export
from qvlm_export.cli.validate import app, show
from qvlm_export.engines.manifest import seal

DOWN = "language_model.model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def plan(llava, tmp_path_factory):
    """An export without engines."""
    path = tmp_path_factory.mktemp("export") / "int4" / "e.plan"
    qvlm_export.export(str(llava()), path, backend="onnx", samples=4, max_length=128)
    return path


def run(plan, *arguments):
    return CliRunner().invoke(app, [str(plan), *map(str, arguments)])


def run_json(plan, *arguments, code=0):
    result = run(plan, "--json", "--limit", "2", *arguments)
    assert result.exit_code == code, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def content(plan):
    """The JSON of an undamaged export, with layers."""
    return run_json(plan, "--per-layer")


def answers(content):
    """(agreement, kl) of every rung against float on answer tokens, the worst of each."""
    scores = [
        comparison["tokens"]["answer"]
        for rung in content["rungs"]
        for comparison in rung["comparisons"]
        if comparison["against"] == "float"
    ]
    return min(s["agreement"] for s in scores), max(s["kl"] for s in scores)


def assert_refused(result, *words):
    assert (result.exit_code, result.stdout) == (2, ""), (result.stderr, result.exception)
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stderr.startswith("error: ")
    for word in words:
        assert word in result.stderr


def test_json_holds_every_rung_and_group(content):
    assert [(rung["name"], rung["status"]) for rung in content["rungs"]] == [
        ("float", "reference"),
        ("fake-quant", "run"),
        ("onnx graph", "run"),
        ("engine", "not run"),
    ]
    assert content["rungs"][3]["reason"] == "this export has no engine"
    for rung in content["rungs"][1:3]:
        for comparison in rung["comparisons"]:
            tokens = comparison["tokens"]
            assert list(tokens) == ["all", "image", "prompt", "answer"]
            assert tokens["all"]["count"] == sum(tokens[group]["count"] for group in ("image", "prompt", "answer"))
            assert tokens["image"]["count"] == 2 * 36
    assert content["weights"] == {"checked": 34, "wrong": []}
    assert content["loss"]["rung"] == "fake-quant"
    assert len(content["layers"]) == 6
    assert (content["passed"], content["thresholds"], content["polygraphy"]) == (True, [], None)


def test_thresholds_decide_the_exit_code(plan, content):
    agreement, kl = answers(content)
    assert 0 < agreement < 1
    held = run_json(plan, "--min-agreement", agreement - 1e-6, "--max-kl", kl * 1.001)
    assert held["passed"]
    assert [c["passed"] for c in held["thresholds"]] == [True] * 4
    for arguments in (["--min-agreement", agreement + 1e-6], ["--max-kl", kl * 0.999]):
        missed = run_json(plan, *arguments, code=1)
        assert not missed["passed"]
        assert not all(c["passed"] for c in missed["thresholds"])
        assert {c["rung"] for c in missed["thresholds"]} == {"fake-quant", "onnx graph"}


def test_the_table_is_for_people(plan):
    result = run(plan, "--limit", "1", "--per-layer", "--max-kl", "0")
    assert result.exit_code == 1
    text = result.stdout
    for words in (
        "e.plan, int4, against ",
        "SQNR dB",
        "engine      not run",
        "not run: engine: this export has no engine",
        "language_model.model.layers.1 ",
        "graph: 34 of 34 quantized linears hold the calibrated integers and scales",
        "accuracy is lost at: fake-quant, ",
        "<= 0 on onnx graph: NOT MET",
    ):
        assert words in text
    assert max(len(line) for line in text.splitlines() if "dB" in line or "answer" in line) <= 80
    assert "…" not in text


def test_a_damaged_graph_fails_without_any_threshold(plan, tmp_path):
    damaged = copy_export(plan, tmp_path / "damaged")
    edit_weight(damaged.with_suffix(".onnx"), f"{DOWN}.weight_codes", np.uint8, zero)
    found = run_json(damaged, code=1)
    assert not found["passed"]
    assert (found["loss"]["rung"], found["loss"]["layers"]) == ("onnx graph", [DOWN])
    (wrong,) = found["weights"]["wrong"]
    assert wrong["linear"] == DOWN
    result = run(damaged, "--limit", "1")
    assert result.exit_code == 1
    assert "graph: 33 of 34 quantized linears" in result.stdout
    assert "accuracy is lost at: onnx graph, " in result.stdout
    assert f"most in {DOWN}" in result.stdout


def test_saved_polygraphy_lines_stand_in_the_output_ready_to_paste(plan, tmp_path):
    folder = tmp_path / "poly graphy"
    result = run(plan, "--limit", "1", "--save-polygraphy", folder)
    assert result.exit_code == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith("polygraphy run ")]
    assert len(lines) == 2
    assert "polygraphy: logits, session against graph: SNR " in result.stdout
    pasted = run_shell(lines[1])
    assert pasted.returncode == 0, pasted.stdout + pasted.stderr
    assert sorted(path.name for path in (folder / "language").iterdir()) == [
        "inputs.json",
        "model.onnx",
        "model.onnx.data",
        "outputs.json",
    ]


def test_its_own_samples_and_the_manifest_instead_of_the_plan(plan, tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "Name the color.", "answer": "red"}\n')
    found = run_json(plan.with_suffix(".json"), "--samples", path)
    assert found["samples"] == 1
    tokens = found["rungs"][1]["comparisons"][0]["tokens"]
    assert tokens["image"] == {
        "count": 0, "not_finite": 0, "kl": None, "agreement": None, "sqnr_db": None, "cosine": None,
    }  # fmt: skip
    assert tokens["answer"]["count"] > 1


def test_another_reference_of_the_same_shape_is_compared(plan, llava, content):
    other = llava(seed=1)
    found = run_json(plan, "--reference", other)
    assert found["reference"] == str(other)
    assert answers(found)[1] > 10 * answers(content)[1]


def test_bad_input_is_one_line_and_exit_code_2(plan, llava, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "broken.jsonl").write_text("{")
    copy = copy_export(plan, tmp_path / "copy")
    manifest = json.loads(copy.with_suffix(".json").read_text())
    manifest["model"]["name"] = "./gone"
    copy.with_suffix(".json").write_text(json.dumps(seal(manifest)))
    for arguments, words in (
        ([tmp_path / "none.plan"], ["none.json", "no such manifest"]),
        ([plan.with_suffix(".onnx")], ["give the .plan"]),
        ([plan, "--samples", tmp_path / "none.jsonl"], ["--samples", "none.jsonl"]),
        ([plan, "--samples", tmp_path / "broken.jsonl"], ["broken.jsonl:1", "not JSON"]),
        ([plan, "--reference", tmp_path / "none"], ["--reference", "no such folder"]),
        ([plan, "--reference", llava(kv_heads=4)], ["text.num_kv_heads is 4, the export has 2"]),
        ([plan, "--save-polygraphy", tmp_path / "file"], ["--save-polygraphy", "is a file"]),
        ([plan, "--min-agreement", "1.5"], ["--min-agreement"]),
        ([plan, "--max-kl", "-1"], ["--max-kl"]),
        ([plan, "--limit", "0"], ["--limit"]),
        ([copy], ["./gone", "--reference says where it is now"]),
    ):
        assert_refused(run(*arguments), *words)


def test_a_read_only_export_is_refused_for_layers_before_any_work(plan, monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write anywhere
    assert_refused(run(plan, "--per-layer"), "--per-layer", "read-only")


def test_no_noise_at_all_reads_equal_and_no_token_reads_dash(content, capsys):
    scores = {"count": 3, "not_finite": 0, "kl": 0.0, "agreement": 1.0, "sqnr_db": None, "cosine": 1.0}
    changed = json.loads(json.dumps(content))
    changed["rungs"][1]["comparisons"][0]["tokens"] = {"all": scores}
    changed["rungs"][2]["comparisons"] = []
    changed["loss"] = None
    show(changed, Console(markup=False, highlight=False, width=80), per_layer=False)
    text = capsys.readouterr().out
    assert "equal" in text
    assert "no rung loses accuracy" in text


def test_the_command_is_installed():
    result = run_shell("qvlm-validate --help")
    assert isinstance(result, subprocess.CompletedProcess)
    assert result.returncode == 0, result.stderr
    for option in ("--reference", "--samples", "--min-agreement", "--max-kl", "--per-layer", "--save-polygraphy", "--json"):
        assert option in result.stdout
