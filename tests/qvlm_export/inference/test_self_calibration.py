"""The float model writes its own calibration set: seeded, in parts, and as `--calib-data` reads it."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qvlm_export.calibrate.checkpoint.samples import Sample
from qvlm_export.checkpoints.checkpoint import Checkpoint, open_checkpoint
from qvlm_export.inference import self_calibration
from qvlm_export.inference.model import LoadedModel
from qvlm_export.inference.self_calibration import (
    ABOUT_ANYTHING,
    FILE,
    KINDS,
    Draft,
    join_parts,
    plan_drafts,
    repeats_itself,
    stand_ins,
    write_own_set,
)
from qvlm_export.inference.torch_session import open_float_session
from qvlm_export.inputs.samples import (
    check_processor,
    default_calibration,
    encode_entries,
    load_processor,
    read_entries,
)

COUNT, LENGTH = 20, 128
PICTURES = read_entries(default_calibration(), None, 64)
Open = Callable[[], LoadedModel]


@pytest.fixture(scope="module", autouse=True)
def small_batches() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(self_calibration, "BATCH", 16)
        yield


@pytest.fixture(scope="module")
def checkpoint(llava: Callable[..., Path]) -> Checkpoint:
    return open_checkpoint(str(llava()))


@pytest.fixture(scope="module")
def drafts() -> list[Draft]:
    """All kinds of conversations, but short ones."""
    planned = plan_drafts(COUNT, PICTURES)
    limits = [(min(draft.kind.prompt_tokens, 6), min(draft.kind.answer_tokens, 9)) for draft in planned]
    kinds = [replace(d.kind, prompt_tokens=p, answer_tokens=a) for d, (p, a) in zip(planned, limits, strict=True)]
    return [replace(draft, kind=kind) for draft, kind in zip(planned, kinds, strict=True)]


@pytest.fixture(scope="module")
def open_model(checkpoint: Checkpoint) -> Open:
    processor = load_processor(checkpoint.folder)
    check_processor(processor, checkpoint.config, checkpoint.folder)
    return lambda: LoadedModel(open_float_session(checkpoint, "cpu", 16), processor)


def write(open_model: Open, checkpoint: Checkpoint, drafts: list[Draft], folder: Path, length: int = LENGTH) -> list[Sample]:
    """Writes the set into `folder`; returns its samples."""
    entries = write_own_set(open_model, checkpoint.config, drafts, folder, length=length, progress=lambda _: None)
    assert len(entries) == len(drafts)
    return encode_entries(entries, load_processor(checkpoint.folder), checkpoint.config, length)


@pytest.fixture(scope="module")
def written(
    open_model: Open, checkpoint: Checkpoint, drafts: list[Draft], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Sample]]:
    """The folder of a set, and its samples."""
    folder = tmp_path_factory.mktemp("set") / "written"
    return folder, write(open_model, checkpoint, drafts, folder)


def parts_of(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.jsonl"))}


def test_a_whole_set_has_every_kind_in_its_share() -> None:
    assert sum(kind.share for kind in KINDS) == 64
    assert Counter(draft.kind for draft in plan_drafts(64, PICTURES)) == {kind: kind.share for kind in KINDS}
    for count in (1, 7, 32, 128):
        drafts = plan_drafts(count, PICTURES)
        assert len(drafts) == count
        assert drafts[0].picture is not None
        assert all((draft.picture is not None) == draft.kind.pictures for draft in drafts)
    pictures = [draft.picture.image for draft in plan_drafts(64, PICTURES) if draft.picture is not None]
    assert len(set(pictures)) == len(pictures)


def test_the_same_seed_writes_the_same_texts_and_what_is_there_is_kept(
    open_model: Open, checkpoint: Checkpoint, drafts: list[Draft], written: tuple[Path, list[Sample]], tmp_path: Path
) -> None:
    parts = parts_of(written[0])
    assert list(parts) == ["000.jsonl", "001.jsonl"]
    answers = [json.loads(line).get("answer") for part in parts.values() for line in part.splitlines()]
    assert len(set(answers)) > COUNT / 2  # each text is sampled with numbers of its own
    write(open_model, checkpoint, drafts, tmp_path)
    assert parts_of(tmp_path) == parts
    (tmp_path / "001.jsonl").unlink()
    (tmp_path / "000.jsonl").write_text(parts["000.jsonl"].replace("Name the color of the triangle.", "kept"))
    write(open_model, checkpoint, drafts, tmp_path)
    assert parts_of(tmp_path)["001.jsonl"] == parts["001.jsonl"]
    assert "kept" in parts_of(tmp_path)["000.jsonl"]

    def refuse() -> LoadedModel:
        raise AssertionError("there is nothing to write")

    write(refuse, checkpoint, drafts, tmp_path)


def test_a_joined_set_is_read_back_as_the_same_samples(
    checkpoint: Checkpoint, written: tuple[Path, list[Sample]], tmp_path: Path
) -> None:
    folder, samples = written
    path = join_parts(folder, tmp_path / "joined")
    assert path == tmp_path / "joined" / FILE
    (tmp_path / "joined").rename(tmp_path / "moved")
    again = read_entries(tmp_path / "moved" / FILE, None, 99)
    read = encode_entries(again, load_processor(checkpoint.folder), checkpoint.config, LENGTH)
    assert len(read) == COUNT
    for one, other in zip(samples, read, strict=True):
        np.testing.assert_array_equal(one.input_ids, other.input_ids)
        np.testing.assert_array_equal(one.pixel_values, other.pixel_values)
        assert one.answer_start == other.answer_start
    assert not list((tmp_path / "moved").glob("0*.jsonl"))


def test_a_word_of_the_vocabulary_begins_some_prompts(
    checkpoint: Checkpoint, drafts: list[Draft], written: tuple[Path, list[Sample]]
) -> None:
    lines = [json.loads(line) for part in parts_of(written[0]).values() for line in part.splitlines()]
    prompts = [line["prompt"] for line, draft in zip(lines, drafts, strict=True) if draft.kind.random_word]
    assert len(prompts) > 3
    vocabulary = load_processor(checkpoint.folder).tokenizer.get_vocab()
    words = {token[1:] for token in vocabulary if token.startswith("\u0120") and len(token) > 3 and token[1:].isalpha()}
    assert all(any(prompt.startswith(word) for word in words) for prompt in prompts)
    assert len(set(prompts)) == len(prompts)


def test_stand_ins_are_as_long_as_what_is_written(
    checkpoint: Checkpoint, drafts: list[Draft], written: tuple[Path, list[Sample]]
) -> None:
    planned = stand_ins(drafts, LENGTH, checkpoint.config.most_image_tokens)
    assert [entry.line.image for entry in planned] == [draft.picture and draft.picture.line.image for draft in drafts]
    lengths = [len(sample.input_ids) for sample in written[1]]
    processor = load_processor(checkpoint.folder)
    expected = [len(sample.input_ids) for sample in encode_entries(planned, processor, checkpoint.config, LENGTH)]
    assert 0.5 < sum(lengths) / sum(expected) < 2  # a random model's texts are encoded in more tokens than it wrote


@pytest.mark.parametrize("length", [100, 256, 2048])
def test_stand_ins_are_no_longer_than_the_engine_takes(checkpoint: Checkpoint, length: int) -> None:
    planned = stand_ins(plan_drafts(64, PICTURES), length, checkpoint.config.most_image_tokens)
    samples = encode_entries(planned, load_processor(checkpoint.folder), checkpoint.config, length)
    assert max(len(sample.input_ids) for sample in samples) > min(length, 500) / 2


class Script:
    """Makes a model say what a test wants: the text for a prompt and, if it is another one, for an answer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, model: LoadedModel, prompt: str, answer: str) -> None:
        self._texts = iter([prompt, answer])
        self._tokenizer = model.processor.tokenizer
        monkeypatch.setattr(model.session, "generate", self.generate)

    def generate(self, sequences: object, *_: object) -> Iterator[list[int | None]]:
        pieces = re.split("(image)", next(self._texts))  # not the image token, but its letters
        ids = [token for piece in pieces for token in self._tokenizer(piece, add_special_tokens=False)["input_ids"]]
        for tokens in sequences.tokens:  # type: ignore[attr-defined]
            tokens.extend(ids)
        yield []


