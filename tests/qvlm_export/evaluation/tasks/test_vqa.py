"""VQAv2 and VizWiz: official files, scores by type of answer, submissions, files that do not match."""

from __future__ import annotations

import json

import pytest

from qvlm_export.calibrate.errors import UserError
from qvlm_export.evaluation.tasks.task import Answer, Request
from qvlm_export.evaluation.tasks.vqa import VQA_FILES, read_vizwiz, read_vqav2, score, vizwiz_submission, vqav2_submission


def human_answers(answer, other="something", matches=10):
    """The answers of ten people in the official layout, of whom `matches` gave `answer` and the rest `other`."""
    texts = [answer] * matches + [other] * (10 - matches)
    return [{"answer": text, "answer_confidence": "yes", "answer_id": n + 1} for n, text in enumerate(texts)]


QUESTIONS = [
    {"image_id": 42, "question": "How many?", "question_id": 42000},
    {"image_id": 42, "question": "Is it red?", "question_id": 42001},
    {"image_id": 9, "question": "What?", "question_id": 9000},
]
ANNOTATIONS = [
    {"question_id": 9000, "image_id": 9, "answer_type": "other", "answers": human_answers("a dog", "The cat.", 3)},
    {"question_id": 42000, "image_id": 42, "answer_type": "number", "answers": human_answers("2", "3", 2)},
    {"question_id": 42001, "image_id": 42, "answer_type": "yes/no", "answers": human_answers("yes")},
]  # fmt: skip


def write(folder, questions=QUESTIONS, annotations=ANNOTATIONS, split="val"):
    """Writes the official files of a VQAv2 split; returns the request that reads them."""
    questions_name, annotations_name, images = VQA_FILES[split]
    (folder / images).mkdir(parents=True, exist_ok=True)
    (folder / questions_name).write_text(json.dumps({"questions": questions}), encoding="utf-8")
    if annotations_name:
        (folder / annotations_name).write_text(json.dumps({"annotations": annotations}), encoding="utf-8")
    return Request(folder, split)


def test_vqav2_is_read(tmp_path):
    question_set = read_vqav2(write(tmp_path))
    assert [q.id for q in question_set.questions] == ["42000", "42001", "9000"]
    assert question_set.questions[0].image == tmp_path / "val2014" / "COCO_val2014_000000000042.jpg"
    assert question_set.questions[0].prompt == "How many?\nAnswer the question using a single word or phrase."
    assert read_vqav2(Request(tmp_path, "val", "v1.3")).questions[0].prompt == "How many?"
    # These ten differ, so their punctuation is removed.
    assert question_set.truth["9000"].answers == ("a dog",) * 3 + ("The cat",) * 7
    assert question_set.truth["42001"].answers == ("yes",) * 10


def test_vqav2_is_read_from_the_folders_of_its_toolkit(tmp_path):
    request = write(tmp_path)
    for folder, name in (("Questions", VQA_FILES["val"][0]), ("Annotations", VQA_FILES["val"][1])):
        (tmp_path / folder).mkdir()
        (tmp_path / name).rename(tmp_path / folder / name)
    (tmp_path / "Images" / "mscoco").mkdir(parents=True)
    (tmp_path / "val2014").rename(tmp_path / "Images" / "mscoco" / "val2014")
    question_set = read_vqav2(request)
    assert question_set.questions[2].image == tmp_path / "Images/mscoco/val2014/COCO_val2014_000000000009.jpg"


def test_soft_accuracy_by_type_of_answer(tmp_path):
    question_set = read_vqav2(write(tmp_path))
    answers = {"42000": Answer("Two."), "42001": Answer("Yes"), "9000": Answer("the dog")}
    result = score(question_set, answers)
    # "dog" is not "a dog", as the toolkit keeps the articles in people's answers.
    assert result.metrics == pytest.approx({"overall": 1.6 / 3, "number": 0.6, "other": 0.0, "yes/no": 1.0})
    assert result.counts == {"overall": 3, "number": 1, "other": 1, "yes/no": 1}
    assert result.unparsed == 0
    without_words = score(question_set, {"42001": Answer("The."), "42000": Answer(failed="gone")})
    assert (without_words.metrics["overall"], without_words.unparsed) == (0.0, 1)


def test_a_test_dev_submission_names_all_questions_of_test(tmp_path):
    write(tmp_path, split="test", annotations=None)
    question_set = read_vqav2(write(tmp_path, QUESTIONS[:1], split="test-dev"))
    assert question_set.truth == {}
    assert question_set.questions[0].image == tmp_path / "test2015" / "COCO_test2015_000000000042.jpg"
    rows = vqav2_submission(question_set, {"42000": Answer("The Two!")})
    assert rows == [
        {"question_id": 42000, "answer": "2"},
        {"question_id": 42001, "answer": ""},
        {"question_id": 9000, "answer": ""},
    ]


