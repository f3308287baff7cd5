"""Tools around qvlm-eval: small evaluation sets in official layouts, the table of the paper, the tables of scores."""

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
def test_evaluation_sets_are_read_with_all_their_images(sets, task):
    evaluation_set = TASKS[task].read(Request(sets / task, TASKS[task].splits[0], "v1.3"))
    assert len(evaluation_set.questions) == len(evaluation_set.truth) == 20
    for question in evaluation_set.questions:
        if question.image is not None:
            with Image.open(question.image) as image:
                assert image.size == (192, 192)


def test_scienceqa_prompts_have_the_form_of_training(sets):
    """Prompts, letters and images of the form v1.3 are those of training, word for word."""
    test = TASKS["scienceqa"].read(Request(sets / "scienceqa", "test", "v1.3"))
    for index, question in enumerate(test.questions):
        scene, (expected,) = scenes.questions("test", index, kinds=("choice",))
        assert f"The answer is {LETTERS[test.truth[question.id].answer]}." == expected.answer
        if question.image is not None:
            assert question.prompt == expected.text
            with Image.open(question.image) as image:
                assert image.tobytes() == scenes.draw(scene).tobytes()
    train = TASKS["scienceqa"].read(Request(sets / "scienceqa", "train", "v1.3"))
    assert len(train.questions) == 64
    assert not {q.id for q in train.questions} & {q.id for q in test.questions}


def test_label_of_a_meme_says_whether_the_named_object_is_in_the_image(sets):
    memes = TASKS["hateful-memes"].read(Request(sets / "hateful-memes", "dev"))
    for index, question in enumerate(memes.questions):
        named = re.search("with: '(.*)' written", question.prompt)[1]
        names = {thing.name for thing in scenes.make_scene("test", index, seed=3).things}
        assert memes.truth[question.id] == int(named in names)


def run_tool(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["reproduce_paper.py", *map(str, arguments)])
    reproduce_paper.main()


def test_table_of_the_paper_for_the_tiny_model(sets, tmp_path, monkeypatch, capsys):
    """Two cells are measured; a second run reuses their calibrated checkpoints."""
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
    groups = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"].values()
    assert any("vision_tower" in target for group in groups for target in group["targets"])


FEW = ("--columns", "W4A4", "--samples", 2, "--limit", 2, "--max-new-tokens", 2, "--device", "cpu")


def test_float_vision_quantizes_the_decoder_only(sets, tmp_path, monkeypatch):
    run_tool(monkeypatch, "--data", sets / "scienceqa", "--work", tmp_path, *FEW, "--methods", "rtn", "--float-vision")
    record = json.loads(next(tmp_path.glob("rtn-W4A4-*/calibration.json")).read_text())
    assert record["linears"]
    assert all(name.startswith("language_model.") for name in record["linears"])


def test_table_of_the_paper_for_a_checkpoint_in_the_authors_layout(sets, tmp_path, monkeypatch, capsys):
    """v1.3 has CLIP in a separate folder, a projector of one linear, and sentencepiece. Another tower is another cell."""
    write_original(tmp_path / "v1.3", "v1.3")
    arguments = ["--data", sets / "scienceqa", "--model", tmp_path / "v1.3", "--work", tmp_path / "w", *FEW]
    run_tool(monkeypatch, *arguments, "--methods", "rtn")
    assert "| round-to-nearest, absmax |  | 0.00 |" in capsys.readouterr().out
    (config,) = (tmp_path / "w").glob("rtn-W4A4-*/config.json")
    assert json.loads(config.read_text())["model_type"] == "llava"  # as in transformers
    tower = tmp_path / f"v1.3-{TOWER}" / "model.safetensors"
    tensors = load_file(tower)
    save_file({name: array + (name.endswith("class_embedding")) for name, array in tensors.items()}, tower)
    run_tool(monkeypatch, *arguments, "--methods", "rtn")
    assert len(list((tmp_path / "w").glob("rtn-W4A4-*/"))) == 2
    assert len(list((tmp_path / "w").glob("float-*.jsonl"))) == 2


def test_wrong_arguments_end_with_one_line(sets, tmp_path, monkeypatch):
    for arguments, words in (
        (["--data", tmp_path], "holds no problems.json"),
        (["--data", sets / "scienceqa", "--samples", 65, "--limit", 1, "--work", tmp_path], "the train split has 64"),
        (["--data", sets / "scienceqa", "--model", "./none"], "no such folder"),
    ):
        with pytest.raises(SystemExit) as caught:
            run_tool(monkeypatch, *arguments)
        assert str(caught.value).startswith("error: ")
        assert words in str(caught.value)


def test_tables_of_scores_show_metrics_and_rows_that_were_not_run():
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
