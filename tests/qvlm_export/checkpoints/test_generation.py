"""End tokens: those that `generate` of transformers stops at, refused by key when they are no ids, kept with exports."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import assert_refused, copy_checkpoint, export_onnx, export_to
from transformers import LlavaForConditionalGeneration

import qvlm_export
from qvlm_export.calibrate.errors import UserError
from qvlm_export.checkpoints.generation import read_end_tokens
from qvlm_export.evaluation.ask import AskSettings, ask_all
from qvlm_export.evaluation.eval_model import find_eval_model, open_eval_model
from qvlm_export.evaluation.tasks.task import Answer, Question
from qvlm_export.inference.model import Chat
from qvlm_export.inputs.samples import load_processor

Llava = Callable[..., Path]
ABSENT = object()
QUESTION = "Say something"


def write_end_tokens(folder: Path, generation: object, top: object = ABSENT, text: object = ABSENT) -> Path:
    """Sets eos_token_id in generation_config.json (ABSENT: no such file), at the top of config.json and in text_config."""
    config = json.loads((folder / "config.json").read_text())
    for section, value in ((config, top), (config["text_config"], text)):
        section.pop("eos_token_id", None)
        if value is not ABSENT:
            section["eos_token_id"] = value
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").unlink(missing_ok=True)
    if generation is not ABSENT:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation, "max_new_tokens": 24}))
    return folder


def transformers_end_tokens(folder: Path) -> list[int]:
    value = LlavaForConditionalGeneration.from_pretrained(folder).generation_config.eos_token_id
    return value if isinstance(value, list) else [] if value is None else [value]


@pytest.fixture
def checkpoint(llava: Llava, tmp_path: Path) -> Path:
    return copy_checkpoint(llava(dtype="float32"), tmp_path / "checkpoint")


@pytest.mark.parametrize(
    ("generation", "top", "text"),
    [
        (7, ABSENT, 2),
        ([7, 8], 9, 2),
        ([7, 7], ABSENT, ABSENT),
        (ABSENT, ABSENT, 11),
        (ABSENT, ABSENT, [11, 12]),
        (ABSENT, 9, 11),
        (ABSENT, None, 11),
        (ABSENT, [9, 10], [11, 12]),
        (ABSENT, ABSENT, ABSENT),
        (ABSENT, None, None),
    ],
)
def test_the_end_tokens_are_those_of_transformers(checkpoint: Path, generation: object, top: object, text: object) -> None:
    write_end_tokens(checkpoint, generation, top, text)
    assert list(read_end_tokens(checkpoint, 512)) == list(dict.fromkeys(transformers_end_tokens(checkpoint)))


@pytest.mark.parametrize("generation", [None, []])
def test_where_generation_config_names_none_the_config_does(checkpoint: Path, generation: object) -> None:
    """transformers would never end an answer then."""
    write_end_tokens(checkpoint, generation, ABSENT, 11)
    assert transformers_end_tokens(checkpoint) == []
    assert read_end_tokens(checkpoint, 512) == (11,)


BAD = [-1, 512, True, "2", 2.0, [2, -1], [2, None], [[2]], {"a": 2}, 10**30]


@pytest.mark.parametrize("value", BAD)
def test_what_is_no_token_id_is_refused_by_its_key(checkpoint: Path, value: object) -> None:
    for arguments, where in (
        ((value, ABSENT, 2), "generation_config.json: eos_token_id"),
        ((ABSENT, value, 2), "config.json: eos_token_id"),
        ((ABSENT, ABSENT, value), "config.json: text_config.eos_token_id"),
    ):
        write_end_tokens(checkpoint, *arguments)
        with pytest.raises(UserError, match=f"/{re.escape(where)} is .*; give a token id, or a list of them, from 0 to 511"):
            read_end_tokens(checkpoint, 512)


def test_a_bad_end_token_is_refused_before_work(checkpoint: Path, absent: Path) -> None:
    write_end_tokens(checkpoint, [2, 600])
    assert_refused(export_onnx(checkpoint, absent, "--scheme", "fp16"), "generation_config.json: eos_token_id is [2, 600]")
    (checkpoint / "generation_config.json").write_text("{")
    assert_refused(export_onnx(checkpoint, absent, "--scheme", "fp16"), "generation_config.json", "download it again")


@pytest.fixture(scope="module")
def ended(llava: Llava, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Any]:
    """A checkpoint of which a token that it does say, but that its tokenizer does not name, ends answers; its export; and
    the answer of transformers, without the prompt."""
    folder = tmp_path_factory.mktemp("ended")
    checkpoint = copy_checkpoint(llava(dtype="float32"), folder / "checkpoint")
    write_end_tokens(checkpoint, ABSENT, ABSENT, 2)
    free = generate(checkpoint, 24)
    end = next(token for token in free[3:] if free.index(token) >= 3)
    write_end_tokens(checkpoint, [3, end], ABSENT, 2)
    export_to(checkpoint, folder / "x.plan", "--backend", "onnx", "--scheme", "int8", "--effort", "rtn", "--max-batch", "2")
    export_to(checkpoint, folder / "f.plan", "--backend", "onnx", "--scheme", "fp16", "--max-batch", "2")
    answer = generate(checkpoint, 24)
    assert answer == free[: free.index(end) + 1]
    return checkpoint, folder, answer


def generate(checkpoint: Path, count: int) -> list[int]:
    """The new tokens of transformers' greedy `generate`."""
    processor = load_processor(checkpoint)
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint)
    ids = processor.tokenizer(f"USER: {QUESTION} ASSISTANT:", return_tensors="pt")
    with torch.no_grad():
        return model.generate(**ids, max_new_tokens=count, do_sample=False)[0, ids["input_ids"].shape[1] :].tolist()


def test_every_form_ends_where_transformers_ends(ended: tuple[Path, Path, Any]) -> None:
    checkpoint, folder, answer = ended
    for source, form in ((checkpoint, "float"), (folder / "f.plan", "graph"), (folder / "f.plan", "float")):
        with open_eval_model(find_eval_model(str(source), form)) as model:
            assert model.end_tokens == {3, answer[-1]}
            expected = model.processor.tokenizer.decode(answer[:-1], skip_special_tokens=True).lstrip()
            chat = model.chat()
            assert "".join(chat.say(QUESTION, max_new_tokens=24)) == expected
            assert chat.ended == "stop"
            assert model.generate_batch([QUESTION, QUESTION], max_new_tokens=24) == [expected] * 2
            (evaluated,) = ask_all(model, [Question("1", QUESTION, None)], AskSettings(24))
            assert evaluated == {"1": Answer(expected.strip())}


def test_calibrated_checkpoints_keep_the_end_tokens(ended: tuple[Path, Path, Any]) -> None:
    _, folder, answer = ended
    for source in (folder / "x.plan", folder / "x.calibrated"):
        with open_eval_model(find_eval_model(str(source), "fake-quant")) as model:
            assert model.end_tokens == {3, answer[-1]}
    assert transformers_end_tokens(folder / "x.calibrated") == [3, answer[-1]]


def test_an_export_that_records_none_ends_with_the_tokenizers(ended: tuple[Path, Path, Any]) -> None:
    _, folder, _ = ended
    with qvlm_export.load(folder / "f.plan") as model:
        object.__setattr__(model.manifest, "generation", {})
        assert model.end_tokens == {model.processor.tokenizer.eos_token_id}
        assert isinstance(model.chat(), Chat)
