"""Small random checkpoints of every supported kind: against transformers, as float16 and INT4 graphs, and as engines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from export_graphs import export_session
from paths import ROOT
from PIL import Image
from transformers import AutoModelForImageTextToText

import qvlm_export
from qvlm_export.calibrate.checkpoint.calibrated import CalibratedCheckpoint
from qvlm_export.calibrate.checkpoint.samples import join_placements
from qvlm_export.calibrate.errors import UserError
from qvlm_export.calibrate.numerics import matmul
from qvlm_export.checkpoints.chat_templates import chat_text
from qvlm_export.checkpoints.families import FAMILIES
from qvlm_export.engines.config import Limits
from qvlm_export.evaluation.ask import AskSettings, ask_all
from qvlm_export.evaluation.eval_model import find_eval_model, open_eval_model
from qvlm_export.evaluation.tasks.task import Answer, Question
from qvlm_export.inputs.samples import encode_prompt, load_processor
from qvlm_export.inputs.tiles import tile_counts
from qvlm_export.pipeline.preparation.prepare import ExportOptions, prepare_export
from tools.families import check
from tools.families.check import ALL, Kept

TORCH_TOLERANCE = 1e-5  # 1.2e-6 measured; the bilinear sums have another order
FP16_TOLERANCE = 2e-3  # 4.3e-4 measured; the rotary tables are float16
INT4_TOLERANCE = 1e-4  # 1.6e-6 measured
# One of every family and layout; the table in docs/families.md has all.
ENGINES = ("vipllava", "onevision", "v1.3")
GRAPHS = ("bakllava", "vipllava", "onevision", "v1")
Make = Callable[[str], Kept]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """make(kind) -> a checkpoint of that kind, questions, and the logits of transformers; made once."""
    return cache(lambda kind: check.make(tmp_path_factory.mktemp(kind) / kind, kind))


def export_once(case: Kept, scheme: str) -> Path:
    """The engine path of an export with this scheme, exported on first use."""
    plan = case.checkpoint.folder / f"{scheme}.plan"
    if not plan.with_suffix(".json").exists():
        {"fp16": check.fp16_error, "int4": check.int4_error}[scheme](case)
    return plan


@pytest.mark.parametrize("kind", ALL)
def test_block_by_block_logits_are_those_of_transformers(make: Make, kind: str) -> None:
    assert check.torch_error(make(kind)) < TORCH_TOLERANCE


@pytest.mark.parametrize("kind", GRAPHS)
def test_float16_graph_logits_are_those_of_transformers(make: Make, kind: str) -> None:
    assert check.fp16_error(make(kind)) < FP16_TOLERANCE


@pytest.mark.parametrize("kind", GRAPHS)
def test_int4_graph_logits_are_those_of_fake_quantization(make: Make, kind: str) -> None:
    assert check.int4_error(make(kind)) < INT4_TOLERANCE


@pytest.mark.parametrize("kind", ENGINES)
def test_the_engine_runs_every_quantized_linear_on_the_calibrated_integers(make: Make, kind: str) -> None:
    quantized, integer = check.build_engine(make(kind))
    assert quantized == integer >= 33


def test_the_error_measure_notices_a_wrong_placement(make: Make) -> None:
    """An error in the order of the positions is larger than any rounding error."""
    case = make("next-qwen")
    changed = replace(case, wanted=[w[::-1].copy() for w in case.wanted])
    assert check.torch_error(changed) > 0.1


def test_every_family_has_a_checkpoint_here(make: Make) -> None:
    assert {make(kind).checkpoint.hf_config.model_type for kind in ALL} == {family.model_type for family in FAMILIES}


def test_the_table_in_the_docs_has_every_kind() -> None:
    text = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    table = text.partition(check.BEGIN)[2].partition(check.END)[0]
    named = [line.split("|")[1].strip() for line in table.splitlines()[2:]]
    assert named == list(ALL.values())


@pytest.mark.parametrize("kind", ["vipllava", "next-qwen", "v1.3"])
def test_transformers_loads_the_calibrated_checkpoint(
    make: Make, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kinds cover several feature layers, the newline, and the identity that stands for a second projector linear.

    Both sides use BLAS, because other last bits would round an activation between two codes to the other one.
    """
    monkeypatch.setattr(matmul, "prefers_onednn", lambda: False)
    case = make(kind)
    folder = case.checkpoint.folder
    result = qvlm_export.export(folder, tmp_path / "x.plan", scheme="int4", backend="onnx", samples=2)
    calibrated = result.manifest.file("calibrated")
    reference = AutoModelForImageTextToText.from_pretrained(calibrated, dtype=torch.float32).eval()
    blocks = check.make_blocks(case.checkpoint.hf_config)
    checkpoint = CalibratedCheckpoint(calibrated)
    source = check.DequantizedSource(checkpoint)
    step = check.fake_quantized_step(checkpoint, source)
    for question in case.questions[:2]:
        expected = check.reference_logits(reference, question)
        epsilon = case.checkpoint.config.text.rms_norm_eps
        got = check.walked_logits(blocks, source, epsilon, question.sample, step)
        assert check.relative(got, expected) < 1e-4


