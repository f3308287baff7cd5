"""Processors: the one that is checked is the one that is shipped, incomplete ones are completed, and code is never run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import ASK, PICTURE, assert_refused, copy_checkpoint, export_onnx, export_to, run_model
from PIL import Image
from transformers import LlavaProcessor

import qvlm_export
from qvlm_export.calibrate.errors import UserError
from qvlm_export.checkpoints.chat_templates import chat_text
from qvlm_export.checkpoints.checkpoint import open_checkpoint
from qvlm_export.inputs.processors import choose_chat_template
from qvlm_export.inputs.samples import check_processor, check_saved_processor, encode_prompt, load_processor
from tools.tiny import model as tiny_model

Llava = Callable[..., Path]
QUESTION = [{"role": "user", "text": "What is it?", "images": 1}]
CHAT = [*QUESTION, {"role": "assistant", "text": "A ring."}, {"role": "user", "text": "Sure?"}]

# As LLaMA-Factory writes it into the tokenizer: every content is a text.
FOR_TEXTS = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set loop_messages = messages %}{% set system = 'A chat.' %}{% endif %}{{ system }}"
    "{% for message in loop_messages %}{% set content = message['content'] %}"
    "{% if message['role'] == 'user' %}{{ 'USER: ' + content + ' ASSISTANT:' }}"
    "{% elif message['role'] == 'assistant' %}{{ content + '</s>' }}{% endif %}{% endfor %}"
)


@pytest.fixture
def checkpoint(llava: Llava, tmp_path: Path) -> Path:
    return copy_checkpoint(llava(), tmp_path / "checkpoint")


def edit_json(path: Path, **changes: object) -> None:
    """Sets keys of a JSON file; a value of ... removes its key."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def move_template(folder: Path, template: object, file: str | None = None) -> None:
    """Removes the processor's template, and gives the tokenizer, or a file, another one."""
    (folder / "chat_template.jinja").unlink()
    if file is not None:
        (folder / file).write_text(str(template))
    elif template is not None:
        edit_json(folder / "tokenizer_config.json", chat_template=template)


# Chat templates

NAMED = [{"name": "default", "template": tiny_model.CHAT_TEMPLATE}, {"name": "tools", "template": "x"}]
PLACES = [
    (tiny_model.CHAT_TEMPLATE, None, "USER: <image>\nWhat is it? ASSISTANT:"),
    (
        [{"name": "default", "template": tiny_model.CHAT_TEMPLATE}, {"name": "tools", "template": "x"}],
        None,
        "USER: <image>\nWhat",
    ),
    (FOR_TEXTS, None, "A chat.USER: <image>\nWhat is it? ASSISTANT:"),
    (FOR_TEXTS, "chat_template.jinja", "A chat.USER: <image>\nWhat is it? ASSISTANT:"),
    (json.dumps({"chat_template": FOR_TEXTS}), "chat_template.json", "A chat.USER: <image>\nWhat is it? ASSISTANT:"),
    ("\n" + FOR_TEXTS, None, "\nA chat.USER: <image>\nWhat"),
    (None, None, "USER: <image>\nWhat is it? ASSISTANT:"),
]


@pytest.mark.parametrize(("template", "file", "expected"), PLACES)
def test_the_shipped_processor_writes_the_prompts_that_were_checked(
    checkpoint: Path, tmp_path: Path, template: object, file: str | None, expected: str
) -> None:
    move_template(checkpoint, template, file)
    out = tmp_path / "out" / "x.plan"
    export_to(checkpoint, out, "--backend", "onnx", "--scheme", "fp16", "--max-length", "128")
    checked, shipped = load_processor(checkpoint), load_processor(out.with_suffix(".processor"))
    assert chat_text(checked, QUESTION).startswith(expected)
    for turns in (QUESTION, CHAT, [{"role": "user", "text": "Hello"}]):
        assert chat_text(shipped, turns) == chat_text(checked, turns)
    result = run_model(out, *ASK)
    assert (result.exit_code, result.exception) == (0, None)
    with qvlm_export.load(out) as model:
        chat = model.chat()
        for text, pictures in (("What is it?", PICTURE), ("Sure?", None)):
            "".join(chat.say(text, pictures, max_new_tokens=3))
        assert model.processor.tokenizer.decode(chat._sequences.tokens[0]).count("USER:") == 2


