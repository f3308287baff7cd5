"""Text generation with an export: settings, stop strings, batches, conversations, and files that were changed."""

from __future__ import annotations

import dataclasses
import re
import shutil

import numpy as np
import pytest
from PIL import Image

import qvlm_export
from qvlm_export.calibrate.errors import UserError
from qvlm_export.engines.manifest import Manifest
from qvlm_export.engines.runtime.session import Sequences
from qvlm_export.inference.model import Chat, Generation, Settings


@pytest.fixture(scope="module")
def model(llava, tmp_path_factory):
    out = tmp_path_factory.mktemp("loading") / "m.plan"
    qvlm_export.export(str(llava(dtype="float32")), out, scheme="fp16", backend="onnx", max_length=256, max_batch=3)
    with qvlm_export.load(out) as loaded:
        yield loaded


def noise(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (60, 80, 3), dtype=np.uint8))


def test_streamed_pieces_join_to_the_answer(model):
    pieces = model.generate("What is this?", [noise()], max_new_tokens=12, stream=True)
    assert iter(pieces) is pieces
    pieces = list(pieces)
    assert len(pieces) > 1
    assert "".join(pieces) == model.generate("What is this?", [noise()], max_new_tokens=12)


def test_keyword_arguments_are_the_fields_of_the_settings(model):
    assert set(Settings.__annotations__) == {field.name for field in dataclasses.fields(Generation)}
    settings = Generation(max_new_tokens=9, temperature=2.0, seed=3)
    answer = model.generate("What?", [], settings)
    assert answer == model.generate("What?", [], max_new_tokens=9, temperature=2.0, seed=3)
    assert model.generate("What?", [], settings, seed=4) != answer
    for ask in (model.generate, model.chat().say, lambda prompt, **changes: model.generate_batch([prompt], **changes)):
        with pytest.raises(UserError, match=r"^max_tokens: is no setting .* there are temperature, .*max_new_tokens, stop"):
            ask("What?", max_tokens=3)
    with pytest.raises(UserError, match=r"^settings: is of type dict; give a Generation"):
        model.generate("What?", [], {"max_new_tokens": 3})


def test_an_answer_ends_after_max_new_tokens(model):
    for count in (1, 5):
        chat = model.chat()
        pieces = chat.say("Say something", max_new_tokens=count)
        before = len(chat._sequences.tokens[0])
        assert chat.ended is None
        list(pieces)
        assert chat.ended == "max_new_tokens"
        assert len(chat._sequences.tokens[0]) == before + count


def test_an_answer_ends_when_the_context_is_full(model):
    chat = model.chat()
    pieces = chat.say("b " * 240, max_new_tokens=10_000)
    assert 236 < len(chat._sequences.tokens[0]) < 256
    "".join(pieces)
    assert len(chat._sequences.tokens[0]) == model.manifest.limits.max_length == 256
    assert chat.ended == "context"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens 0: must be at least 1"),
        ({"max_new_tokens": True}, "max_new_tokens True: must be a whole number"),
        ({"max_new_tokens": 2.0}, "max_new_tokens 2.0: must be a whole number"),
        ({"stop": "END"}, "stop 'END': give a list of texts"),
        ({"stop": [""]}, "stop ['']: give a list of texts, none of them empty"),
        ({"stop": [5]}, "stop [5]: give a list of texts"),
        ({"top_p": 2.0}, "top_p 2.0: must be above 0"),
        ({"seed": -1}, "seed -1: must be at least 0"),
    ],
)
def test_settings_out_of_range_are_refused(model, changes, words):
    with pytest.raises(UserError, match=f"^{re.escape(words)}"):
        model.generate("What?", **changes)


def test_a_prompt_that_cannot_be_taken_is_refused_before_the_first_piece(model):
    for prompt, words in (("<image>", "1 times <image> for 0 pictures"), ("word " * 300, "context would be")):
        with pytest.raises(UserError, match=words):
            model.generate(prompt, stream=True)


def test_a_stop_string_ends_the_answer_before_it(model):
    whole = model.generate("Say something", max_new_tokens=24)
    word = whole.split()[2]
    chat = model.chat()
    stopped = "".join(chat.say("Say something", max_new_tokens=24, stop=["never said", word]))
    assert stopped == whole[: whole.index(word)]
    assert chat.ended == "stop"


def test_a_strong_repetition_penalty_repeats_nothing(model):
    def tokens(penalty: float) -> list[int]:
        chat = model.chat()
        pieces = chat.say("Say something", max_new_tokens=60, repetition_penalty=penalty)
        list(pieces)
        return chat._sequences.tokens[0]

    free, strict = tokens(1.0), tokens(1e6)
    prompt = next(n for n, pair in enumerate(zip(free, strict, strict=False)) if pair[0] != pair[1])
    assert len(set(free[prompt:])) < len(free[prompt:])
    assert len(set(strict[prompt:])) == len(strict[prompt:])
    assert not set(strict[prompt:]) & set(strict[:prompt])


