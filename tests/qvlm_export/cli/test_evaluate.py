"""The command `qvlm-eval`: every task and form of a model, interrupted runs, shards, torchrun, submissions, bad input."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from commands import assert_refused
from eval_sets import FORM, eval_json, make_sets, of_task, run_eval
from paths import ROOT
from typer.testing import CliRunner

import qvlm_export
from qvlm_export.cli.evaluate import app
from qvlm_export.engines.runtime.onnx_runner import OnnxRunner
from qvlm_export.evaluation import distributed
from qvlm_export.evaluation.predictions import lock_predictions, read_predictions
from qvlm_export.inference.torch_runner import TorchRunner

COUNT = 60
TASKS = ("scienceqa", "vqav2", "vizwiz", "hateful-memes")


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """The folder of small evaluation sets in the official layouts, with 60 questions each."""
    return make_sets(tmp_path_factory.mktemp("sets"), COUNT)


@pytest.fixture(scope="module")
def uninterrupted(sets, tmp_path_factory):
    """The results of the tiny model on all questions, one run per task, which other runs must equal; by task."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    return {
        task: eval_json("tiny", *of_task(sets, task), *FORM, "--device", "cpu", "--predictions", folder / f"{task}.jsonl")
        for task in TASKS
    }


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """The path of the tiny model's int8 export without engines, which takes a batch of four."""
    path = tmp_path_factory.mktemp("export") / "e" / "tiny.plan"
    qvlm_export.export("tiny", path, scheme="int8", backend="onnx", samples=8, max_batch=4)
    return path


def repeatable(content):
    """The part of a result that another run of the same evaluation must repeat."""
    return {
        key: content[key]
        for key in ("task", "split", "model_form", "questions", "answers", "metrics", "counts", "unparsed", "failed")
    }


def answers(path):
    """The answers in a file of predictions, by question id."""
    return read_predictions(Path(path)).answers


@pytest.mark.parametrize("task", TASKS)
def test_every_task_answers_all_its_questions(uninterrupted, task):
    content = uninterrupted[task]
    assert (content["task"], content["model_form"], content["runtime"]) == (task, "float", "cpu")
    assert (content["questions"], content["answers"], content["failed"], content["unparsed"]) == (COUNT, COUNT, {}, 0)
    assert len(answers(content["predictions"])) == COUNT


def test_the_tiny_model_scores_above_90_percent_on_scienceqa(uninterrupted):
    content = uninterrupted["scienceqa"]
    assert content["metrics"]["Avg"] > 0.9
    assert content["counts"]["IMG"] == COUNT - 1
    assert content["counts"]["NO"] == 1
    assert content["counts"]["G1-6"] + content["counts"]["G7-12"] == COUNT


def test_the_tiny_model_answers_vqa_and_guesses_on_hateful_memes(uninterrupted):
    assert uninterrupted["vqav2"]["metrics"]["overall"] > 0.9
    assert uninterrupted["vizwiz"]["metrics"]["other"] > 0.9
    assert uninterrupted["vizwiz"]["metrics"]["unanswerable"] == 0.0  # it was not trained on blurred images
    assert 0.3 < uninterrupted["hateful-memes"]["metrics"]["ROC-AUC"] < 0.7


def test_the_printed_table_names_columns_counts_and_the_predictions(sets, tmp_path):
    result = run_eval("tiny", *of_task(sets, "scienceqa"), *FORM, "--limit", 4, "--predictions", tmp_path / "p.jsonl")
    assert result.exit_code == 0, result.stderr
    assert "scienceqa test, float: 4 of 4 questions" in result.stdout
    for words in ("NAT", "G7-12", "Avg", "unparsed answers, counted as wrong: 0", "p.jsonl"):
        assert words in result.stdout


