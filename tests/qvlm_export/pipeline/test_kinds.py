"""The commands on checkpoints of other kinds: in tiles (LLaVA-OneVision), and in the layout of LLaVA's authors (v1.3)."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from commands import PICTURE, assert_refused, run_model
from eval_sets import FORM, eval_json, make_sets, of_task, run_eval
from typer.testing import CliRunner

import qvlm_export
from qvlm_export.cli.validate import app as validate_app
from qvlm_export.evaluation.predictions import read_predictions
from tools.families.random_families import write_family
from tools.families.random_original import write_original

KINDS = {"onevision": write_family, "v1.3": write_original}
FEW = ("--limit", 3, "--max-new-tokens", 3, "--device", "cpu")
Make = Callable[[str], Path]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """checkpoint(kind) -> its folder, made once."""

    def make(kind: str) -> Path:
        folder = tmp_path_factory.mktemp(kind) / kind
        KINDS[kind](folder, kind)
        return folder

    return cache(make)


@pytest.fixture(scope="module")
def plan(checkpoint: Make) -> Make:
    """plan(kind) -> an export of it without engines, which takes two questions at once."""

    def make(kind: str) -> Path:
        path = checkpoint(kind).parent / "e" / "x.plan"
        qvlm_export.export(checkpoint(kind), path, backend="onnx", samples=2, max_batch=2)
        return path

    return cache(make)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sets(tmp_path_factory.mktemp("sets"), 10)


@pytest.mark.parametrize("kind", KINDS)
def test_every_rung_is_asked(checkpoint: Make, plan: Make, sets: Path, tmp_path: Path, kind: str) -> None:
    """Answers of the torch rungs and of the graph; by likelihood too, where simulation and graph nearly agree."""
    kept = {}
    for task, rung in itertools.product(("vizwiz", "hateful-memes"), ("torch", "simulated", "graph")):
        if (task, rung) not in {("vizwiz", "simulated"), ("hateful-memes", "torch")}:
            path = tmp_path / f"{task}-{rung}.jsonl"
            found = eval_json(plan(kind), *of_task(sets, task), *FEW, "--rung", rung, "--predictions", path)
            assert (found["rung"], found["answers"], found["failed"]) == (rung, 3, {})
            kept[task, rung] = read_predictions(path).answers
    simulated, graph = kept["hateful-memes", "simulated"], kept["hateful-memes", "graph"]
    for one, answer in simulated.items():
        assert answer.choices == pytest.approx(graph[one].choices, abs=0.1)  # INT8 ties of the tower
    path = tmp_path / "direct.jsonl"
    eval_json(checkpoint(kind), *of_task(sets, "vizwiz"), *FEW, "--batch", 1, "--predictions", path)
    assert read_predictions(path).answers == kept["vizwiz", "torch"]


def test_pictures_in_tiles_are_not_padded(checkpoint: Make, plan: Make, sets: Path, tmp_path: Path) -> None:
    for subject in (checkpoint("onevision"), plan("onevision"), plan("onevision").with_suffix(".calibrated")):
        result = run_eval(subject, *of_task(sets, "vizwiz"), "--pad-square", "--predictions", tmp_path / "p.jsonl")
        assert_refused(result, "--pad-square: this model cuts pictures into tiles")
    assert list(tmp_path.iterdir()) == []


def test_an_original_checkpoint_in_its_own_conversation_or_another(checkpoint: Make, sets: Path, tmp_path: Path) -> None:
    """llava_v1 is v1.3's own; vicuna_v1 asks otherwise. Pictures are square here, so that padding changes nothing."""
    found = {}
    for name, arguments in (
        ("own", []),
        ("named", ["--conversation", "llava_v1", "--pad-square"]),
        ("other", ["--conversation", "vicuna_v1"]),
    ):
        path = tmp_path / f"{name}.jsonl"
        eval_json(checkpoint("v1.3"), *of_task(sets, "hateful-memes"), *FEW, *FORM, *arguments, "--predictions", path)
        found[name] = read_predictions(path).answers
    assert found["own"] == found["named"] != found["other"]


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_is_run_and_validated(plan: Make, kind: str) -> None:
    asked = run_model(plan(kind), "--image", PICTURE, "--prompt", "What is it?", "--max-new-tokens", 3, "--json")
    assert asked.exit_code == 0, asked.stderr
    assert json.loads(asked.stdout)["runtime"] == "onnxruntime"
    result = CliRunner().invoke(validate_app, [str(plan(kind)), "--limit", "2", "--per-layer", "--json"])
    assert result.exit_code == 0, result.stderr
    content = json.loads(result.stdout)
    rungs = {rung["name"]: rung for rung in content["rungs"]}
    assert [name for name, rung in rungs.items() if rung["status"] == "run"] == ["fake-quant", "onnx graph"]
    (against,) = [c for c in rungs["onnx graph"]["comparisons"] if c["against"] == "fake-quant"]
    assert 0 <= against["tokens"]["all"]["kl"] < 1e-2
    assert content["weights"]["wrong"] == []
    assert all(layer["graph_compared"] for layer in content["layers"])
