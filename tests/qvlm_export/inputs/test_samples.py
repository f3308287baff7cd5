"""Calibration samples: reading the JSONL, chat text, tokens and pixels, answers, and checks of the processor."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import PICTURE, Edit, assert_refused, copy_checkpoint, export_onnx, put, run_export
from PIL import Image
from random_llava import processor
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from qvlm_export.calibrate.checkpoint.samples import Sample
from qvlm_export.calibrate.errors import UserError
from qvlm_export.checkpoints.chat_templates import FALLBACK_TEMPLATE, chat_text
from qvlm_export.checkpoints.checkpoint import open_checkpoint
from qvlm_export.engines.config import ModelConfig
from qvlm_export.inputs.samples import (
    Entry,
    check_processor,
    default_calibration,
    encode,
    encode_entries,
    encode_prompt,
    load_processor,
    read_entries,
)
from tools.tiny import model, scenes

Llava = Callable[..., Path]
IMAGE, BOS, EOS = 4, 1, 2
QUESTION = [{"role": "user", "text": "What is it?", "images": 1}]


@pytest.fixture
def checkpoint(llava: Llava, tmp_path: Path) -> Path:
    """A copy of a good checkpoint, which a test may damage."""
    return copy_checkpoint(llava(), tmp_path / "checkpoint")


def with_template(template: str | None) -> Any:
    """The tiny processor with another chat template, or none."""
    changed = model.make_processor(processor().tokenizer)
    changed.chat_template = template
    return changed


def red() -> Image.Image:
    return Image.new("RGB", (60, 40), (220, 40, 40))


def write_lines(path: Path, *lines: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


def samples_of(llava: Llava, path: Path, used_processor: Any = None) -> list[Sample]:
    """The samples of a JSONL file, encoded with `used_processor` or that of the random model."""
    return encode_entries(read_entries(path, None, 99), used_processor or processor(), model_config(llava), 512)


def model_config(llava: Llava) -> ModelConfig:
    return open_checkpoint(str(llava())).config


# Which lines are read


def prompts(entries: list[Entry]) -> list[str]:
    return [entry.line.prompt for entry in entries]


def test_lines_are_taken_from_the_beginning(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", *({"prompt": str(n)} for n in range(5)))
    assert prompts(read_entries(path, None, 3)) == ["0", "1", "2"]
    assert prompts(read_entries(path, None, 9)) == ["0", "1", "2", "3", "4"]
    assert prompts(read_entries(path, 4, 3)) == ["0", "1", "2", "3"]
    with pytest.raises(UserError, match=r"--samples 6: .* holds only 5; ask for fewer or add lines"):
        read_entries(path, 6, 3)


def test_entries_know_their_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\n{"prompt": "a", "image": "b.png"}\r\n   \n{"prompt": "c", "other": 1}')
    first, second = read_entries(path, None, 9)
    assert (first.where, first.image) == (f"{path}:2", tmp_path / "b.png")
    assert (second.where, second.image) == (f"{path}:4", None)


def test_byte_order_mark_and_unicode_line_separators_are_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\ufeff{"prompt": "Où?\u2028Là\x85"}\n', encoding="utf-8")
    assert prompts(read_entries(path, None, 9)) == ["Où?\u2028Là\x85"]


def test_lines_that_are_not_needed_are_not_checked(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a"}\nnonsense\n')
    assert len(read_entries(path, 1, 9)) == 1
    with pytest.raises(UserError, match=":2: not JSON"):
        read_entries(path, None, 9)


def test_the_built_in_calibration_set_is_the_calib_split(llava: Llava) -> None:
    """It has 64 samples, with text and pixels as tools/tiny/scenes.py draws them; none of them is in training or test."""
    entries = read_entries(default_calibration(), None, 999)
    assert len(entries) == 64
    for index, entry in enumerate(entries):
        kind = scenes.KINDS[index % len(scenes.KINDS)]
        scene, (question,) = scenes.questions("calib", index, kinds=(kind,))
        assert (entry.line.prompt, entry.line.answer) == (question.text, question.answer)
        np.testing.assert_array_equal(np.asarray(Image.open(str(entry.image))), np.asarray(scenes.draw(scene)))
    samples = encode_entries(entries, processor(), model_config(llava), 512)
    assert {sample.pixel_values.shape for sample in samples} == {(1, 3, 48, 48)}
    assert {int((sample.input_ids == IMAGE).sum()) for sample in samples} == {36}


# Chat text


def test_chat_text_is_that_of_the_models_template() -> None:
    assert chat_text(processor(), QUESTION) == "USER: <image>\nWhat is it? ASSISTANT:"
    turns = [*QUESTION, {"role": "assistant", "text": "A ring."}, {"role": "user", "text": "Sure?"}]
    assert chat_text(processor(), turns) == "USER: <image>\nWhat is it? ASSISTANT: A ring.</s>USER: Sure? ASSISTANT:"


@pytest.mark.parametrize("template", [None, ""])
def test_without_a_template_that_of_llava_1_5_is_used(template: str | None) -> None:
    bare = with_template(template)
    assert FALLBACK_TEMPLATE == "USER: {images}{prompt} ASSISTANT:"
    for turns in (
        QUESTION,
        [{"role": "user", "text": "No picture {here}?"}],
        [{"role": "user", "text": "What differs?", "images": 2}],
        [*QUESTION, {"role": "assistant", "text": "A ring."}, {"role": "user", "text": "Sure?"}],
    ):
        assert chat_text(bare, turns) == chat_text(processor(), turns)  # the tiny model was trained with the same form


def test_two_images_are_in_the_turn_that_shows_them() -> None:
    text = chat_text(processor(), [{"role": "user", "text": "What differs?", "images": 2}])
    assert text == "USER: <image>\n<image>\nWhat differs? ASSISTANT:"


# Tokens


def test_there_is_one_image_token_for_each_patch_inside_the_text() -> None:
    pixels, ids = encode(processor(), chat_text(processor(), QUESTION), [red()])
    assert (pixels.dtype, pixels.shape, ids.dtype) == (np.float32, (1, 3, 48, 48), np.int64)
    assert int((ids == IMAGE).sum()) == 36
    tokenizer = processor().tokenizer
    before, after = (tokenizer.encode(t, add_special_tokens=False) for t in ("USER: ", "\nWhat is it? ASSISTANT:"))
    assert ids.tolist() == [BOS, *before, *[IMAGE] * 36, *after]


def test_pixels_are_normalized_as_for_clip() -> None:
    """An image of one colour is scaled to 0…1, less CLIP's mean, divided by its standard deviation."""
    pixels, _ = encode(processor(), "<image>", [red()])
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    expected = (np.array([220, 40, 40]) / 255 - mean) / std
    np.testing.assert_allclose(pixels[0], np.broadcast_to(expected[:, None, None], (3, 48, 48)), atol=1e-5)


