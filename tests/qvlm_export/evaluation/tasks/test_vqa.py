"""VQAv2 and VizWiz: official files, scores by type, submissions, files that do not match."""

from __future__ import annotations

import json

import pytest

from qvlm_export.calibrate.errors import UserError
from qvlm_export.evaluation.tasks.task import Answer, Request
from qvlm_export.evaluation.tasks.vqa import VQA_FILES, read_vizwiz, read_vqav2, score, vizwiz_submission, vqav2_submission


def tens(right, wrong="something", matches=10):
    said = [right] * matches + [wrong] * (10 - matches)
    return [{"answer": one, "answer_confidence": "yes", "answer_id": n + 1} for n, one in enumerate(said)]


ASKED = [
    {"image_id": 42, "question": "How many?", "question_id": 42000},
    {"image_id": 42, "question": "Is it red?", "question_id": 42001},
    {"image_id": 9, "question": "What?", "question_id": 9000},
]
ANNOTATED = [
    {"question_id": 9000, "image_id": 9, "answer_type": "other", "answers": tens("a dog", "The cat.", 3)},
    {"question_id": 42000, "image_id": 42, "answer_type": "number", "answers": tens("2", "3", 2)},
    {"question_id": 42001, "image_id": 42, "answer_type": "yes/no", "answers": tens("yes")},
]  # fmt: skip


def write(folder, asked=ASKED, annotated=ANNOTATED, split="val"):
    asked_name, annotated_name, pictures = VQA_FILES[split]
    (folder / pictures).mkdir(parents=True, exist_ok=True)
    (folder / asked_name).write_text(json.dumps({"questions": asked}), encoding="utf-8")
    if annotated_name:
        (folder / annotated_name).write_text(json.dumps({"annotations": annotated}), encoding="utf-8")
    return Request(folder, split)


def test_vqav2_is_read(tmp_path):
    found = read_vqav2(write(tmp_path))
    assert [q.id for q in found.questions] == ["42000", "42001", "9000"]
    assert found.questions[0].image == tmp_path / "val2014" / "COCO_val2014_000000000042.jpg"
    assert found.questions[0].prompt == "How many?\nAnswer the question using a single word or phrase."
    assert read_vqav2(Request(tmp_path, "val", "v1.3")).questions[0].prompt == "How many?"
    assert found.truth["9000"].humans == ("a dog",) * 3 + ("The cat",) * 7  # they differ, so their punctuation went
    assert found.truth["42001"].humans == ("yes",) * 10


def test_vqav2_in_the_folders_of_its_toolkit(tmp_path):
    request = write(tmp_path)
    for folder, name in (("Questions", VQA_FILES["val"][0]), ("Annotations", VQA_FILES["val"][1])):
        (tmp_path / folder).mkdir()
        (tmp_path / name).rename(tmp_path / folder / name)
    (tmp_path / "Images" / "mscoco").mkdir(parents=True)
    (tmp_path / "val2014").rename(tmp_path / "Images" / "mscoco" / "val2014")
    found = read_vqav2(request)
    assert found.questions[2].image == tmp_path / "Images/mscoco/val2014/COCO_val2014_000000000009.jpg"


def test_scores_by_type(tmp_path):
    given = read_vqav2(write(tmp_path))
    answers = {"42000": Answer("Two."), "42001": Answer("Yes"), "9000": Answer("the dog")}
    found = score(given, answers)
    # "dog" is not "a dog": the toolkit leaves people's articles where they are
    assert found.metrics == pytest.approx({"overall": 1.6 / 3, "number": 0.6, "other": 0.0, "yes/no": 1.0})
    assert found.counts == {"overall": 3, "number": 1, "other": 1, "yes/no": 1}
    assert found.unparsed == 0
    silent = score(given, {"42001": Answer("The."), "42000": Answer(failed="gone")})
    assert (silent.metrics["overall"], silent.unparsed) == (0.0, 1)