def test_the_order_of_images_in_one_turn_matters(model):
    both = model.generate("What differs?", [noise(), noise(1)], max_new_tokens=16)
    assert both != model.generate("What differs?", [noise(1), noise()], max_new_tokens=16)


def test_a_batch_answers_as_each_prompt_alone(model):
    prompts = ["What is this?", "What differs between those two, if anything does?", "Say something"]
    images = [[noise()], [noise(1), noise(2)], []]
    settings = Generation(max_new_tokens=12)
    alone = [model.generate(prompt, shown, settings) for prompt, shown in zip(prompts, images, strict=True)]
    assert model.generate_batch(prompts, images, settings) == alone
    stop = [alone[0].split()[1]]
    expected = [model.generate(prompt, shown, settings, stop=stop) for prompt, shown in zip(prompts, images, strict=True)]
    assert model.generate_batch(prompts, images, settings, stop=stop) == expected
    assert expected[0] != alone[0]
    assert model.generate_batch(["Say something"] * 2, max_new_tokens=12) == [alone[2]] * 2


def test_a_batch_ends_when_every_row_has_reached_a_stop_string(model, monkeypatch):
    answer, steps = model.generate("Say something", max_new_tokens=24), []
    real = model.session.runner.step
    monkeypatch.setattr(model.session.runner, "step", lambda *arguments: (steps.append(1), real(*arguments))[1])
    model.generate_batch(["Say something"] * 2, max_new_tokens=24, stop=[answer[:2]])
    assert len(steps) < 10


def test_a_batch_that_cannot_be_taken_is_refused(model):
    for prompts, images, words in (
        ([], None, "0 prompts"),
        (["a"] * 4, None, "4 prompts at once, the engine was built for 3"),
        (["a", "b"], [[]], "2 prompts with pictures for 1"),
        (["a", "<image>"], None, "^prompt 2: has 1 times <image> for 0 pictures"),
    ):
        with pytest.raises(UserError, match=words):
            model.generate_batch(prompts, images)


def test_a_second_turn_is_the_same_as_asking_all_at_once(model):
    chat = model.chat()
    "".join(chat.say("What is this?", [noise()], max_new_tokens=6))
    "".join(chat.say("And this?", [noise(1)], max_new_tokens=6))
    sequence = chat._sequences
    pixels = model.processor.image_processor([noise(), noise(1)], return_tensors="np")["pixel_values"]
    whole = model.session.logits(np.array([sequence.tokens[0]])[:, : int(sequence.cached[0])], pixels)
    assert np.linalg.norm(sequence.logits[0] - whole[0, -1]) < 1e-4 * np.linalg.norm(whole[0, -1])
    text = model.processor.tokenizer.decode(sequence.tokens[0])
    assert text.count("<s>") == 1
    assert text.count("USER:") == 2
    assert "</s>USER: " in text


def test_a_second_turn_computes_its_own_tokens_only(model, monkeypatch):
    chat, fed = model.chat(), []
    real = model.session.runner.step
    "".join(chat.say("What is this?", [noise()], max_new_tokens=6))
    monkeypatch.setattr(model.session.runner, "step", lambda ids, *rest: (fed.append(ids.shape), real(ids, *rest))[1])
    "".join(chat.say("And now?", max_new_tokens=3))
    prompt, *decoded = fed
    assert prompt[1] < 15  # the first turn is 36 image tokens and more
    assert decoded == [(1, 1)] * 2


def test_a_turn_beyond_the_context_leaves_the_conversation_usable(model):
    chat = model.chat()
    "".join(chat.say("one", [noise()], max_new_tokens=4))
    with pytest.raises(UserError, match="context would be"):
        chat.say("word " * 300)
    before = len(chat._sequences.tokens[0])
    "".join(chat.say("two", max_new_tokens=4))
    assert len(chat._sequences.tokens[0]) > before
    text = model.processor.tokenizer.decode(chat._sequences.tokens[0])
    assert (text.count("USER:"), "word" in text) == (2, False)


def test_an_interrupted_answer_stays_in_the_history_as_far_as_it_came(model):
    chat = model.chat()
    pieces = chat.say("Say something", max_new_tokens=30)
    received = [next(pieces), next(pieces)]
    pieces.close()
    assert chat.ended is None
    assert chat._turns[-1]["text"] == "".join(received)
    "".join(chat.say("Go on", max_new_tokens=3))
    assert model.processor.tokenizer.decode(chat._sequences.tokens[0]).count("USER:") == 2


def test_sampling_depends_on_the_seed_only(model):
    def answer(seed: int) -> str:
        return model.generate("Say something", max_new_tokens=12, temperature=2.0, seed=seed)

    assert answer(1) == answer(1)
    assert len({answer(seed) for seed in range(6)}) > 1