def test_without_images_there_are_no_pixels() -> None:
    pixels, ids = encode(processor(), "Hello", [])
    assert len(pixels) == 0
    assert IMAGE not in ids


@pytest.mark.parametrize("begin", ["", "{{ bos_token }}", "<s>"])
def test_there_is_one_bos_token_whether_or_not_the_template_writes_it(begin: str) -> None:
    changed = with_template(begin + model.CHAT_TEMPLATE)
    _, ids = encode(changed, chat_text(changed, QUESTION), [red()])
    assert ids[0] == BOS
    assert int((ids == BOS).sum()) == 1
    _, plain = encode(processor(), chat_text(processor(), QUESTION), [red()])
    np.testing.assert_array_equal(ids, plain)


def test_a_continued_conversation_gets_no_bos_token() -> None:
    _, ids = encode(processor(), "USER: Sure? ASSISTANT:", [], continues=True)
    assert ids.tolist() == processor().tokenizer.encode("USER: Sure? ASSISTANT:", add_special_tokens=False)


@pytest.mark.parametrize(("text", "images"), [("<image>", 0), ("none", 1), ("<image><image>", 1)])
def test_images_and_image_tokens_must_match_in_number(text: str, images: int) -> None:
    with pytest.raises(UserError, match=f"^here: has {text.count('<image>')} times <image> for {images} pictures"):
        encode(processor(), text, [red()] * images, "here")


# Answers


def test_answer_follows_the_prompt_and_ends_the_sequence(llava: Llava, tmp_path: Path) -> None:
    line = {"prompt": "What is it?", "image": str(PICTURE)}
    without_answer, answered = samples_of(llava, write_lines(tmp_path / "a.jsonl", line, line | {"answer": "a red ring"}))
    assert without_answer.answer_start == len(without_answer.input_ids)
    assert answered.answer_start == len(without_answer.input_ids)
    np.testing.assert_array_equal(answered.input_ids[: answered.answer_start], without_answer.input_ids)
    tail = answered.input_ids[answered.answer_start :]
    assert tail[-1] == EOS
    assert processor().tokenizer.decode(tail[:-1]) == " a red ring"
    np.testing.assert_array_equal(without_answer.pixel_values, answered.pixel_values)


