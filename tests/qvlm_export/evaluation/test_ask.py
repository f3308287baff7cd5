"""Asking many questions: batches of equal length, pictures decoded ahead, likelihoods of choices, what cannot be asked."""

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

from qvlm_export.checkpoints.aliases import ALIASES
from qvlm_export.checkpoints.chat_templates import prompt_text
from qvlm_export.evaluation import ask
from qvlm_export.evaluation.ask import AskedQuestion, Manner, ask_all, chunk_size, pad_to_square
from qvlm_export.evaluation.subjects import find_eval_model, open_eval_model
from qvlm_export.evaluation.tasks.task import Answer, Question
from qvlm_export.inputs.samples import Encoded, encode

PROMPTS = ("What?", "How many objects are there?", "Is it red?", "Where is the ring? And why?", "Which one is at the left?")


@pytest.fixture(scope="module")
def model(llava):
    with open_eval_model(find_eval_model(str(llava()), "auto"), device="cpu") as opened:
        yield opened


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Twelve, every fifth without a picture."""
    folder = tmp_path_factory.mktemp("pictures")
    found = []
    for number in range(12):
        path = folder / f"{number}.png"
        Image.new("RGB", (40 + number, 60), (20 * number, 90, 30)).save(path)
        found.append(Question(str(number), PROMPTS[number % len(PROMPTS)], None if number % 5 == 4 else path))
    return found


def answers_of(model, questions, **changes):
    batches = list(ask_all(model, questions, Manner(**{"max_new_tokens": 8, "batch": 4, **changes})))
    return {one: answer for batch in batches for one, answer in batch.items()}, batches


def test_answers_are_those_of_one_question_at_a_time(model, questions):
    together, batches = answers_of(model, questions)
    assert list(map(len, batches)) != [1] * 12
    assert set(together) == {q.id for q in questions}
    for question in questions:
        pictures = [] if question.image is None else [Image.open(question.image).convert("RGB")]
        alone = model.generate(question.prompt, pictures, max_new_tokens=8)
        assert together[question.id].text == alone.strip()
    assert answers_of(model, questions, batch=1)[0] == together
    assert len({answer.text for answer in together.values()}) > 3  # they are not all one answer


def encoded(number, length, images):
    return AskedQuestion(Question(str(number), "", None), Encoded(np.zeros((images, 3, 1, 1)), np.zeros(length, np.int64)))


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 3)), max_size=30), st.integers(1, 6), st.integers(1, 8))
def test_batches_are_of_one_length_and_within_limits(rows, size, max_images):
    ready = [encoded(n, length, images) for n, (length, images) in enumerate(rows)]
    batches = list(ask._batches(ready, size, max_images))
    assert sorted(int(one.question.id) for batch in batches for one in batch) == list(range(len(rows)))
    for batch in batches:
        assert 1 <= len(batch) <= size
        assert len({len(one.ids) for one in batch}) == 1
        assert len(batch) == 1 or sum(one.pictures for one in batch) <= max_images
    for batch, other in itertools.pairwise(batches):  # no batch ends too early
        if len(batch[0].ids) == len(other[0].ids) and len(batch) < size:
            assert sum(one.pictures for one in [*batch, other[0]]) > max_images


def test_pictures_are_decoded_ahead_in_another_thread_but_not_all_at_once(model, questions, monkeypatch):
    opened, threads, seen = [], set(), []
    real = ask.open_image

    def watched(path, where):
        opened.append(where)
        threads.add(threading.current_thread().name)
        return real(path, where)

    monkeypatch.setattr(ask, "open_image", watched)
    monkeypatch.setattr(ask, "CHUNK_BATCHES", 2)
    for answered in ask_all(model, questions, Manner(max_new_tokens=1, batch=1)):
        seen += list(answered)
        assert len(opened) <= len(seen) + 4  # this chunk's and the next
    assert threads == {"pictures_0"}


def test_what_cannot_be_asked_is_named_and_the_rest_goes_on(model, questions, tmp_path):
    (tmp_path / "broken.png").write_bytes(questions[0].image.read_bytes()[:60])
    strange = [
        Question("missing", "What?", tmp_path / "none.png"),
        Question("broken", "What?", tmp_path / "broken.png"),
        Question("marked", "What is <image>?", questions[0].image),
        Question("long", "What? " * 600, None),
        Question("surrogate", "What \ud800?", None),
    ]
    found, _ = answers_of(model, [*strange[:2], *questions[:2], *strange[2:]])
    assert {one for one, answer in found.items() if answer.failed} == {q.id for q in strange}
    assert "there is no picture" in found["missing"].failed
    assert "broken.png" in found["broken"].failed
    assert "leave <image> out" in found["marked"].failed
    assert "tokens long, the model takes" in found["long"].failed
    assert found["0"] == answers_of(model, questions[:1])[0]["0"]


def slow_likelihood(model, question, choice):
    """The sum over the choice's tokens, from the logits of prompt and choice as one text."""
    pictures = [] if question.image is None else [Image.open(question.image).convert("RGB")]
    text = prompt_text(model.processor, question.prompt, len(pictures), "own")
    pixels, ids = encode(model.processor, text, pictures)
    _, whole = encode(model.processor, f"{text} {choice}", pictures)
    assert whole[: len(ids)].tolist() == ids.tolist()
    logits = model.logits(whole[None], pixels if pictures else None)[0].astype(np.float64)
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return sum(np.log(shares[place - 1, whole[place]]) for place in range(len(ids), len(whole)))


