"""Answers and conversations through the processor."""

from __future__ import annotations

import re
import shutil

import numpy as np
import pytest
from PIL import Image

import qvlm_export
from calibrate.errors import UserError
from engines.sampling import Sampling
from engines.session import Sequences
from qvlm_export.loading import Chat, _cut, _held


@pytest.fixture(scope="module")
def model(llava, tmp_path_factory):
    out = tmp_path_factory.mktemp("loading") / "m.plan"
    qvlm_export.export(str(llava(dtype="float32")), out, scheme="fp16", backend="onnx", max_length=256)
    with qvlm_export.load(out) as loaded:
        yield loaded


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (60, 80, 3), dtype=np.uint8))


def test_pieces_join_to_the_answer(model):
    assert "".join(model.stream("What is this?", [picture()], 12)) == model.generate("What is this?", [picture()], 12)


def test_a_second_turn_is_the_same_as_asking_all_at_once(model):
    chat = model.chat()
    "".join(chat.say("What is this?", [picture()], 6))
    "".join(chat.say("And this?", [picture(1)], 6))
    sequence = chat._sequences
    pixels = model.processor.image_processor([picture(), picture(1)], return_tensors="np")["pixel_values"]
    whole = model.session.logits(np.array([sequence.tokens[0]])[:, : int(sequence.cached[0])], pixels)
    assert np.linalg.norm(sequence.logits[0] - whole[0, -1]) < 1e-4 * np.linalg.norm(whole[0, -1])
    text = model.processor.tokenizer.decode(sequence.tokens[0])
    assert text.count("<s>") == 1
    assert text.count("USER:") == 2
    assert "</s>USER: " in text


def test_overflow_in_a_chat_leaves_the_conversation_usable(model):
    chat = model.chat()
    "".join(chat.say("one", [picture()], 4))
    with pytest.raises(UserError, match="context would be"):
        "".join(chat.say("word " * 300, [], 4))
    before = len(chat._sequences.tokens[0])
    "".join(chat.say("two", [], 4))
    assert len(chat._sequences.tokens[0]) > before


def test_sampling_is_seeded(model):
    def answer(seed: int) -> str:
        return model.generate("Say something", [], 12, Sampling(temperature=2.0, seed=seed))

    assert answer(1) == answer(1)
    assert len({answer(seed) for seed in range(6)}) > 1


class Scripted:
    """A session that says a given text, one token a step."""

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = tokens

    def start(self, prompts, _pixels):
        return Sequences([list(prompts[0])], np.array([len(prompts[0])]), None)

    def generate(self, sequences, _limit, _stop_ids, _sampling):
        for token in self._tokens:
            sequences.tokens[0].append(token)
            yield [token]


@pytest.mark.parametrize(
    ("said", "stop", "wanted"),
    [
        (" the red circle END of it", ["END"], "the red circle "),
        (" the red circle EN", ["END"], "the red circle EN"),
        (" caf\u00e9 \U0001f600!", [], "caf\u00e9 \U0001f600!"),
        (" ab", ["", "b", "a"], ""),
    ],
)
def test_pieces_never_show_a_stop_string_or_half_a_character(model, said, stop, wanted):
    tokens = model.processor.tokenizer.encode(said, add_special_tokens=False)
    pieces = list(Chat(Scripted(tokens), model.processor).say("?", [], 99, None, stop))
    assert "".join(pieces) == wanted
    assert not any("\ufffd" in piece for piece in pieces)


def test_held_back_text_is_at_most_a_stop_strings_beginning():
    assert _held("an answer EN", ("END",)) == 2
    assert _held("an answer", ("END",)) == 0
    assert _cut("a END b", ("END", "b")) == ("a ", True)
    assert _cut("a", ("",)) == ("a", False)


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
