"""Batched evaluation: batches of equal length, encoding ahead in a thread, likelihoods of choices, failed questions."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import LlavaImageProcessorPil

from qvlm_export.checkpoints.chat_templates import prompt_text
from qvlm_export.checkpoints.files.aliases import ALIASES
from qvlm_export.evaluation import ask
from qvlm_export.evaluation.ask import AskSettings, EncodedQuestion, ask_all, chunk_size, pad_to_square
from qvlm_export.evaluation.eval_model import find_eval_model, open_eval_model
from qvlm_export.evaluation.tasks.task import Answer, Question
from qvlm_export.inputs.samples import Encoded, encode

PROMPTS = ("What?", "How many objects are there?", "Is it red?", "Where is the ring? And why?", "Which one is at the left?")


@pytest.fixture(scope="module")
def model(llava):
    with open_eval_model(find_eval_model(str(llava()), "auto"), device="cpu") as opened:
        yield opened


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Twelve questions, every fifth without an image."""
    folder = tmp_path_factory.mktemp("pictures")
    result = []
    for number in range(12):
        path = folder / f"{number}.png"
        Image.new("RGB", (40 + number, 60), (20 * number, 90, 30)).save(path)
        result.append(Question(str(number), PROMPTS[number % len(PROMPTS)], None if number % 5 == 4 else path))
    return result


def answers_of(model, questions, **changes):
    """All answers by question id, and the batches in which they came."""
    batches = list(ask_all(model, questions, AskSettings(**{"max_new_tokens": 8, "batch": 4, **changes})))
    return {question_id: answer for batch in batches for question_id, answer in batch.items()}, batches


def test_batched_answers_equal_those_of_single_questions(model, questions):
    batched, batches = answers_of(model, questions)
    assert list(map(len, batches)) != [1] * 12
    assert set(batched) == {q.id for q in questions}
    for question in questions:
        images = [] if question.image is None else [Image.open(question.image).convert("RGB")]
        single = model.generate(question.prompt, images, max_new_tokens=8)
        assert batched[question.id].text == single.strip()
    assert answers_of(model, questions, batch=1)[0] == batched
    assert len({answer.text for answer in batched.values()}) > 3  # the answers are not all the same


def encoded_question(number, length, images):
    encoded = Encoded(np.zeros((images, 3, 1, 1)), np.zeros(length, np.int64))
    return EncodedQuestion(Question(str(number), "", None), encoded)


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 3)), max_size=30), st.integers(1, 6), st.integers(1, 8))
def test_batches_have_prompts_of_one_length_and_respect_the_limits(rows, size, max_images):
    questions = [encoded_question(n, length, images) for n, (length, images) in enumerate(rows)]
    batches = list(ask._make_batches(questions, size, max_images))
    assert sorted(int(q.question.id) for batch in batches for q in batch) == list(range(len(rows)))
    for batch in batches:
        assert 1 <= len(batch) <= size
        assert len({len(q.input_ids) for q in batch}) == 1
        assert len(batch) == 1 or sum(q.num_images for q in batch) <= max_images
    for batch, other in itertools.pairwise(batches):  # no batch ends before it is full
        if len(batch[0].input_ids) == len(other[0].input_ids) and len(batch) < size:
            assert sum(q.num_images for q in [*batch, other[0]]) > max_images


def test_images_are_decoded_in_a_thread_one_chunk_ahead(model, questions, monkeypatch):
    opened, threads, answered = [], set(), []
    original = ask.open_image

    def record_and_open(path, where):
        opened.append(where)
        threads.add(threading.current_thread().name)
        return original(path, where)

    monkeypatch.setattr(ask, "open_image", record_and_open)
    monkeypatch.setattr(ask, "CHUNK_BATCHES", 2)
    for answers in ask_all(model, questions, AskSettings(max_new_tokens=1, batch=1)):
        answered += list(answers)
        assert len(opened) <= len(answered) + 4  # the images of this chunk and of the next one
    assert threads == {"pictures_0"}


