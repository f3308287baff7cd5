"""The command `qvlm-validate`: exit codes, the table, the JSON result, and one line of error for bad input."""

from __future__ import annotations

import contextlib
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
    """The path of an int4 export without engines."""
    path = tmp_path_factory.mktemp("export") / "int4" / "e.plan"
    qvlm_export.export(str(llava()), path, backend="onnx", samples=4, max_length=128)
    return path


@pytest.fixture(scope="module", autouse=True)
def in_folder_of_the_checkpoint(llava):
    """Manifests hold no paths, so a checkpoint is found by its name in the current folder."""
    with contextlib.chdir(llava().parent):
        yield


def run(plan, *arguments):
    """Runs the command, without its default thresholds: round-to-nearest of a random model meets none."""
    return CliRunner().invoke(app, [str(plan), "--min-agreement", "0", "--max-kl", "100", *map(str, arguments)])


def run_json(plan, *arguments, code=0):
    """The JSON result on two samples, of a run that ends with exit code `code`."""
    result = run(plan, "--json", "--limit", "2", *arguments)
    assert result.exit_code == code, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def content(plan):
    """The JSON result of an undamaged export, with scores of every block."""
    return run_json(plan, "--per-layer")


def worst_answer_scores(content):
    """The lowest agreement and the highest KL divergence of any form against float, on answer tokens."""
    scores = [
        comparison["tokens"]["answer"]
        for run in content["forms"]
        for comparison in run["comparisons"]
        if comparison["against"] == "float"
    ]
    return min(s["agreement"] for s in scores), max(s["kl"] for s in scores)


def assert_refused(result, *words):
    assert (result.exit_code, result.stdout) == (2, ""), (result.stderr, result.exception)
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stderr.startswith("error: ")
    for word in words:
        assert word in result.stderr


def test_json_holds_every_form_and_every_kind_of_token(content):
    assert [(run["name"], run["status"]) for run in content["forms"]] == [
        ("float", "reference"),
        ("fake-quant", "run"),
        ("graph", "run"),
        ("engine", "not run"),
    ]
    assert content["forms"][3]["reason"] == "this export has no engine"
    for run in content["forms"][1:3]:
        for comparison in run["comparisons"]:
            tokens = comparison["tokens"]
            assert list(tokens) == ["all", "image", "prompt", "answer"]
            assert tokens["all"]["count"] == sum(tokens[kind]["count"] for kind in ("image", "prompt", "answer"))
            assert tokens["image"]["count"] == 2 * 36
    assert content["weights"] == {"checked": 34, "wrong": []}
    assert content["loss"]["form"] == "fake-quant"
    assert len(content["layers"]) == 6
    assert (content["passed"], content["polygraphy"]) == (True, None)
    assert [(c["form"], c["metric"], c["against"]) for c in content["thresholds"]] == [
        ("float, block by block", "relative error", "float"),
        ("float", "largest activation", "float"),
        ("graph", "agreement", "fake-quant"),
        ("graph", "kl", "fake-quant"),
        *((form, metric, "float") for form in ("fake-quant", "graph") for metric in ("agreement", "kl")),
    ]


def test_thresholds_decide_the_exit_code(plan, content):
    agreement, kl = worst_answer_scores(content)
    assert 0 < agreement < 1
    met = run_json(plan, "--min-agreement", agreement - 1e-6, "--max-kl", kl * 1.001)
    assert met["passed"]
    assert [c["passed"] for c in met["thresholds"]] == [True] * 8
    for arguments in (["--min-agreement", agreement + 1e-6], ["--max-kl", kl * 0.999]):
        missed = run_json(plan, *arguments, code=1)
        assert not missed["passed"]
        failed = [c for c in missed["thresholds"] if not c["passed"]]
        assert {c["form"] for c in failed} <= {"fake-quant", "graph"}
        assert {c["against"] for c in failed} == {"float"}


def test_the_printed_result_fits_80_columns_and_names_the_loss(plan):
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
        "<= 0 on graph: NOT MET",
    ):
        assert words in text
    assert max(len(line) for line in text.splitlines() if "dB" in line or "answer" in line) <= 80
    assert "…" not in text


def test_a_damaged_graph_fails_even_without_thresholds(plan, tmp_path):
    damaged = copy_export(plan, tmp_path / "damaged")
    edit_weight(damaged.with_suffix(".onnx"), f"{DOWN}.weight_codes", np.uint8, zero)
    content = run_json(damaged, code=1)
    assert not content["passed"]
    assert (content["loss"]["form"], content["loss"]["layers"]) == ("graph", [DOWN])
    (wrong,) = content["weights"]["wrong"]
    assert wrong["linear"] == DOWN
    result = run(damaged, "--limit", "1")
    assert result.exit_code == 1
    assert "graph: 33 of 34 quantized linears" in result.stdout
    assert "accuracy is lost at: graph, " in result.stdout
    assert f"most in {DOWN}" in result.stdout


def test_printed_polygraphy_commands_run_as_they_are_printed(plan, tmp_path):
    folder = tmp_path / "poly graphy"
    result = run(plan, "--limit", "1", "--save-polygraphy", folder)
    assert result.exit_code == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith("polygraphy run ")]
    assert len(lines) == 2
    assert "polygraphy: logits, session against graph: SNR " in result.stdout
    process = run_shell(lines[1])
    assert process.returncode == 0, process.stdout + process.stderr
    assert sorted(path.name for path in (folder / "language").iterdir()) == [
        "inputs.json",
        "model.onnx",
        "model.onnx.data",
        "outputs.json",
    ]


def test_samples_of_the_user_and_a_manifest_in_place_of_the_plan_are_taken(plan, tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "Name the color.", "answer": "red"}\n')
    content = run_json(plan.with_suffix(".json"), "--samples", path)
    assert content["samples"] == 1
    tokens = content["forms"][1]["comparisons"][0]["tokens"]
    assert tokens["image"] == {
        "count": 0, "not_finite": 0, "kl": None, "agreement": None, "sqnr_db": None, "cosine": None,
    }  # fmt: skip
    assert tokens["answer"]["count"] > 1


def test_another_reference_of_the_same_shape_is_compared(plan, llava, content):
    other = llava(seed=1)
    result = run_json(plan, "--reference", other)
    assert result["reference"] == str(other)
    assert worst_answer_scores(result)[1] > 10 * worst_answer_scores(content)[1]


def test_bad_input_gives_one_line_and_exit_code_2(plan, llava, tmp_path):
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


def test_per_layer_refuses_a_read_only_export_before_any_model_runs(plan, monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)  # patched, as root may write anywhere
    assert_refused(run(plan, "--per-layer"), "--per-layer", "read-only")


def test_an_sqnr_without_noise_is_printed_as_equal(content, capsys):
    scores = {"count": 3, "not_finite": 0, "kl": 0.0, "agreement": 1.0, "sqnr_db": None, "cosine": 1.0}
    changed = json.loads(json.dumps(content))
    changed["forms"][1]["comparisons"][0]["tokens"] = {"all": scores}
    changed["forms"][2]["comparisons"] = []
    changed["loss"] = None
    show(changed, Console(markup=False, highlight=False, width=80), per_layer=False)
    text = capsys.readouterr().out
    assert "equal" in text
    assert "no form loses accuracy" in text


def test_the_command_is_installed():
    result = run_shell("qvlm-validate --help")
    assert isinstance(result, subprocess.CompletedProcess)
    assert result.returncode == 0, result.stderr
    for option in ("--reference", "--samples", "--min-agreement", "--max-kl", "--per-layer", "--save-polygraphy", "--json"):
        assert option in result.stdout