@pytest.mark.parametrize(
    ("questions", "annotations", "words"),
    [
        (QUESTIONS, ANNOTATIONS[:2], ["differ in 1 questions, such as 42001"]),
        (QUESTIONS[:2], ANNOTATIONS, ["differ in 1 questions, such as 9000"]),
        (QUESTIONS, [*ANNOTATIONS, ANNOTATIONS[0]], ["question 9000 is annotated twice"]),
        ([*QUESTIONS, QUESTIONS[0]], ANNOTATIONS, ["question 42000 stands twice"]),
        ([], [], ["val holds no question"]),
        ([{"question": "?"}], ANNOTATIONS, ["question 0", "question_id", "required"]),
        (QUESTIONS, [{**ANNOTATIONS[0], "image_id": 1}, *ANNOTATIONS[1:]], ["question 9000 is about picture 1"]),
        (
            QUESTIONS,
            [{**ANNOTATIONS[0], "answers": [{"answer": 1}] * 10}, *ANNOTATIONS[1:]],
            ["question 9000", "has no text"],
        ),
        (
            QUESTIONS,
            [{**ANNOTATIONS[0], "answers": human_answers("x")[:9]}, *ANNOTATIONS[1:]],
            ["question 9000", "9 answers"],
        ),
    ],
)
def test_vqav2_files_that_do_not_match_are_refused(tmp_path, questions, annotations, words):
    with pytest.raises(UserError) as caught:
        read_vqav2(write(tmp_path, questions, annotations))
    assert all(word in str(caught.value) for word in words), caught.value


def test_missing_vqav2_files_are_named(tmp_path):
    request = write(tmp_path)
    (tmp_path / "v2_mscoco_val2014_annotations.json").unlink()
    with pytest.raises(UserError, match=r"holds no v2_mscoco_val2014_annotations\.json"):
        read_vqav2(request)
    (tmp_path / "val2014").rmdir()
    with pytest.raises(UserError, match="holds no folder val2014"):
        read_vqav2(request)
    with pytest.raises(UserError, match="holds no v2_OpenEnded_mscoco_test-dev2015"):
        read_vqav2(Request(tmp_path, "test-dev"))


def vizwiz_entry(name, answer_type="other", matches=10, **changes):
    answers = [{"answer": a["answer"], "answer_confidence": "yes"} for a in human_answers("soup.", "can", matches)]
    entry = {"image": name, "question": "What is it?", "answers": answers, "answer_type": answer_type, "answerable": 1}
    return {**entry, **changes}


def write_vizwiz(folder, entries, split="val"):
    """Writes the official file of a VizWiz split; returns the request that reads it."""
    (folder / split).mkdir(parents=True, exist_ok=True)
    (folder / f"{split}.json").write_text(json.dumps(entries), encoding="utf-8")
    return Request(folder, split)


def test_vizwiz_is_read_and_scored(tmp_path):
    question_set = read_vizwiz(write_vizwiz(tmp_path, [vizwiz_entry("a.jpg"), vizwiz_entry("b.jpg", "unanswerable", 7)]))
    assert question_set.questions[0].image == tmp_path / "val" / "a.jpg"
    assert question_set.questions[0].prompt == (
        "What is it?\nWhen the provided information is insufficient, respond with 'Unanswerable'."
        "\nAnswer the question using a single word or phrase."
    )
    # VizWiz keeps the punctuation in people's answers, so no answer can match "soup."; three people said "can".
    result = score(question_set, {"a.jpg": Answer("Soup."), "b.jpg": Answer("The can")})
    assert result.metrics == pytest.approx({"overall": 0.45, "other": 0.0, "unanswerable": 0.9})


def test_a_vizwiz_submission_names_images(tmp_path):
    entries = [{"image": "t.jpg", "question": "?"}, {"image": "u.jpg", "question": "?"}]
    question_set = read_vizwiz(write_vizwiz(tmp_path, entries, "test"))
    assert question_set.truth == {}
    rows = vizwiz_submission(question_set, {"u.jpg": Answer(failed="gone"), "t.jpg": Answer("Unanswerable")})
    assert rows == [{"image": "t.jpg", "answer": "unanswerable"}, {"image": "u.jpg", "answer": ""}]


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([vizwiz_entry("a.jpg"), vizwiz_entry("a.jpg")], ["question a.jpg stands twice"]),
        ([vizwiz_entry("a.jpg"), vizwiz_entry("b.jpg", answers=None)], ["b.jpg has no answers"]),
        ([vizwiz_entry("a.jpg", answers=[{"answer": "x"}])], ["a.jpg", "1 answers"]),
        ([{"image": "a.jpg"}], ["entry 0", "question"]),
        ({"a": 1}, ["holds no list"]),
        ([], ["val holds no question"]),
    ],
)
def test_wrong_vizwiz_files_are_refused(tmp_path, entries, words):
    with pytest.raises(UserError) as caught:
        read_vizwiz(write_vizwiz(tmp_path, entries))
    assert all(word in str(caught.value) for word in words), caught.value