def test_vqav2_submission_names_all_of_test(tmp_path):
    write(tmp_path, split="test", annotated=None)
    given = read_vqav2(write(tmp_path, ASKED[:1], split="test-dev"))
    assert given.truth == {}
    assert given.questions[0].image == tmp_path / "test2015" / "COCO_test2015_000000000042.jpg"
    found = vqav2_submission(given, {"42000": Answer("The Two!")})
    assert found == [
        {"question_id": 42000, "answer": "2"},
        {"question_id": 42001, "answer": ""},
        {"question_id": 9000, "answer": ""},
    ]


@pytest.mark.parametrize(
    ("asked", "annotated", "words"),
    [
        (ASKED, ANNOTATED[:2], ["differ in 1 questions, such as 42001"]),
        (ASKED[:2], ANNOTATED, ["differ in 1 questions, such as 9000"]),
        (ASKED, [*ANNOTATED, ANNOTATED[0]], ["question 9000 is annotated twice"]),
        ([*ASKED, ASKED[0]], ANNOTATED, ["question 42000 stands twice"]),
        ([], [], ["val holds no question"]),
        ([{"question": "?"}], ANNOTATED, ["question 0", "question_id", "required"]),
        (ASKED, [{**ANNOTATED[0], "image_id": 1}, *ANNOTATED[1:]], ["question 9000 is about picture 1"]),
        (ASKED, [{**ANNOTATED[0], "answers": [{"answer": 1}] * 10}, *ANNOTATED[1:]], ["question 9000", "has no text"]),
        (ASKED, [{**ANNOTATED[0], "answers": tens("x")[:9]}, *ANNOTATED[1:]], ["question 9000", "9 answers"]),
    ],
)
def test_vqav2_files_that_do_not_match(tmp_path, asked, annotated, words):
    with pytest.raises(UserError) as caught:
        read_vqav2(write(tmp_path, asked, annotated))
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


def viz(name, kind="other", matches=10, **changes):
    answers = [{"answer": a["answer"], "answer_confidence": "yes"} for a in tens("soup.", "can", matches)]
    return {"image": name, "question": "What is it?", "answers": answers, "answer_type": kind, "answerable": 1, **changes}


def write_viz(folder, entries, split="val"):
    (folder / split).mkdir(parents=True, exist_ok=True)
    (folder / f"{split}.json").write_text(json.dumps(entries), encoding="utf-8")
    return Request(folder, split)


def test_vizwiz_is_read_and_scored(tmp_path):
    given = read_vizwiz(write_viz(tmp_path, [viz("a.jpg"), viz("b.jpg", "unanswerable", 7)]))
    assert given.questions[0].image == tmp_path / "val" / "a.jpg"
    assert given.questions[0].prompt == (
        "What is it?\nWhen the provided information is insufficient, respond with 'Unanswerable'."
        "\nAnswer the question using a single word or phrase."
    )
    # VizWiz compares with what people wrote, so nobody can match "soup."; three said "can"
    found = score(given, {"a.jpg": Answer("Soup."), "b.jpg": Answer("The can")})
    assert found.metrics == pytest.approx({"overall": 0.45, "other": 0.0, "unanswerable": 0.9})


def test_vizwiz_submission(tmp_path):
    entries = [{"image": "t.jpg", "question": "?"}, {"image": "u.jpg", "question": "?"}]
    given = read_vizwiz(write_viz(tmp_path, entries, "test"))
    assert given.truth == {}
    found = vizwiz_submission(given, {"u.jpg": Answer(failed="gone"), "t.jpg": Answer("Unanswerable")})
    assert found == [{"image": "t.jpg", "answer": "unanswerable"}, {"image": "u.jpg", "answer": ""}]


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([viz("a.jpg"), viz("a.jpg")], ["question a.jpg stands twice"]),
        ([viz("a.jpg"), viz("b.jpg", answers=None)], ["b.jpg has no answers"]),
        ([viz("a.jpg", answers=[{"answer": "x"}])], ["a.jpg", "1 answers"]),
        ([{"image": "a.jpg"}], ["entry 0", "question"]),
        ({"a": 1}, ["holds no list"]),
        ([], ["val holds no question"]),
    ],
)
def test_vizwiz_files_that_are_wrong(tmp_path, entries, words):
    with pytest.raises(UserError) as caught:
        read_vizwiz(write_viz(tmp_path, entries))
    assert all(word in str(caught.value) for word in words), caught.value