# The model forms of qvlm-eval


@pytest.mark.parametrize("kind", ALL)
def test_float_form_logits_are_those_of_transformers(make: Make, kind: str) -> None:
    """With all weights in memory and a cache, unlike the block-by-block forward pass."""
    case = make(kind)
    with open_eval_model(find_eval_model(str(case.checkpoint.folder), "float"), device="cpu") as model:
        for question, expected in zip(case.questions, case.wanted, strict=True):
            got = check.session_logits(model.session, question.sample)
            assert check.relative(got, expected) < TORCH_TOLERANCE


@pytest.mark.parametrize("kind", GRAPHS)
def test_fake_quant_form_logits_are_those_of_the_graph(make: Make, kind: str) -> None:
    """Fake quantization has the roundings of the graph, so that the graph is much closer to it than the float model."""
    case = make(kind)
    plan = export_once(case, "int4")
    for name in ("fake-quant", "graph"):
        with open_eval_model(find_eval_model(str(plan), name), device="cpu") as model:
            if name == "fake-quant":
                fake_quant = [check.session_logits(model.session, q.sample) for q in case.questions]
            else:
                graph = [check.session_logits(model.session, q.sample) for q in case.questions]
    assert max(map(check.relative, graph, fake_quant)) < INT4_TOLERANCE
    assert min(map(check.relative, fake_quant, case.wanted)) > 100 * INT4_TOLERANCE


@pytest.mark.parametrize("kind", ["next-llama3", "onevision", "v1.5", "v1.6-mistral"])
def test_batched_answers_are_those_of_transformers(make: Make, kind: str, tmp_path: Path) -> None:
    """Images of different shapes and a question without one, in batches of prompts of equal length."""
    case = make(kind)
    processor, questions, expected = load_processor(case.checkpoint.folder), [], {}
    for number, size in enumerate([(60, 90), (60, 90), (30, 20), (200, 210), None, (60, 90)]):
        pictures = [] if size is None else [random_image(number, size)]
        for picture in pictures:
            picture.save(tmp_path / f"{number}.png")
        questions.append(Question(str(number), "Is it red?", tmp_path / f"{number}.png" if pictures else None))
        text = chat_text(processor, [{"role": "user", "text": "Is it red?", "images": len(pictures)}])
        inputs = processor(images=[pictures] if pictures else None, text=[text], return_tensors="pt")
        tokens = case.reference.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        expected[str(number)] = Answer(processor.tokenizer.decode(tokens, skip_special_tokens=True).strip())
    with open_eval_model(find_eval_model(str(case.checkpoint.folder), "float"), device="cpu", batch=4) as model:
        batches = list(ask_all(model, questions, AskSettings(max_new_tokens=6, batch=4)))
    tiled = case.checkpoint.config.tiles is not None  # then images of another shape have another number of tokens
    assert sorted(map(len, batches)) == ([1, 1, 1, 3] if tiled else [1, 1, 4])
    assert {one: answer for batch in batches for one, answer in batch.items()} == expected
    assert len(set(expected.values())) > 2


# Decoding


@pytest.mark.parametrize("kind", ["bakllava", "next-llama3", "onevision"])
def test_greedy_answers_are_those_of_transformers(make: Make, kind: str, tmp_path: Path) -> None:
    """Every token is equal, in a batch with different tile counts, beyond a sliding window, in several tower runs."""
    case = make(kind)
    folder = case.checkpoint.folder
    questions = case.questions[:3]
    session = export_session(folder, tmp_path, "float32", Limits(400, max_batch=3, max_images=4))
    config = case.checkpoint.config
    rows = [len(q.sample.pixel_values) * config.vision.tokens_per_image for q in questions]
    joined = join_placements([q.sample.placement for q in questions], rows)
    pixels = np.concatenate([q.sample.pixel_values for q in questions])
    sequences = session.start([q.sample.input_ids for q in questions], pixels, joined)
    steps = list(session.generate(sequences, 8, frozenset()))
    for row, question in enumerate(questions):
        expected = case.reference.generate(**question.given, max_new_tokens=8, min_new_tokens=8, do_sample=False)[0]
        assert [step[row] for step in steps] == expected[len(question.sample.input_ids) :].tolist()