def test_a_killed_run_is_continued(sets, uninterrupted, tmp_path):
    """The file is cut in the middle of a line, as a kill leaves it; only missing questions are asked."""
    path = tmp_path / "p.jsonl"
    full = Path(uninterrupted["vqav2"]["predictions"]).read_bytes()
    path.write_bytes(full[: len(full) // 2])
    complete_lines = path.read_bytes()[: path.read_bytes().rfind(b"\n") + 1]
    continued = eval_json("tiny", *of_task(sets, "vqav2"), *FORM, "--device", "cpu", "--predictions", path)
    assert repeatable(continued) == repeatable(uninterrupted["vqav2"])
    assert path.read_bytes().startswith(complete_lines)
    before = path.stat().st_mtime_ns
    result = run_eval("tiny", *of_task(sets, "vqav2"), *FORM, "--device", "cpu", "--predictions", path)
    assert "60 of 60 answers are there already" in " ".join(result.stderr.split())
    assert path.stat().st_mtime_ns == before


def test_an_interrupted_run_says_that_it_can_be_continued(sets, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("qvlm_export.evaluation.evaluate.ask_all", interrupt)
    result = run_eval("tiny", *of_task(sets, "vqav2"), "--predictions", tmp_path / "p.jsonl")
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == "interrupted; the same command continues where it stopped"


def test_predictions_of_another_run_are_refused(sets, uninterrupted):
    path = uninterrupted["scienceqa"]["predictions"]
    before = Path(path).read_bytes()
    common = ("tiny", *of_task(sets, "scienceqa"), "--device", "cpu", "--predictions", path)
    for arguments, words in (
        ([], ["form was v1.3, now it is v1.5"]),
        ([*FORM, "--limit", 3], ["limit was None, now it is 3"]),
        ([*FORM, "--shard", "1/2"], ["shard was 1/1, now it is 1/2"]),
        ([*FORM, "--conversation", "vicuna_v1"], ["conversation was own"]),
        ([*FORM, "--max-new-tokens", 5], ["max_new_tokens was 1024, now it is 5"]),
    ):
        assert_refused(run_eval(*common, *arguments), "answers of another run", *words)
    assert Path(path).read_bytes() == before


def test_merged_shards_equal_a_single_run(sets, uninterrupted, tmp_path):
    common = (*of_task(sets, "vizwiz"), *FORM)
    parts = []
    for part in (1, 2, 3):
        path = tmp_path / f"{part}.jsonl"
        content = eval_json("tiny", *common, "--device", "cpu", "--shard", f"{part}/3", "--predictions", path)
        assert (content["shard"], content["answers"]) == ([part, 3], COUNT // 3)
        parts += ["--merge", path]
    merged = eval_json(*common, *parts, "--predictions", tmp_path / "all.jsonl")
    assert repeatable(merged) == repeatable(uninterrupted["vizwiz"])
    assert answers(tmp_path / "all.jsonl") == answers(uninterrupted["vizwiz"]["predictions"])
    assert_refused(run_eval(*common, *parts[:4]), "shard 3/3 is missing")
    assert_refused(run_eval(*of_task(sets, "vizwiz"), *parts), "made with form v1.3, not v1.5")
    assert_refused(run_eval(*of_task(sets, "vqav2"), *FORM, *parts), "lack an answer")
    limited = run_eval(*common, *parts, "--limit", 5)
    assert_refused(limited, "made with limit None, not 5")


def test_two_processes_of_torchrun_share_the_questions(sets, uninterrupted, tmp_path, monkeypatch):
    """This process is the first of the two, in the environment that torchrun sets, which saves two imports of torch."""
    path = tmp_path / "p.jsonl"
    arguments = ["tiny", *map(str, of_task(sets, "vqav2")), *FORM, "--device", "cpu", "--predictions", str(path)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "GATHER_TIMEOUT", timedelta(minutes=3))
    second = subprocess.Popen(
        [sys.executable, "-m", "qvlm_export.cli.evaluate", *arguments, "--json"], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "RANK": "1", "LOCAL_RANK": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    content = eval_json(*arguments)
    assert (second.communicate(timeout=60)[0], second.returncode) == ("", 0)  # only the first process prints
    assert repeatable(content) == repeatable(uninterrupted["vqav2"])
    assert answers(path) == answers(uninterrupted["vqav2"]["predictions"])
    halves = [answers(tmp_path / f"p.{part}-of-2.jsonl") for part in (1, 2)]
    assert [len(half) for half in halves] == [COUNT // 2] * 2
    assert halves[0] | halves[1] == answers(path)


@pytest.mark.parametrize(
    ("visible", "rank", "expected"),
    [(None, "1", "1"), (None, "5", "1"), ("4,6,7,2", "2", "7"), ("GPU-a,GPU-b", "0", "GPU-a")],
)
def test_each_process_has_a_gpu_of_its_own(monkeypatch, visible, rank, expected):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4 if visible is None else visible.count(",") + 1)
    distributed.use_own_gpu()
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == visible  # a single process leaves it unchanged
    for name, value in {"WORLD_SIZE": "8", "RANK": rank, "LOCAL_RANK": rank}.items():
        monkeypatch.setenv(name, value)
    distributed.use_own_gpu()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == expected


def test_an_export_is_evaluated_in_every_form_but_the_engine(sets, plan, tmp_path):
    """Without a GPU the default form of an export is the graph. Fake-quant gives the same answers but for rounding ties."""
    common = (plan, *of_task(sets, "scienceqa"), *FORM, "--limit", 12)
    graph = eval_json(*common, "--predictions", tmp_path / "graph.jsonl")
    fake_quant = eval_json(
        *common, "--model-form", "fake-quant", "--device", "cpu", "--predictions", tmp_path / "fake_quant.jsonl"
    )
    assert (graph["model_form"], fake_quant["model_form"]) == ("graph", "fake-quant")
    assert graph["metrics"]["Avg"] > 0.85
    by_graph, by_fake_quant = answers(tmp_path / "graph.jsonl"), answers(tmp_path / "fake_quant.jsonl")
    assert sum(by_graph[q] == by_fake_quant[q] for q in by_graph) >= 11
    reference = eval_json(*common, "--model-form", "float", "--device", "cpu", "--predictions", tmp_path / "float.jsonl")
    assert reference["model_form"] == "float"
    calibrated = plan.with_suffix(".calibrated")
    standalone = eval_json(calibrated, *common[1:], "--device", "cpu", "--predictions", tmp_path / "standalone.jsonl")
    assert standalone["model_form"] == "fake-quant"
    unbatched = eval_json(*common[:-1], 3, "--batch", 1, "--predictions", tmp_path / "unbatched.jsonl")
    by_unbatched = answers(tmp_path / "unbatched.jsonl")
    assert unbatched["answers"] == 3
    assert all(by_unbatched[q] == by_graph[q] for q in by_unbatched)


def test_a_larger_batch_in_torch_gives_the_same_answers(sets, uninterrupted, tmp_path):
    path = tmp_path / "p.jsonl"
    eval_json("tiny", *of_task(sets, "vqav2"), *FORM, "--device", "cpu", "--batch", 20, "--predictions", path)
    assert answers(path) == answers(uninterrupted["vqav2"]["predictions"])


def test_forms_and_models_that_do_not_exist_are_refused(sets, plan, tmp_path):
    common = (*of_task(sets, "scienceqa"), "--predictions", tmp_path / "p.jsonl")
    for model, arguments, words in (
        (plan, ["--model-form", "engine"], ["--model-form engine", "has no engine"]),
        (plan, ["--model-form", "graph", "--runtime", "tensorrt"], ["--runtime tensorrt", "onnxruntime"]),
        (plan, ["--model-form", "best"], ["--model-form best: unknown"]),
        (plan, ["--batch", 5], ["--batch 5", "takes 4", "--max-batch 5"]),
        (plan.with_suffix(".calibrated"), ["--model-form", "graph"], ["is a calibrated checkpoint"]),
        ("tiny", ["--model-form", "fake-quant"], ["is no export"]),
        ("tiny", ["--device", "tpu"], ["--device tpu: unknown"]),
        (tmp_path / "none.plan", [], ["no such manifest"]),
        ("./none", [], ["no such folder"]),
    ):
        assert_refused(run_eval(model, *common, *arguments, "--json"), *words)
        assert not (tmp_path / "p.jsonl").exists()


def test_more_shards_than_questions_merge(sets, tmp_path):
    common = (*of_task(sets, "vqav2"), *FORM, "--limit", 2)
    parts = []
    for part in (1, 2, 3):
        parts += ["--merge", tmp_path / f"{part}.jsonl"]
        content = eval_json("tiny", *common, "--shard", f"{part}/3", "--predictions", parts[-1])
        assert content["answers"] == int(part < 3)
    assert eval_json(*common, *parts)["answers"] == 2


def test_submissions_hold_what_the_servers_take(sets, tmp_path):
    questions = json.loads((sets / "vqav2" / "v2_OpenEnded_mscoco_test2015_questions.json").read_text())["questions"]
    common = ("tiny", *of_task(sets, "vqav2"), *FORM, "--split", "test-dev")
    path = tmp_path / "vqa.json"
    content = eval_json(*common, "--predictions", tmp_path / "a.jsonl", "--submission", path)
    assert (content["metrics"], content["submission"]) == (None, str(path))
    rows = json.loads(path.read_text())
    assert {row["question_id"] for row in rows} == {q["question_id"] for q in questions}
    assert sum(bool(row["answer"]) for row in rows) == len(questions) // 2  # test-dev is half of test
    assert all(set(row) == {"question_id", "answer"} for row in rows)
    path = tmp_path / "vizwiz.json"
    arguments = ("--split", "test", "--predictions", tmp_path / "b.jsonl", "--submission", path)
    result = run_eval("tiny", *of_task(sets, "vizwiz"), *FORM, *arguments)
    assert result.exit_code == 0, result.stderr
    assert "answers of this split are not public" in result.stdout
    rows = json.loads(path.read_text())
    assert len(rows) == COUNT // 10
    assert all(row["image"].startswith("VizWiz_test_") and row["answer"] for row in rows)
    assert_refused(
        run_eval(*common, "--predictions", tmp_path / "c.jsonl"), "--split test-dev", "not public", "--submission"
    )
    assert_refused(run_eval(*common, "--submission", tmp_path / "d.json", "--limit", 2), "--submission", "--limit")
    assert_refused(run_eval("tiny", *of_task(sets, "scienceqa"), "--submission", path), "scienceqa has none")
    assert_refused(run_eval(*common, "--submission", tmp_path / "no" / "d.json"), "--submission", "folder")
    assert not (tmp_path / "d.json").exists()


def test_unreadable_images_are_counted_and_named(sets, uninterrupted, tmp_path):
    """Once they can be read, the same command asks these questions only."""
    data = tmp_path / "scienceqa"
    shutil.copytree(sets / "scienceqa", data)
    first, second = list(answers(uninterrupted["scienceqa"]["predictions"]))[:2]
    broken = [data / "images" / "test" / question_id / "image.png" for question_id in (first, second)]
    broken[0].write_bytes(b"no picture")
    broken[1].unlink()
    command = ("tiny", "--task", "scienceqa", "--data", data, *FORM, "--limit", 20, "--predictions", tmp_path / "p.jsonl")
    result = run_eval(*command)
    assert result.exit_code == 1, result.stderr
    assert "not asked, counted as wrong: 2" in result.stdout
    for path in broken:
        assert f"{path.parent.name}/image.png" in result.stdout
    content = eval_json(*command, code=1)
    assert set(content["failed"]) == {first, second}
    assert (content["answers"], content["counts"]["Avg"]) == (20, 20)
    for path in broken:
        shutil.copy(sets / path.relative_to(tmp_path), path)
    repaired = eval_json(*command)
    assert repaired["failed"] == {}
    assert repaired["metrics"]["Avg"] == pytest.approx(content["metrics"]["Avg"] + 2 / 20)


def test_a_directory_without_images_is_refused(sets, tmp_path):
    shutil.copytree(sets / "vizwiz", tmp_path / "v", ignore=shutil.ignore_patterns("*.jpg"))
    result = run_eval("tiny", "--task", "vizwiz", "--data", tmp_path / "v", "--predictions", tmp_path / "p.jsonl")
    assert_refused(result, "holds no ", "VizWiz_val_00000000.jpg")
    assert not (tmp_path / "p.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["--task and --data"]),
        (["tiny", "--task", "vqa", "--data", "."], ["--task vqa: unknown", "scienceqa, vqav2, vizwiz, hateful-memes"]),
        (["tiny", "--task", "vqav2", "--data", "none"], ["--data none: there is no such directory"]),
        (["tiny", "--task", "vqav2", "--data", "."], ["holds no v2_OpenEnded_mscoco_val2014_questions.json"]),
        (["tiny", "--task", "vizwiz", "--data", "."], ["holds no val.json"]),
        (["tiny", "--task", "hateful-memes", "--data", "."], ["holds no dev.jsonl"]),
        (["tiny", "--task", "vqav2", "--data", ".", "--split", "dev"], ["--split dev: unknown", "test-dev"]),
        (["tiny", "--task", "vqav2", "--data", ".", "--form", "v2"], ["--form v2: unknown"]),
        (["tiny", "--task", "vqav2", "--data", ".", "--conversation", "x"], ["--conversation x: unknown"]),
        (["tiny", "--task", "vqav2", "--data", ".", "--shard", "3"], ["--shard 3", "1/4"]),
        (["tiny", "--task", "vqav2", "--data", ".", "--shard", "3/2"], ["--shard 3/2"]),
        (["tiny", "--task", "vqav2", "--data", ".", "--limit", "0"], ["--limit 0"]),
        (["tiny", "--task", "vqav2", "--data", ".", "--limit", "many"], ["--limit", "--help"]),
        (["tiny", "--task", "vqav2", "--data", ".", "--questions", "x"], ["--questions: vqav2"]),
    ],
)
def test_bad_arguments_are_refused(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_refused(run_eval(*arguments), *words)
    assert list(tmp_path.iterdir()) == []


def test_a_model_or_predictions_to_merge_are_required(sets):
    assert_refused(run_eval(*of_task(sets, "vqav2")), "give a model or an export, or --merge")


def test_predictions_are_written_to_the_current_folder_by_default(sets, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = eval_json("tiny", *of_task(sets, "vqav2"), *FORM, "--limit", 2)
    assert content["predictions"] == "tiny.vqav2-val.float.jsonl"
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.vqav2-val.float.jsonl"]


def test_the_command_shows_examples():
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    assert "qvlm-eval engine.plan --task scienceqa --data ScienceQA" in result.stdout


@pytest.mark.parametrize("task", ["hateful-memes", "vqav2"])
def test_logits_that_are_not_finite_end_the_run(sets, plan, tmp_path, monkeypatch, task):
    """They would make every likelihood NaN, which scores as a guess, and every text empty."""
    for runner in (OnnxRunner, TorchRunner):
        step = runner.step
        monkeypatch.setattr(runner, "step", lambda *arguments, step=step: step(*arguments) * np.inf)
    for model in ("tiny", plan):
        result = run_eval(model, *of_task(sets, task), *FORM, "--device", "cpu", "--predictions", tmp_path / "p.jsonl")
        assert result.exit_code == 2
        assert result.stderr.splitlines()[-1].startswith("error: the logits are NaN or infinite")
    assert list(tmp_path.iterdir()) == []


def test_two_runs_on_one_file_of_predictions_do_not_mix(sets, tmp_path):
    """The second is refused while the first is at work; once all is answered, both may read the file at a time."""
    path = tmp_path / "p.jsonl"
    arguments = ("tiny", *of_task(sets, "vqav2"), *FORM, "--device", "cpu", "--limit", 6, "--predictions", path)
    with lock_predictions(path):
        refused = run_eval(*arguments)
        assert (refused.exit_code, path.exists()) == (2, False)
        assert f"error: {path}: another qvlm-eval writes it (process {os.getpid()}); wait for it" in refused.stderr
    first = eval_json(*arguments)
    with lock_predictions(path):
        assert repeatable(eval_json(*arguments)) == repeatable(first)
    assert list(tmp_path.iterdir()) == [path]


def test_a_finished_run_is_scored_from_a_folder_that_cannot_be_written(sets, tmp_path):
    path = tmp_path / "kept" / "p.jsonl"
    arguments = ("tiny", *of_task(sets, "vqav2"), *FORM, "--device", "cpu", "--limit", 4, "--predictions", path)
    first = eval_json(*arguments)
    real, before = os.access, path.stat().st_mtime_ns
    with pytest.MonkeyPatch.context() as patch:  # as root may write everywhere
        patch.setattr(os, "access", lambda where, mode, **rest: mode != os.W_OK and real(where, mode, **rest))
        assert repeatable(eval_json(*arguments)) == repeatable(first)
    assert path.stat().st_mtime_ns == before


@pytest.mark.parametrize("option", ["--predictions", "--submission", "--merge", "--questions"])
def test_pipes_are_refused(sets, tmp_path, option):
    os.mkfifo(tmp_path / "pipe")
    task = "scienceqa" if option == "--questions" else "vqav2"
    result = run_eval("tiny", *of_task(sets, task), *FORM, "--device", "cpu", option, tmp_path / "pipe")
    assert_refused(result, f"{tmp_path / 'pipe'}: is a pipe, not a")
