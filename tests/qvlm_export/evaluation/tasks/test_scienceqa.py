"""ScienceQA: official files, LLaVA's prompts, parsing of answers, the columns of the paper's table, wrong files."""

from __future__ import annotations

import json

import pytest

from qvlm_export.calibrate.errors import UserError
from qvlm_export.evaluation.tasks.scienceqa import parse, read, score
from qvlm_export.evaluation.tasks.task import Answer, Request

LETTER = "\nAnswer with the option's letter from the given choices directly."


def problem(**changes):
    """An entry of problems.json, with changed fields."""
    return {
        "question": "Which is red?", "choices": ["a circle", "a ring"], "answer": 1, "hint": "", "image": "image.png",
        "grade": "grade3", "subject": "natural science", "lecture": "", "solution": "", "split": "test", **changes,
    }  # fmt: skip


PROBLEMS = {
    "7": problem(),
    "3": problem(hint="Look.", image=None, grade="grade7", subject="social science", answer=0),
    "5": problem(image=None, grade="grade12", subject="language science"),
    "9": problem(hint="See  it.", grade="grade6", choices=["a", "b", "c", "d", "e"], answer=4),
}


@pytest.fixture
def data(tmp_path):
    """A data directory whose split test has four problems."""
    return write(tmp_path / "sqa", PROBLEMS, {"test": ["7", "3", "5", "9"], "val": []})


def write(folder, problems, splits):
    (folder / "images" / "test").mkdir(parents=True, exist_ok=True)
    (folder / "problems.json").write_text(json.dumps(problems), encoding="utf-8")
    (folder / "pid_splits.json").write_text(json.dumps(splits), encoding="utf-8")
    return folder


def test_prompts_and_image_paths(data):
    question_set = read(Request(data, "test", "v1.3"))
    assert [q.id for q in question_set.questions] == ["7", "3", "5", "9"]
    assert question_set.questions[0].prompt == "Which is red?\nContext: N/A\nOptions: (A) a circle (B) a ring"
    assert question_set.questions[3].prompt == "Which is red?\nContext: See it.\nOptions: (A) a (B) b (C) c (D) d (E) e"
    assert question_set.questions[0].image == data / "images" / "test" / "7" / "image.png"
    assert question_set.questions[1].image is None
    questions = read(Request(data, "test", "v1.5")).questions
    assert questions[0].prompt == f"Which is red?\nA. a circle\nB. a ring{LETTER}"
    assert questions[3].prompt == f"Context: See it.\nWhich is red?\nA. a\nB. b\nC. c\nD. d\nE. e{LETTER}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("B", 1),
        (" B ", 1),
        ("B.", 1),
        ("(B)", 1),
        ("B. a ring", 1),
        ("B\na ring", 1),
        ("(B) a ring", 1),
        ("The answer is B.", 1),
        ("The answer is B. BECAUSE: it is red", 1),
        ("The answer is (A).", 0),
        ("LECTURE: a\nSOLUTION: b\n###\nANSWER: B.", 1),
        ("The ring is red. The answer is A.", 0),
        ("C", None),  # there are two choices
        ("The answer is E.", None),
        ("Both", None),
        ("A ring", None),
        ("a ring", None),
        ("The answer is Blue.", None),
        ("", None),
        ("b", None),
    ],
)
def test_parsing_finds_the_option_that_an_answer_names(text, expected):
    assert parse(text, 2) == expected


def test_accuracy_by_the_columns_of_the_paper(data):
    question_set = read(Request(data, "test"))
    answers = {
        "7": Answer("The answer is B."),
        "3": Answer("B"),  # wrong
        "5": Answer("I do not know"),  # unparsed
        "9": Answer("E. e"),
    }
    result = score(question_set, answers)
    assert result.metrics == {
        "NAT": 1.0, "SOC": 0.0, "LAN": 0.0, "TXT": 0.5, "IMG": 1.0, "NO": 0.0, "G1-6": 1.0, "G7-12": 0.0, "Avg": 0.5,
    }  # fmt: skip
    assert result.counts == {
        "NAT": 2, "SOC": 1, "LAN": 1, "TXT": 2, "IMG": 2, "NO": 1, "G1-6": 2, "G7-12": 2, "Avg": 4,
    }  # fmt: skip
    assert result.unparsed == 1
    failed = score(question_set, {"7": Answer(failed="unreadable")})
    assert (failed.metrics["Avg"], failed.metrics["SOC"], failed.unparsed) == (0.0, None, 0)


