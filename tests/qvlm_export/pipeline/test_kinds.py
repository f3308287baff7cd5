"""The commands on two other kinds of checkpoints: with image tiles (LLaVA-OneVision), and in LLaVA's own layout (v1.3)."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from commands import ANY_ACCURACY, PICTURE, assert_refused, run_model
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
    """checkpoint(kind) returns the folder of a checkpoint of that kind, which is made once."""

    def make(kind: str) -> Path:
        folder = tmp_path_factory.mktemp(kind) / kind
        KINDS[kind](folder, kind)
        return folder

    return cache(make)


@pytest.fixture(scope="module")
def plan(checkpoint: Make) -> Make:
    """plan(kind) returns the plan path of its export without engines, which takes two questions at once."""

    def make(kind: str) -> Path:
        path = checkpoint(kind).parent / "e" / "x.plan"
        qvlm_export.export(checkpoint(kind), path, backend="onnx", samples=2, max_batch=2)
        return path

    return cache(make)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sets(tmp_path_factory.mktemp("sets"), 10)


@pytest.mark.parametrize("kind", KINDS)
def test_every_form_is_evaluated(checkpoint: Make, plan: Make, sets: Path, tmp_path: Path, kind: str) -> None:
    """Float, fake-quant and graph answer; the likelihoods of choices nearly agree between fake-quant and graph."""
    answers = {}
    for task, model_form in itertools.product(("vizwiz", "hateful-memes"), ("float", "fake-quant", "graph")):
        if (task, model_form) not in {("vizwiz", "fake-quant"), ("hateful-memes", "float")}:
            path = tmp_path / f"{task}-{model_form}.jsonl"
            content = eval_json(plan(kind), *of_task(sets, task), *FEW, "--model-form", model_form, "--predictions", path)
            assert (content["model_form"], content["answers"], content["failed"]) == (model_form, 3, {})
            answers[task, model_form] = read_predictions(path).answers
    fake_quant, graph = answers["hateful-memes", "fake-quant"], answers["hateful-memes", "graph"]
    for question, answer in fake_quant.items():
        # Values of the tower halfway between two INT8 codes may be rounded differently.
        assert answer.choices == pytest.approx(graph[question].choices, abs=0.1)
    path = tmp_path / "direct.jsonl"
    eval_json(checkpoint(kind), *of_task(sets, "vizwiz"), *FEW, "--batch", 1, "--predictions", path)
    assert read_predictions(path).answers == answers["vizwiz", "float"]


def test_padding_images_that_are_cut_into_tiles_is_refused(checkpoint: Make, plan: Make, sets: Path, tmp_path: Path) -> None:
    for model in (checkpoint("onevision"), plan("onevision"), plan("onevision").with_suffix(".calibrated")):
        result = run_eval(model, *of_task(sets, "vizwiz"), "--pad-square", "--predictions", tmp_path / "p.jsonl")
        assert_refused(result, "--pad-square: this model cuts pictures into tiles")
    assert list(tmp_path.iterdir()) == []


def test_an_original_checkpoint_uses_its_own_conversation_by_default(checkpoint: Make, sets: Path, tmp_path: Path) -> None:
    """llava_v1 is the one of v1.3; vicuna_v1 is another. The images are square, so that padding changes nothing."""
    answers = {}
    for name, arguments in (
        ("own", []),
        ("named", ["--conversation", "llava_v1", "--pad-square"]),
        ("other", ["--conversation", "vicuna_v1"]),
    ):
        path = tmp_path / f"{name}.jsonl"
        eval_json(checkpoint("v1.3"), *of_task(sets, "hateful-memes"), *FEW, *FORM, *arguments, "--predictions", path)
        answers[name] = read_predictions(path).answers
    assert answers["own"] == answers["named"] != answers["other"]


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_is_run_and_validated(plan: Make, kind: str) -> None:
    answered = run_model(plan(kind), "--image", PICTURE, "--prompt", "What is it?", "--max-new-tokens", 3, "--json")
    assert answered.exit_code == 0, answered.stderr
    assert json.loads(answered.stdout)["runtime"] == "onnxruntime"
    result = CliRunner().invoke(validate_app, [str(plan(kind)), "--limit", "2", "--per-layer", "--json", *ANY_ACCURACY])
    assert result.exit_code == 0, result.stderr
    content = json.loads(result.stdout)
    forms = {form["name"]: form for form in content["forms"]}
    assert [name for name, form in forms.items() if form["status"] == "run"] == ["fake-quant", "graph"]
    (against,) = [c for c in forms["graph"]["comparisons"] if c["against"] == "fake-quant"]
    assert 0 <= against["tokens"]["all"]["kl"] < 1e-2
    assert content["weights"]["wrong"] == []
    assert all(layer["graph_compared"] for layer in content["layers"])