@pytest.mark.parametrize("kind", ["next-vicuna", "onevision"])
def test_logits_take_the_inputs_of_the_processor(make: Make, kind: str) -> None:
    case = make(kind)
    with qvlm_export.load(export_once(case, "fp16"), "onnxruntime:cpu") as model:
        for question, expected in zip(case.questions[:3], case.wanted, strict=False):
            inputs = {key: np.asarray(value) for key, value in question.given.items()}
            got = model.logits(inputs["input_ids"], inputs["pixel_values"], inputs["image_sizes"])[0]
            assert check.relative(got, expected) < FP16_TOLERANCE
        ids, pixels = inputs["input_ids"], inputs["pixel_values"]
        with pytest.raises(UserError, match="give pixel_values and image_sizes as its processor does"):
            model.logits(ids, pixels)
        with pytest.raises(UserError, match="the placement of their features is missing"):
            model.session.logits(ids, question.sample.pixel_values)
        with pytest.raises(UserError, match=r"the prompt has \d+ image tokens, \d+ tiles make \d+; give one image for each"):
            model.logits(ids[:, 9:], pixels, inputs["image_sizes"])


def test_a_conversation_about_tiled_images_equals_one_long_prompt(make: Make) -> None:
    """The second turn shows another image."""
    case = make("next-vicuna")
    red, wide = Image.new("RGB", (60, 50), (200, 30, 30)), Image.new("RGB", (120, 40), (20, 30, 220))
    with qvlm_export.load(export_once(case, "fp16"), "onnxruntime:cpu") as model:
        chat = model.chat()
        first = "".join(chat.say("What?", [red], max_new_tokens=3))
        second = "".join(chat.say("And this?", [wide], max_new_tokens=3))
        answer = {"role": "assistant", "text": first}
        turns = [
            {"role": "user", "text": "What?", "images": 1},
            answer,
            {"role": "user", "text": "And this?", "images": 1},
        ]
        new = encode_prompt(model.processor, model.manifest.config, chat_text(model.processor, turns), [red, wide])
        expected = model.session.logits(new.input_ids[None], new.pixel_values, new.placement)[0, -1]
        first_token = model.processor.tokenizer.decode([int(expected.argmax())], skip_special_tokens=True).lstrip()
        assert second.startswith(first_token)


# Images of one turn


def random_image(seed: int, size: tuple[int, int]) -> Image.Image:
    """An image of noise. size: height and width in pixels."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8))


def test_onevision_cuts_only_a_single_image_into_tiles(make: Make) -> None:
    config = make("onevision").checkpoint.config
    assert tile_counts(config, [(200, 210)]) == [21]
    assert tile_counts(config, [(200, 210), (30, 20)]) == [1, 1]
    assert tile_counts(make("next-qwen").checkpoint.config, [(200, 210), (30, 20)]) == [5, 3]


def test_default_limits_leave_room_for_the_largest_image(make: Make) -> None:
    folder = make("onevision").checkpoint.folder
    prepared = prepare_export(ExportOptions(str(folder), folder / "x.plan", scheme="fp16", backend="onnx"))
    config = prepared.checkpoint.config
    assert prepared.limits.max_images == config.most_tiles == 37
    assert prepared.limits.max_length == min(2048, config.text.max_position_embeddings)


def test_a_saved_processor_gives_the_same_inputs(make: Make, tmp_path: Path) -> None:
    """The processor that an export saves gives the same tokens and pixels as the checkpoint's own."""
    for kind in ALL:
        folder = make(kind).checkpoint.folder
        original, config = load_processor(folder), make(kind).checkpoint.config
        original.save_pretrained(tmp_path / kind)
        saved = load_processor(tmp_path / kind)
        image = Image.fromarray(np.random.default_rng(1).integers(0, 255, (50, 90, 3), dtype=np.uint8))
        turns = [
            {"role": "user", "text": " What is it?\n Be short.", "images": 1},
            {"role": "assistant", "text": "A ring."},
            {"role": "user", "text": "Sure?"},
        ]
        assert chat_text(saved, turns) == chat_text(original, turns)
        new, old = (encode_prompt(p, config, chat_text(p, turns), [image]) for p in (saved, original))
        np.testing.assert_array_equal(new.input_ids, old.input_ids)
        np.testing.assert_array_equal(new.pixel_values, old.pixel_values)