def test_prompts_are_read_from_llavas_question_file(data, tmp_path):
    path = tmp_path / "llava_test_QCM-LEA.json"
    turns = [{"from": "human", "value": "Own words\n<image>"}, {"from": "gpt", "value": ""}]
    path.write_text(json.dumps([{"id": i, "image": f"{i}/image.png", "conversations": turns} for i in PROBLEMS]))
    question_set = read(Request(data, "test", "v1.3", path))
    assert {q.prompt for q in question_set.questions} == {"Own words"}
    assert path in question_set.files
    path.write_text(json.dumps([{"id": "7", "conversations": turns}]))
    with pytest.raises(UserError, match="differ in 3 questions, such as 3"):
        read(Request(data, "test", "v1.3", path))
    path.write_text(json.dumps([{"id": "7", "conversations": turns}] * 2))
    with pytest.raises(UserError, match="question 7 stands twice"):
        read(Request(data, "test", "v1.3", path))
    path.write_text('[{"id": "7"}]')
    with pytest.raises(UserError, match="LLaVA's question file"):
        read(Request(data, "test", "v1.3", path))


@pytest.mark.parametrize(
    ("problems", "splits", "words"),
    [
        (PROBLEMS, {"test": ["7", "8"]}, ["names problem 8", "do not belong together"]),
        (PROBLEMS, {"test": ["7", "7"]}, ["question 7 stands twice"]),
        (PROBLEMS, {"test": []}, ["test holds no question"]),
        (PROBLEMS, {"val": ["7"]}, ["test holds no question"]),
        ({"7": problem(answer=2)}, {"test": ["7"]}, ["problem 7", "answer 2 is none of its 2 choices"]),
        ({"7": problem(subject="magic")}, {"test": ["7"]}, ["problem 7", "'magic'"]),
        ({"7": problem(grade="first")}, {"test": ["7"]}, ["problem 7", "grade"]),
        ({"7": problem(choices=[])}, {"test": ["7"]}, ["problem 7", "choices"]),
        ({"7": {"question": "?"}}, {"test": ["7"]}, ["problem 7", "choices", "required"]),
        ([], {"test": ["7"]}, ["problems.json", "official file"]),
        (PROBLEMS, {"test": "7"}, ["pid_splits.json", "no list"]),
    ],
)
def test_wrong_files_are_refused(tmp_path, problems, splits, words):
    with pytest.raises(UserError) as caught:
        read(Request(write(tmp_path / "sqa", problems, splits), "test"))
    assert all(word in str(caught.value) for word in words), caught.value


def test_missing_files_are_named(tmp_path, data):
    with pytest.raises(UserError, match="no such directory"):
        read(Request(tmp_path / "none", "test"))
    with pytest.raises(UserError, match=r"holds no problems\.json"):
        read(Request(tmp_path, "test"))
    (data / "pid_splits.json").unlink()
    with pytest.raises(UserError, match=r"holds no pid_splits\.json"):
        read(Request(data, "test"))


def test_a_missing_folder_of_images_is_refused(data):
    (data / "images" / "test").rmdir()
    (data / "images").rmdir()
    with pytest.raises(UserError, match="holds no folder images"):
        read(Request(data, "test"))


def test_damaged_json_is_refused(data):
    path = data / "problems.json"
    content = path.read_text()
    path.write_bytes(content.encode().replace(b"red", b"r\xe9d"))
    with pytest.raises(UserError, match=r"problems\.json: is not UTF-8 text"):
        read(Request(data, "test"))
    path.write_text(content[:-5])
    with pytest.raises(UserError, match="not readable as JSON"):
        read(Request(data, "test"))
    path.write_text('{"7": 1, "7": 2}')
    with pytest.raises(UserError, match="'7' stands twice"):
        read(Request(data, "test"))