def llama_like_processor() -> Any:
    """A tokenizer with a dummy prefix, as Llama's: "▁" before every text, whatever it begins with."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    corpus = [[word] for word in ("▁USER:", "▁ASSISTANT:", "▁red", "▁What", "▁is", "▁it?", "▁abcdefghijklmnopqrstuvwxyz")]
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=list(model.SPECIAL_TOKENS), show_progress=False)
    tokenizer.train_from_iterator(corpus * 9, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    wrapped.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return model.make_processor(wrapped)


def test_an_answer_is_tokenized_together_with_its_prompt(llava: Llava, tmp_path: Path) -> None:
    """Llama's tokenizer gives " red" alone one space more than after "ASSISTANT:"."""
    llama = llama_like_processor()
    alone = llama.tokenizer.encode(" red", add_special_tokens=False)
    whole = llama.tokenizer.encode("USER: What is it? ASSISTANT: red")
    assert whole[-len(alone) :] != alone
    path = write_lines(tmp_path / "a.jsonl", {"prompt": "What is it?", "answer": "red"})
    (sample,) = samples_of(llava, path, llama)
    assert sample.input_ids.tolist() == [*whole, EOS]
    prompt = llama.tokenizer.encode("USER: What is it? ASSISTANT:")
    assert sample.answer_start == len(prompt)


def test_lengths_up_to_the_limit_are_accepted(llava: Llava, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"prompt": "What is it?", "answer": "red"})
    (sample,) = samples_of(llava, path)
    entries, length = read_entries(path, None, 9), len(sample.input_ids)
    assert len(encode_entries(entries, processor(), model_config(llava), length)) == 1
    with pytest.raises(UserError, match=f":1: is {length} tokens long, --max-length is {length - 1}; shorten it"):
        encode_entries(entries, processor(), model_config(llava), length - 1)


def test_a_token_beyond_the_embedding_table_is_refused(llava: Llava, tmp_path: Path) -> None:
    larger = model.make_processor(model.train_tokenizer(num_scenes=60))
    larger.tokenizer.add_tokens([f"<extra{n}>" for n in range(300)])
    path = write_lines(tmp_path / "a.jsonl", {"prompt": "Show <extra299> now."})
    with pytest.raises(UserError, match=r":1: token \d+ is beyond vocab_size 512; do processor and config"):
        samples_of(llava, path, larger)


def test_a_good_processor_passes(llava: Llava) -> None:
    check_processor(load_processor(llava()), model_config(llava), llava())


# Processors that are refused


def edit_processor(edit: Edit) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / "processor_config.json"
        content = json.loads(path.read_text())
        edit(content)
        path.write_text(json.dumps(content))

    return change


@pytest.mark.parametrize("scheme", ["int4", "fp16"])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "processor_config.json").unlink(), ["cannot be loaded", "processor files"]),
        (lambda folder: (folder / "processor_config.json").write_text("[]"), ["cannot be loaded"]),
        (lambda folder: (folder / "tokenizer.json").unlink(), ["cannot be loaded", "tokenizer"]),
        (lambda folder: (folder / "tokenizer.json").write_text('"x"'), ["cannot be loaded"]),
        (lambda folder: (folder / "tokenizer_config.json").write_text("{}"), ["no end-of-sequence token"]),
        (lambda folder: (folder / "chat_template.jinja").write_text("Hello"), ["does not place <image>"]),
        (lambda folder: (folder / "chat_template.jinja").write_text("{{ a.b.c }}"), ["'a' is undefined"]),
        (lambda folder: (folder / "chat_template.jinja").write_text("{% for %}"), ["its processor fails"]),
        (edit_processor(put("", "patch_size", 16)), ["9 image tokens", "the model takes 36"]),
        (edit_processor(put("", "patch_size", "8")), ["its processor fails"]),
        (edit_processor(put("", "processor_class", "Other")), ["no processor of pictures and text"]),
        (edit_processor(put("image_processor", "crop_size", {"height": 96, "width": 96})), ["[3, 96, 96]", "[3, 48, 48]"]),
        (edit_processor(put("image_processor", "do_center_crop", False)), ["the model takes [3, 48, 48]"]),
        (edit_processor(put("image_processor", "image_std", [0, 0, 0])), ["NaN or infinite", "image_std"]),
    ],
)
def test_a_processor_that_does_not_fit_is_refused(
    checkpoint: Path, absent: Path, scheme: str, damage: Callable[[Path], object], words: list[str]
) -> None:
    """Also for fp16, which needs no samples: a bad processor must be found before engines are built."""
    damage(checkpoint)
    assert_refused(export_onnx(checkpoint, absent, "--scheme", scheme, "--dry-run"), str(checkpoint), *words)