@pytest.mark.parametrize(
    ("said", "line"),
    [
        (("Hm? ASSISTANT: I am.", "Yes. ASSISTANT: No."), {"prompt": "Hm?", "answer": "Yes."}),
        (("  Hm?\n", "A <image> of it"), {"prompt": "Hm?", "answer": "A"}),
        (("", "Yes."), {"prompt": ABOUT_ANYTHING[0], "answer": "Yes."}),
        (("<image>", ""), {"prompt": ABOUT_ANYTHING[0]}),
    ],
)
def test_a_text_ends_where_the_template_goes_on(
    open_model: Open, checkpoint: Checkpoint, tmp_path: Path, said: tuple[str, str], line: dict[str, str]
) -> None:
    """The model of this test has the template `USER: … ASSISTANT:`. What comes out must be read as one turn."""
    model, drafts = open_model(), plan_drafts(64, PICTURES)
    draft = replace(next(d for d in drafts if d.picture is None and d.prompt is None), spare=ABOUT_ANYTHING[0])
    with pytest.MonkeyPatch.context() as patched:
        Script(patched, model, *said)
        write(lambda: model, checkpoint, [draft], tmp_path)
    assert json.loads((tmp_path / "000.jsonl").read_text()) == line


@pytest.mark.parametrize("said", [("Hm?", "Which color? " * 30), ("Which color? " * 30, "Yes.")])
def test_no_sample_is_longer_than_the_engine_takes(
    open_model: Open, checkpoint: Checkpoint, tmp_path: Path, said: tuple[str, str]
) -> None:
    """Prompt and answer may have more tokens as one text than the model wrote. Those beyond the engine's are left out."""
    model = open_model()
    draft = next(d for d in plan_drafts(64, PICTURES) if d.picture is None and d.prompt is None)
    with pytest.MonkeyPatch.context() as patched:
        Script(patched, model, *said)
        (sample,) = write(lambda: model, checkpoint, [draft], tmp_path, length=40)  # which refuses a longer one
    assert len(sample.input_ids) > 20


LOOPS, PROSE = ("the same " * 20, "a b c " * 20), ("word " * 8, " ".join(map(str, range(40))), "")


@pytest.mark.parametrize(("text", "loops"), [*((text, True) for text in LOOPS), *((text, False) for text in PROSE)])
def test_texts_that_repeat_themselves_are_known(text: str, loops: bool) -> None:
    assert repeats_itself(text) == loops
