"""The tools around qvlm-eval: small sets in official layouts, the paper's table, the table of scores."""

from __future__ import annotations

import json
import re
import sys

import pytest
from eval_sets import make_sets
from PIL import Image
from safetensors.torch import load_file, save_file

from qvlm_export.evaluation.evaluate import TASKS
from qvlm_export.evaluation.tasks.scienceqa import LETTERS
from qvlm_export.evaluation.tasks.task import Request
from tools.families.random_original import TOWER, write_original
from tools.study import reproduce_paper
from tools.tiny import scenes, scores


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    return make_sets(tmp_path_factory.mktemp("sets"), 20)


@pytest.mark.parametrize("task", TASKS)
def test_sets_are_read_and_have_all_their_pictures(sets, task):
    found = TASKS[task].read(Request(sets / task, TASKS[task].splits[0], "v1.3"))
    assert len(found.questions) == len(found.truth) == 20
    for question in found.questions:
        if question.image is not None:
            with Image.open(question.image) as picture:
                assert picture.size == (192, 192)


def test_scienceqa_asks_what_the_model_was_trained_on(sets):
    """Prompts, letters and pictures of the form v1.3 are those of training, word for word."""
    found = TASKS["scienceqa"].read(Request(sets / "scienceqa", "test", "v1.3"))
    for index, question in enumerate(found.questions):
        scene, (asked,) = scenes.questions("test", index, kinds=("choice",))
        assert f"The answer is {LETTERS[found.truth[question.id].answer]}." == asked.answer
        if question.image is not None:
            assert question.prompt == asked.text
            with Image.open(question.image) as picture:
                assert picture.tobytes() == scenes.draw(scene).tobytes()
    train = TASKS["scienceqa"].read(Request(sets / "scienceqa", "train", "v1.3"))
    assert len(train.questions) == 64
    assert not {q.id for q in train.questions} & {q.id for q in found.questions}


def test_a_memes_label_says_whether_its_object_is_there(sets):
    found = TASKS["hateful-memes"].read(Request(sets / "hateful-memes", "dev"))
    for index, question in enumerate(found.questions):
        named = re.search("with: '(.*)' written", question.prompt)[1]
        names = {thing.name for thing in scenes.make_scene("test", index, seed=3).things}
        assert found.truth[question.id] == int(named in names)


def run_tool(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["reproduce_paper.py", *map(str, arguments)])
    reproduce_paper.main()


def test_the_papers_table_on_the_tiny_model(sets, tmp_path, monkeypatch, capsys):
    """Two cells, whole; the second run finds everything done."""
    arguments = ["--data", sets / "scienceqa", "--work", tmp_path / "w", "--methods", "rtn", "--columns", "W8A8", "W4A4"]
    arguments += ["--samples", 6, "--limit", 12, "--max-new-tokens", 8, "--device", "cpu", "--out", tmp_path / "cells.json"]
    run_tool(monkeypatch, *arguments)
    output = capsys.readouterr().out
    cells = {
        (cell["method"], cell["column"]): cell["metrics"]["Avg"]
        for cell in json.loads((tmp_path / "cells.json").read_text())
    }
    assert list(cells) == [("float", "FP"), ("rtn", "W8A8"), ("rtn", "W4A4")]
    assert cells["float", "FP"] > 0.8
    assert cells["rtn", "W8A8"] > 0.7
    assert cells["rtn", "W4A4"] < 0.5  # outliers are planted in the tiny model
    rounded = 100 * cells["rtn", "W8A8"]
    assert f"| round-to-nearest, absmax |  | {rounded:.2f} | {100 * cells['rtn', 'W4A4']:.2f} |" in output
    assert "| published: LLaVA-v1.3-13B, Q-VLM |  | 89.82 | 80.78 |" in output
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "w").rglob("*") if path.is_file()}
    assert len([path for path in before if path.suffix == ".jsonl"]) == 3
    run_tool(monkeypatch, *arguments)
    assert {path: path.stat().st_mtime_ns for path in before if path.suffix == ".safetensors"}.items() <= before.items()
    folder = next((tmp_path / "w").glob("rtn-W8A8-*/config.json")).parent
    targets = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]["targets"]
    assert any("vision_tower" in target for target in targets)


FEW = ("--columns", "W4A4", "--samples", 2, "--limit", 2, "--max-new-tokens", 2, "--device", "cpu")


def test_a_tower_can_stay_float(sets, tmp_path, monkeypatch):
    run_tool(monkeypatch, "--data", sets / "scienceqa", "--work", tmp_path, *FEW, "--methods", "rtn", "--float-vision")
    record = json.loads(next(tmp_path.glob("rtn-W4A4-*/calibration.json")).read_text())
    assert record["linears"]
    assert all(name.startswith("language_model.") for name in record["linears"])


def test_the_papers_table_on_a_checkpoint_of_the_papers_kind(sets, tmp_path, monkeypatch, capsys):
    """v1.3 in the authors' layout: CLIP apart, one linear, sentencepiece. Another tower is another checkpoint."""
    write_original(tmp_path / "v1.3", "v1.3")
    arguments = ["--data", sets / "scienceqa", "--model", tmp_path / "v1.3", "--work", tmp_path / "w", *FEW]
    run_tool(monkeypatch, *arguments, "--methods", "rtn")
    assert "| round-to-nearest, absmax |  | 0.00 |" in capsys.readouterr().out
    (made,) = (tmp_path / "w").glob("rtn-W4A4-*/config.json")
    assert json.loads(made.read_text())["model_type"] == "llava"  # as transformers knows it
    tower = tmp_path / f"v1.3-{TOWER}" / "model.safetensors"
    tensors = load_file(tower)
    save_file({name: array + (name.endswith("class_embedding")) for name, array in tensors.items()}, tower)
    run_tool(monkeypatch, *arguments, "--methods", "rtn")
    assert len(list((tmp_path / "w").glob("rtn-W4A4-*/"))) == 2
    assert len(list((tmp_path / "w").glob("float-*.jsonl"))) == 2


def test_mistakes_cost_one_line(sets, tmp_path, monkeypatch):
    for arguments, words in (
        (["--data", tmp_path], "holds no problems.json"),
        (["--data", sets / "scienceqa", "--samples", 65, "--limit", 1, "--work", tmp_path], "the train split has 64"),
        (["--data", sets / "scienceqa", "--model", "./none"], "no such folder"),
    ):
        with pytest.raises(SystemExit) as caught:
            run_tool(monkeypatch, *arguments)
        assert str(caught.value).startswith("error: ")
        assert words in str(caught.value)


def test_tables_of_scores():
    metrics = {task: {row.main: 0.5, "other": None} for task, row in TASKS.items()}
    counts = {task: {row.main: 4, "other": 0} for task, row in TASKS.items()}
    rows = [
        {"model_form": "float", "task": task, "metrics": metrics[task], "counts": counts[task], "unparsed": 3}
        for task in TASKS
    ] + [{"model_form": "int8, engine", "task": task, "not_run": "no GPU"} for task in TASKS]
    text = scores.tables(rows)
    assert "| float | 50.0 | 50.0 | 50.0 | 50.0 |" in text
    assert "| int8, engine | not run | not run | not run | not run |" in text
    assert "| float | 50.0 | – | 3 |" in text
