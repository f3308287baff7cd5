"""Files of predictions: cut at any byte they are continued, those of another run are refused, shards merge exactly."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import ROOT

from qvlm_export.calibrate.errors import UserError
from qvlm_export.evaluation.predictions import (
    Header,
    PredictionWriter,
    lock_predictions,
    merge_predictions,
    read_predictions,
    write_predictions,
)
from qvlm_export.evaluation.tasks.task import Answer

HEADER = Header({"task": "scienceqa", "model": "a" * 64, "limit": None})
ANSWERS = {"1": Answer("The answer is A."), "2": Answer("Zürich \ud83d"), "3": Answer(choices=(-0.5, -2.0)), "4": Answer("")}


def write(path, answers=ANSWERS, header=HEADER):
    """Writes a file of predictions, each answer as a batch of its own."""
    with PredictionWriter(path, header) as writer:
        writer.begin()
        for question_id, answer in answers.items():
            writer.add({question_id: answer})
    return path


def test_written_predictions_are_read_back(tmp_path):
    path = write(tmp_path / "new" / "p.jsonl")
    predictions = read_predictions(path)
    assert (predictions.header, predictions.answers, predictions.size) == (HEADER, ANSWERS, path.stat().st_size)
    assert path.read_bytes().isascii()


@settings(max_examples=30)  # each syncs a file many times
@given(st.dictionaries(st.text(min_size=1), st.builds(Answer, text=st.text())), st.integers(min_value=0))
def test_a_file_cut_at_any_byte_is_continued(tmp_path_factory, answers, cut):
    """A kill may leave any number of bytes behind the header; complete lines count, and the rest is written again."""
    path = write(tmp_path_factory.mktemp("p") / "p.jsonl", answers)
    content, header_size = path.read_bytes(), len(HEADER.line())
    path.write_bytes(content[: header_size + cut % (len(content) - header_size + 1)])
    with PredictionWriter(path, HEADER) as writer:
        assert dict(list(answers.items())[: len(writer.answers)]) == writer.answers
        writer.begin()
        for question_id in list(answers)[len(writer.answers) :]:
            writer.add({question_id: answers[question_id]})
    assert path.read_bytes() == content


def test_a_batch_is_on_disk_once_added_and_nothing_is_before(tmp_path):
    path = tmp_path / "new" / "p.jsonl"
    with PredictionWriter(path, HEADER) as writer:
        assert not path.parent.exists()
        writer.add({"1": ANSWERS["1"]})
        assert read_predictions(path).answers == {"1": ANSWERS["1"]}


def test_failed_questions_are_asked_again(tmp_path):
    path = write(tmp_path / "p.jsonl", {"1": Answer("A"), "2": Answer(failed="unreadable")})
    with PredictionWriter(path, HEADER) as writer:
        assert writer.answers == {"1": Answer("A")}
        writer.add({"2": Answer("B")})
    assert read_predictions(path).answers == {"1": Answer("A"), "2": Answer("B")}


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (Header({**HEADER.fingerprint, "model": "b" * 64}), ["model was aaaaaaaaaaaa…, now it is bbbbbbbbbbbb…"]),
        (Header({**HEADER.fingerprint, "limit": 5}), ["limit was None, now it is 5"]),
        (Header({**HEADER.fingerprint, "more": 1}), ["more was None, now it is 1"]),
        (Header({"task": "scienceqa"}), ["model was"]),
        (Header(HEADER.fingerprint, (1, 2)), ["shard was 1/1, now it is 1/2"]),
    ],
)
def test_the_file_of_another_run_is_refused_and_left_unchanged(tmp_path, header, words):
    path = write(tmp_path / "p.jsonl")
    before = path.read_bytes()
    with pytest.raises(UserError) as caught:
        PredictionWriter(path, header)
    assert all(word in str(caught.value) for word in [*words, "--predictions"]), caught.value
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["holds no predictions"]),
        (b"no newline", ["holds no predictions"]),
        (b"[]\n", ["is no file of predictions"]),
        (b'{"format": "other"}\n', ["is no file of predictions"]),
        (b"\xff\xfe\n", ["is no file of predictions"]),
        (HEADER.line().encode() + b'{"id": "1"}\n{"id": "1"}\n', ["p.jsonl:3", "question 1 a second time"]),
        (HEADER.line().encode() + b"{nonsense\n{}\n", ["p.jsonl:2", "no prediction"]),
        (HEADER.line().encode() + b'{"id": 1}\n', ["p.jsonl:2", "no prediction"]),
        (HEADER.line().encode() + b'{"id": "1", "text": 3}\n', ["p.jsonl:2", "no prediction"]),
        (HEADER.line().encode() + b'{"id": "1", "choices": ["x"]}\n', ["p.jsonl:2", "no prediction"]),
        (HEADER.line().encode() + b'{"id": "1", "choices": [NaN, -1]}\n', ["p.jsonl:2", "likelihood is NaN"]),
        (HEADER.line().replace('"version": 2', '"version": 9').encode(), ["version 9"]),
        (HEADER.line().replace('"version": 2', '"version": 1').encode(), ["version 1", "writes 2", "ask again"]),
    ],
)
def test_damaged_files_are_refused(tmp_path, content, words):
    (tmp_path / "p.jsonl").write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_predictions(tmp_path / "p.jsonl")
    assert all(word in str(caught.value) for word in words), caught.value


def test_paths_that_cannot_be_written_or_read_are_refused(tmp_path):
    with pytest.raises(UserError, match="is a folder"):
        PredictionWriter(tmp_path, HEADER)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        PredictionWriter(tmp_path / "file" / "p.jsonl", HEADER)
    with pytest.raises(UserError, match="cannot be read"):
        read_predictions(tmp_path / "none.jsonl")


def write_shards(folder, count=3, total=10):
    """Writes the files of all shards of a run; returns their paths and all answers."""
    all_answers = {str(n): Answer(f"text {n}") for n in range(total)}
    paths = []
    for part in range(1, count + 1):
        answers = {question_id: all_answers[question_id] for question_id in list(all_answers)[part - 1 :: count]}
        paths.append(write(folder / f"{part}.jsonl", answers, Header(HEADER.fingerprint, (part, count))))
    return paths, all_answers


def test_shards_merge_into_one_run(tmp_path):
    paths, answers = write_shards(tmp_path)
    merged = merge_predictions(paths[::-1], list(answers))
    assert list(merged.answers.items()) == list(answers.items())
    assert merged.header == HEADER
    write_predictions(tmp_path / "whole.jsonl", merged)
    assert (tmp_path / "whole.jsonl").read_bytes() == write(tmp_path / "one.jsonl", answers).read_bytes()


def test_files_that_are_not_all_shards_of_one_run_are_refused(tmp_path):
    paths, answers = write_shards(tmp_path)
    ids = list(answers)
    (tmp_path / "more").mkdir()
    other_shards, _ = write_shards(tmp_path / "more", count=2)
    other_model = write(tmp_path / "s.jsonl", {}, Header({**HEADER.fingerprint, "model": "c"}, (3, 3)))
    for given_paths, words in (
        (paths[:2], ["shard 3/3 is missing"]),
        ([*paths, paths[0]], ["shard 1/3, which is given twice"]),
        ([paths[0], other_shards[1]], ["is a shard of 2", "one of 3"]),
        ([*paths[:2], other_model], ["model was c", "one run only"]),
    ):
        with pytest.raises(UserError) as caught:
            merge_predictions(given_paths, ids)
        assert all(word in str(caught.value) for word in words), caught.value
    lines = paths[1].read_text().splitlines(keepends=True)
    paths[1].write_text("".join(lines[:-1]))
    with pytest.raises(UserError, match="1 of 10 questions lack an answer, such as 7"):
        merge_predictions(paths, ids)
    assert json.loads(lines[-1])["id"] == "7"


# One writer


def test_a_second_writer_is_refused_until_the_first_is_done(tmp_path):
    path = tmp_path / "new" / "p.jsonl"
    with lock_predictions(path):
        (tmp_path / "link").symlink_to(tmp_path / "new")
        for other in (path, tmp_path / "link" / "p.jsonl"):
            with (
                pytest.raises(UserError, match=rf"p.jsonl: another qvlm-eval writes it \(process {os.getpid()}\); wait"),
                lock_predictions(other),
            ):
                pass
        with lock_predictions(tmp_path / "other.jsonl"):
            pass
    assert not path.parent.exists()
    with lock_predictions(path):
        write(path)
    assert list(path.parent.iterdir()) == [path]


HOLD = """
import sys, pathlib
from qvlm_export.evaluation.predictions import lock_predictions
with lock_predictions(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    input()
"""


def test_the_lock_of_a_process_that_was_killed_is_released(tmp_path):
    path = tmp_path / "p.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=rf"process {process.pid}"), lock_predictions(path):
        pass
    process.kill()
    process.communicate()
    assert (tmp_path / ".p.jsonl.lock").exists()
    with lock_predictions(path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_regular_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for open_it in (read_predictions, lambda path: PredictionWriter(path, HEADER), write):
        with pytest.raises(UserError, match="pipe: is a pipe, not a file of predictions"):
            open_it(tmp_path / "pipe")


def test_only_a_run_whose_questions_are_all_answered_is_complete(tmp_path):
    predictions = read_predictions(write(tmp_path / "p.jsonl"))
    assert predictions.is_complete(["4", "3", "2", "1"])
    assert not predictions.is_complete(["1", "2", "3"])
    assert not predictions.is_complete(["1", "2", "3", "4", "5"])
    failed = read_predictions(write(tmp_path / "f.jsonl", {"1": Answer(failed="unreadable")}))
    assert not failed.is_complete(["1"])
    assert not read_predictions(write(tmp_path / "e.jsonl", {})).is_complete([])