class Scripted:
    """A fake session that generates fixed tokens, one a step."""

    def __init__(self, tokens: list[int], manifest: Manifest) -> None:
        self._tokens, self.manifest = tokens, manifest

    def start(self, prompts, _pixels, _placement):
        return Sequences([list(prompts[0])], np.array([len(prompts[0])]), None)

    def generate(self, sequences, _limit, _stop_ids, _sampling):
        for token in self._tokens:
            sequences.tokens[0].append(token)
            yield [token]


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        (" the red circle END of it", ["END"], "the red circle "),
        (" the red circle EN", ["END"], "the red circle EN"),
        (" caf\u00e9 \U0001f600!", [], "caf\u00e9 \U0001f600!"),
        (" ab", ["b", "a"], ""),
    ],
)
def test_pieces_contain_no_part_of_a_stop_string_or_character(model, text, stop, expected):
    tokens = model.processor.tokenizer.encode(text, add_special_tokens=False)
    pieces = list(Chat(Scripted(tokens, model.manifest), model.processor).say("?", max_new_tokens=99, stop=stop))
    assert "".join(pieces) == expected
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("suffix", [".onnx", ".onnx.data", ".vision.onnx", ".vision.onnx.data"])
def test_a_tampered_file_of_the_same_size_is_refused(model, tmp_path, suffix):
    folder = tmp_path / "copy"
    shutil.copytree(model.manifest.path.parent, folder)
    path = folder / f"m{suffix}"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"m{re.escape(suffix)}: its sha256 is .* it was changed, export again"):
        qvlm_export.load(folder / "m.plan")


def test_a_tampered_processor_is_refused(model, tmp_path):
    """A changed chat template can be loaded, so that only its hash shows the change."""
    folder = tmp_path / "copy"
    shutil.copytree(model.manifest.path.parent, folder)
    path = folder / "m.processor" / "chat_template.jinja"
    path.write_text(path.read_text().replace("USER", "RUSE"))
    with pytest.raises(UserError, match=r"m\.processor/chat_template\.jinja: its sha256 is .* it was changed, export again"):
        qvlm_export.load(folder / "m.plan")


# What callers may give


def test_pictures_may_be_paths_single_pictures_and_arrays(model, tmp_path):
    noise().save(tmp_path / "a.png")
    expected = model.generate("What is this?", [noise()], max_new_tokens=6)
    pixels = np.asarray(noise())
    for picture in (str(tmp_path / "a.png"), tmp_path / "a.png", noise(), pixels, [pixels]):
        assert model.generate("What is this?", picture, max_new_tokens=6) == expected
        assert "".join(model.chat().say("What is this?", picture, max_new_tokens=6)) == expected
        assert model.generate_batch(["What is this?"], [picture], max_new_tokens=6) == [expected]
    assert model.generate("Say something", None, max_new_tokens=3) == model.generate("Say something", max_new_tokens=3)
    mixed = model.generate_batch(["What is this?", "Say something"], [pixels, None], max_new_tokens=6)
    assert mixed == [expected, model.generate("Say something", max_new_tokens=6)]


def test_what_is_no_prompt_or_picture_is_refused(model):
    for ask, words in (
        (lambda: model.generate("What?", 5), "^picture 1: is of type int"),
        (lambda: model.generate("What?", ["none.png"]), "^picture 1: there is no picture none.png"),
        (lambda: model.generate(5), "^the prompt: is of type int; give a text"),
        (lambda: model.generate(None, stream=True), "^the prompt: is of type NoneType"),
        (lambda: model.generate_batch("What?"), "^prompts and images: give a list of prompts"),
        (lambda: model.generate_batch(["What?"], noise()), "^prompts and images: give a list"),
        (lambda: model.generate_batch(["a", 5]), "^prompt 2: is of type int"),
        (lambda: model.generate_batch(["a", "b"], [None, [noise(), 1.5]]), "^prompt 2: picture 2: is of type float"),
    ):
        with pytest.raises(UserError, match=words):
            ask()


# Held-back text


class Interrupted(Scripted):
    """A fake session that is interrupted after its tokens."""

    def __init__(self, tokens, manifest, error):
        super().__init__(tokens, manifest)
        self._error = error

    def generate(self, *arguments):
        yield from super().generate(*arguments)
        raise self._error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), UserError("the logits are NaN")])
def test_an_interrupted_answer_gives_what_was_held_back(model, error):
    tokens = model.processor.tokenizer.encode("the ring EN", add_special_tokens=False)
    chat = Chat(Interrupted(tokens, model.manifest, error), model.processor)
    received, pieces = [], chat.say("?", stop=["END"])
    with pytest.raises(type(error)):
        received.extend(pieces)  # keeps what came before the error
    assert "".join(received) == chat._turns[-1]["text"] == "the ring EN"
    assert chat.ended is None


def test_an_unknown_option_of_an_export_is_refused(tmp_path):
    with pytest.raises(
        UserError, match=r"^schema: is no option of an export; there are revision, scheme, recipe, calib_data"
    ):
        qvlm_export.export("tiny", tmp_path / "x.plan", schema="int8")