def test_a_template_for_texts_gives_its_own_prompt_to_texts(checkpoint: Path) -> None:
    """With the pictures taken out, the tokenizer's own template writes the same; transformers gives its processor none."""
    move_template(checkpoint, FOR_TEXTS)
    assert LlavaProcessor.from_pretrained(checkpoint).chat_template is None
    processor = load_processor(checkpoint)
    messages = [{"role": turn["role"], "content": turn["text"]} for turn in CHAT]
    expected = processor.tokenizer.apply_chat_template(messages, chat_template=FOR_TEXTS, tokenize=False)
    assert chat_text(processor, CHAT).replace("<image>\n", "") == expected
    twice = chat_text(processor, [{"role": "user", "text": "What differs?", "images": 2}])
    assert twice == "A chat.USER: <image>\n<image>\nWhat differs? ASSISTANT:"


@pytest.mark.parametrize(
    ("own", "tokenizers", "words"),
    [
        ("Hello", None, "does not place <image>"),
        (None, "{{ messages[0]['role'] }}", "does not place <image>"),
        (None, "{{ a.b.c }}", "'a' is undefined"),
        (None, "{{ raise_exception('no user turns') }}", "no user turns"),
        ("{% for %}", "Hello", "its processor fails"),
        (tiny_model.CHAT_TEMPLATE.replace("<image>", "<image><image>"), None, "does not place <image>"),
    ],
)
def test_templates_that_place_no_images_are_refused(
    checkpoint: Path, absent: Path, own: str | None, tokenizers: str | None, words: str
) -> None:
    move_template(checkpoint, tokenizers)
    if own is not None:
        edit_json(checkpoint / "processor_config.json", chat_template=own)
    assert_refused(export_onnx(checkpoint, absent, "--scheme", "fp16"), str(checkpoint), words)


def test_a_template_of_the_processor_that_places_images_is_left_as_it_is(checkpoint: Path) -> None:
    edit_json(checkpoint / "tokenizer_config.json", chat_template="{{ messages[0].content }}")
    processor = load_processor(checkpoint)
    assert processor.chat_template == processor.tokenizer.chat_template == tiny_model.CHAT_TEMPLATE
    choose_chat_template(processor)
    assert processor.chat_template == tiny_model.CHAT_TEMPLATE