# JSONL that is refused


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["holds no samples", "image and prompt"]),
        ("\n  \n", ["holds no samples"]),
        ('{"prompt": "a"}\n{"prompt": ', [":2: not JSON", "one JSON object a line"]),
        ("prompt,image\n", [":1: not JSON"]),
        ("[" * 100_000, [":1: not JSON"]),
        ("1" * 5000, [":1: not JSON"]),
        ("[]", [":1: the line", "dictionary"]),
        ('{"image": "a.png"}', [":1: prompt: Field required", '"prompt": text']),
        ('{"prompt": 5}', [":1: prompt", "string"]),
        ('{"prompt": "a", "image": 5}', [":1: image", "string"]),
        ('{"prompt": "a", "answer": ["b"]}', [":1: answer", "string"]),
        ('{"prompt": "a"}\n\n{"prompt": "<image> b"}', [":3: has 1 times <image> for 0 pictures", "leave <image> out"]),
        ('{"prompt": "a", "answer": "<image>"}', [":1: has 1 times <image>"]),
        ('{"prompt": "\\ud800"}', [":1: holds half a surrogate pair", "UTF-8"]),
        ('{"prompt": "a", "answer": "\\ud800"}', [":1: holds half a surrogate pair"]),
        (json.dumps({"prompt": "word " * 600}), [":1: is ", "tokens long, --max-length is 512", "shorten it"]),
        (json.dumps({"prompt": "a", "answer": "word " * 600}), ["tokens long, --max-length is 512"]),
    ],
)
def test_bad_jsonl_is_refused_with_its_line(
    llava: Llava, absent: Path, tmp_path: Path, content: str, words: list[str]
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(content, encoding="utf-8")
    assert_refused(run_export(llava(), absent, "--backend", "onnx", "--calib-data", path), str(path), *words)


def test_jsonl_that_is_not_utf8_is_refused(llava: Llava, absent: Path, tmp_path: Path) -> None:
    path = tmp_path / "latin1.jsonl"
    path.write_bytes('{"prompt": "Où?"}'.encode("latin-1"))
    refused = run_export(llava(), absent, "--backend", "onnx", "--calib-data", path)
    assert_refused(refused, str(path), "is not UTF-8 text", "save it as UTF-8")


# Prompts that are far too long


@pytest.mark.parametrize("text", ["word " * 200_000, " " * 10**6, "\u4f60" * 10**6, "<unk>" * 200_000])
def test_a_far_too_long_prompt_is_refused_without_tokenizing_all_of_it(llava: Llava, text: str) -> None:
    tokenized, tokenizer = [], processor().tokenizer

    class Counting:
        def __call__(self, beginning: str, **arguments: Any) -> Any:
            tokenized.append(len(beginning))
            return tokenizer(beginning, **arguments)

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

    counting = model.make_processor(tokenizer)
    counting.tokenizer = Counting()
    with pytest.raises(UserError, match=rf"^here: has {len(text)} characters, .* more than 512 tokens; the model takes 256"):
        encode_prompt(counting, model_config(llava), text, [], where="here", max_length=256)
    assert sum(tokenized) <= 5 * 16 * 256


def test_a_long_text_of_few_tokens_is_taken(llava: Llava) -> None:
    """A tokenizer that joins spaces may make few tokens of any number of characters."""
    joining = llama_like_processor()
    joining.tokenizer.backend_tokenizer.normalizer = normalizers.Replace(Regex(" +"), "▁")
    encoded = encode_prompt(joining, model_config(llava), " " * 10**6, [], max_length=16)
    assert len(encoded.input_ids) < 16


def test_a_far_too_long_line_of_a_calibration_set_is_refused(llava: Llava, absent: Path, tmp_path: Path) -> None:
    for line in ({"prompt": "word " * 10**6}, {"prompt": "a", "answer": "word " * 10**6}):
        path = write_lines(tmp_path / "a.jsonl", line)
        refused = run_export(llava(), absent, "--backend", "onnx", "--calib-data", path)
        assert_refused(refused, f"{path}:1: has 5000", "the model takes 512, so shorten it")


@pytest.mark.parametrize(("option", "what"), [("--calib-data", "a JSONL file"), ("--recipe", "a recipe")])
def test_a_pipe_is_refused(llava: Llava, absent: Path, tmp_path: Path, option: str, what: str) -> None:
    """Such as that of `--calib-data <(head -5 x.jsonl)`; opening a pipe that nobody writes would wait for ever."""
    os.mkfifo(tmp_path / "pipe")
    refused = run_export(llava(), absent, "--backend", "onnx", option, tmp_path / "pipe")
    assert_refused(refused, f"{option} {tmp_path / 'pipe'}: is a pipe, not {what}; give a regular file")