@pytest.mark.parametrize("choices", [("yes", "no"), ("yes", "a purple ring", "7")])
def test_likelihoods(model, questions, choices):
    """Of one token, in one pass for a whole batch; of several, one text after another."""
    tokens = [len(model.processor.tokenizer(f" {c}", add_special_tokens=False)["input_ids"]) for c in choices]
    assert (max(tokens) == 1) == (choices == ("yes", "no"))
    found, _ = answers_of(model, questions[:6], choices=choices)
    for question in questions[:6]:
        wanted = [slow_likelihood(model, question, choice) for choice in choices]
        assert found[question.id].choices == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("size", [(30, 10), (9, 20), (31, 10), (16, 16)])
def test_pictures_are_padded_to_squares_as_transformers_does(model, size):
    """Its processor of the authors' checkpoints pads too, so a picture that it is given square stays as it is."""
    noise = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    padding = LlavaImageProcessorPil(
        do_pad=True, do_resize=False, do_center_crop=False, do_normalize=False, do_rescale=False
    )
    wanted = padding(picture, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    square = pad_to_square(picture, model.processor)
    np.testing.assert_array_equal(np.asarray(square), wanted)
    again = padding(square, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    np.testing.assert_array_equal(again, wanted)


def test_pixels_held_are_bounded():
    """A picture of LLaVA-OneVision may be 37 tiles; two chunks of 64 such questions would be 8 GB."""
    assert chunk_size(ALIASES["llava-7b"].config, 8) == 64
    assert chunk_size(ALIASES["llava-next-7b"].config, 8) == 39
    assert chunk_size(ALIASES["llava-onevision-7b"].config, 1) == 4
    assert chunk_size(ALIASES["llava-onevision-7b"].config, 20) == 20  # a batch is a batch


def test_padding_reaches_the_model(model, tmp_path):
    path = tmp_path / "wide.png"
    Image.new("RGB", (90, 30), (200, 30, 60)).save(path)
    question = [Question("wide", "What?", Path(path))]
    plain, _ = answers_of(model, question, choices=("yes", "no"))
    padded, _ = answers_of(model, question, choices=("yes", "no"), pad_square=True)
    assert plain["wide"] != padded["wide"]
    assert isinstance(plain["wide"], Answer)