def test_a_processor_that_changes_when_it_is_saved_is_refused(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = open_checkpoint(str(checkpoint)).config
    for change in (
        lambda processor: setattr(processor, "chat_template", tiny_model.CHAT_TEMPLATE.replace("USER", "HUMAN")),
        lambda processor: setattr(processor.image_processor, "image_mean", [0.5, 0.5, 0.5]),
        lambda processor: processor.tokenizer.add_tokens(["What is it"]),
    ):
        processor = load_processor(checkpoint)
        check_saved_processor(processor, config, checkpoint)
        saved = load_processor(checkpoint)
        change(saved)
        monkeypatch.setattr(processor, "save_pretrained", saved.save_pretrained)
        with pytest.raises(UserError, match=f"^{checkpoint}: its processor gives other prompts once"):
            check_saved_processor(processor, config, checkpoint)


# Tokens of an image


@pytest.mark.parametrize(
    "changes",
    [
        {"patch_size": None},
        {"patch_size": ...},
        {"vision_feature_select_strategy": ...},
        {"num_additional_image_tokens": ...},
        {"patch_size": ..., "vision_feature_select_strategy": ..., "num_additional_image_tokens": ...},
        {"patch_size": None, "vision_feature_select_strategy": None, "num_additional_image_tokens": 0},
        {"vision_feature_select_strategy": ..., "num_additional_image_tokens": ...},
    ],
)
@pytest.mark.parametrize("strategy", ["default", "full"])
def test_an_incomplete_processor_is_completed_by_the_config(
    llava: Llava, tmp_path: Path, strategy: str, changes: dict[str, Any]
) -> None:
    folder = copy_checkpoint(llava(vision_feature_select_strategy=strategy), tmp_path / "checkpoint")
    edit_json(folder / "processor_config.json", **{"vision_feature_select_strategy": strategy, **changes})
    out = tmp_path / "out" / "x.plan"
    export_to(folder, out, "--backend", "onnx", "--scheme", "fp16", "--max-length", "128")
    shipped = LlavaProcessor.from_pretrained(out.with_suffix(".processor"))
    assert (shipped.patch_size, shipped.num_additional_image_tokens) == (8, 1)
    assert shipped.vision_feature_select_strategy == strategy
    ids = shipped(images=Image.open(PICTURE), text="<image>", return_tensors="np")["input_ids"]
    assert int((ids == 4).sum()) == 36 + (strategy == "full")


def test_a_processor_that_counts_right_is_left_as_it_is(checkpoint: Path) -> None:
    edit_json(checkpoint / "processor_config.json", vision_feature_select_strategy="full", num_additional_image_tokens=0)
    processor = load_processor(checkpoint)
    check_processor(processor, open_checkpoint(str(checkpoint)).config, checkpoint)
    assert (processor.vision_feature_select_strategy, processor.num_additional_image_tokens) == ("full", 0)


@pytest.mark.parametrize("changes", [{"patch_size": 16}, {"patch_size": 0}, {"num_additional_image_tokens": 2}])
def test_a_processor_that_contradicts_the_config_is_refused(checkpoint: Path, absent: Path, changes: dict[str, Any]) -> None:
    edit_json(checkpoint / "processor_config.json", **changes)
    assert_refused(export_onnx(checkpoint, absent, "--scheme", "fp16"), str(checkpoint), "its processor")


# Code of a checkpoint


def plant_code(folder: Path, file: str, key: str, kind: str | None) -> Path:
    """Writes code that would make a file, and names it in `file`; returns the path of the file that it would make."""
    made = folder.parent / "code-was-run"
    (folder / "own.py").write_text(f"open({str(made)!r}, 'w').close()\nclass Own: pass\n")
    content = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    content["auto_map"] = {key: ["own.Own", "own.Own"] if key == "AutoTokenizer" else "own.Own"}
    if kind is not None:
        content[kind] = "Own"
    (folder / file).write_text(json.dumps(content))
    return made


NEEDED = [
    ("processor_config.json", "AutoProcessor", "processor_class"),
    ("tokenizer_config.json", "AutoTokenizer", "tokenizer_class"),
]
NOT_NEEDED = [
    ("processor_config.json", "AutoProcessor", None),
    ("tokenizer_config.json", "AutoTokenizer", None),
    ("preprocessor_config.json", "AutoImageProcessor", "image_processor_type"),  # processor_config.json has one
    ("config.json", "AutoConfig", None),
    ("config.json", "AutoProcessor", None),
]


@pytest.mark.parametrize(("file", "key", "kind"), [*NEEDED, *NOT_NEEDED])
def test_code_of_a_checkpoint_is_neither_run_nor_asked_about(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, file: str, key: str, kind: str | None
) -> None:
    """Where transformers has a class of its own, that is used; otherwise the file is named."""
    made = plant_code(checkpoint, file, key, kind)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    if (file, key, kind) in NEEDED:
        with pytest.raises(UserError, match=rf"\({file}: auto_map .*own\.Own.*\), which is never run; give a processor"):
            load_processor(checkpoint)
    else:
        config = open_checkpoint(str(checkpoint)).config
        check_processor(load_processor(checkpoint), config, checkpoint)
    assert not made.exists()


def test_an_image_processor_that_needs_code_is_refused(checkpoint: Path, absent: Path) -> None:
    """As older checkpoints have it, in a file of its own."""
    made = plant_code(checkpoint, "preprocessor_config.json", "AutoImageProcessor", "image_processor_type")
    edit_json(checkpoint / "processor_config.json", image_processor=...)
    refused = export_onnx(checkpoint, absent, "--scheme", "fp16")
    assert_refused(refused, str(checkpoint), "(preprocessor_config.json: auto_map", "own.Own", "which is never run")
    assert not made.exists()


def test_code_in_the_authors_layout_is_not_run_either(llava: Llava, tmp_path: Path) -> None:
    folder = copy_checkpoint(llava(), tmp_path / "checkpoint")
    made = plant_code(folder, "tokenizer_config.json", "AutoTokenizer", "tokenizer_class")
    edit_json(folder / "config.json", mm_vision_tower="openai/clip-vit-large-patch14-336", vocab_size=300)
    with pytest.raises(UserError):
        load_processor(folder)
    assert not made.exists()


# Files


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "generation_config.json",
        "processor_config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "vocab.txt",
    ],
)
def test_pipes_among_the_files_are_refused(checkpoint: Path, absent: Path, name: str) -> None:
    """Opening one would wait for ever."""
    (checkpoint / name).unlink(missing_ok=True)
    os.mkfifo(checkpoint / name)
    assert_refused(export_onnx(checkpoint, absent, "--scheme", "fp16"), f"{checkpoint / name}: is a pipe")


def test_prompts_and_pixels_of_a_saved_processor_are_the_same(checkpoint: Path, tmp_path: Path) -> None:
    config, processor = open_checkpoint(str(checkpoint)).config, load_processor(checkpoint)
    processor.save_pretrained(tmp_path / "saved")
    saved, picture = load_processor(tmp_path / "saved"), Image.open(PICTURE).convert("RGB")
    one, other = (encode_prompt(p, config, chat_text(p, QUESTION), [picture]) for p in (processor, saved))
    np.testing.assert_array_equal(one.input_ids, other.input_ids)
    np.testing.assert_array_equal(one.pixel_values, other.pixel_values)