def test_failed_questions_hold_the_reason_and_the_others_are_answered(model, questions, tmp_path):
    (tmp_path / "broken.png").write_bytes(questions[0].image.read_bytes()[:60])
    unanswerable = [
        Question("missing", "What?", tmp_path / "none.png"),
        Question("broken", "What?", tmp_path / "broken.png"),
        Question("marked", "What is <image>?", questions[0].image),
        Question("long", "What? " * 600, None),
        Question("surrogate", "What \ud800?", None),
    ]
    answers, _ = answers_of(model, [*unanswerable[:2], *questions[:2], *unanswerable[2:]])
    assert {question_id for question_id, answer in answers.items() if answer.failed} == {q.id for q in unanswerable}
    assert "there is no picture" in answers["missing"].failed
    assert "broken.png" in answers["broken"].failed
    assert "leave <image> out" in answers["marked"].failed
    assert "tokens long, the model takes" in answers["long"].failed
    assert answers["0"] == answers_of(model, questions[:1])[0]["0"]


def reference_log_likelihood(model, question, choice):
    """The log-likelihood of the tokens of a choice, from the logits of prompt and choice as one text."""
    images = [] if question.image is None else [Image.open(question.image).convert("RGB")]
    text = prompt_text(model.processor, question.prompt, len(images), "own")
    pixels, prompt_ids = encode(model.processor, text, images)
    _, ids = encode(model.processor, f"{text} {choice}", images)
    assert ids[: len(prompt_ids)].tolist() == prompt_ids.tolist()
    logits = model.logits(ids[None], pixels if images else None)[0].astype(np.float64)
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return sum(np.log(probabilities[t - 1, ids[t]]) for t in range(len(prompt_ids), len(ids)))


@pytest.mark.parametrize("choices", [("yes", "no"), ("yes", "a purple ring", "7")])
def test_log_likelihoods_of_choices_equal_the_reference(model, questions, choices):
    """Choices of one token are scored in one pass for a whole batch; longer ones are scored text by text."""
    tokens = [len(model.processor.tokenizer(f" {c}", add_special_tokens=False)["input_ids"]) for c in choices]
    assert (max(tokens) == 1) == (choices == ("yes", "no"))
    answers, _ = answers_of(model, questions[:6], choices=choices)
    for question in questions[:6]:
        expected = [reference_log_likelihood(model, question, choice) for choice in choices]
        assert answers[question.id].choices == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("size", [(30, 10), (9, 20), (31, 10), (16, 16)])
def test_images_are_padded_to_squares_as_by_transformers(model, size):
    """The processor of the authors' checkpoints pads, too; it must leave an image that is already square unchanged."""
    noise = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    padding = LlavaImageProcessorPil(
        do_pad=True, do_resize=False, do_center_crop=False, do_normalize=False, do_rescale=False
    )
    expected = padding(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    square = pad_to_square(image, model.processor)
    np.testing.assert_array_equal(np.asarray(square), expected)
    padded_again = padding(square, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    np.testing.assert_array_equal(padded_again, expected)


def test_chunks_are_smaller_when_images_have_many_tiles():
    """An image of LLaVA-OneVision may have 37 tiles; two chunks of 64 such questions would take 8 GB."""
    assert chunk_size(ALIASES["llava-7b"].config, 8) == 64
    assert chunk_size(ALIASES["llava-next-7b"].config, 8) == 39
    assert chunk_size(ALIASES["llava-onevision-7b"].config, 1) == 4
    assert chunk_size(ALIASES["llava-onevision-7b"].config, 20) == 20  # never smaller than a batch


def test_pad_square_changes_what_the_model_sees(model, tmp_path):
    path = tmp_path / "wide.png"
    Image.new("RGB", (90, 30), (200, 30, 60)).save(path)
    question = [Question("wide", "What?", Path(path))]
    plain, _ = answers_of(model, question, choices=("yes", "no"))
    padded, _ = answers_of(model, question, choices=("yes", "no"), pad_square=True)
    assert plain["wide"] != padded["wide"]
    assert isinstance(plain["wide"], Answer)
