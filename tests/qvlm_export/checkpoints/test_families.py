"""Every kind of checkpoint people have, small and random: against transformers, as graphs, as integers, as engines."""

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
from qvlm_export.evaluation.ask import Manner, ask_all
from qvlm_export.evaluation.subjects import find_eval_model, open_eval_model
from qvlm_export.evaluation.tasks.task import Answer, Question
from qvlm_export.inputs.samples import encode_pictures, load_processor
from qvlm_export.inputs.tiles import tile_counts
from qvlm_export.pipeline.planning.export_plan import ExportOptions, plan_export
from tools.families import check
from tools.families.check import ALL, Kept

TORCH_TOLERANCE = 1e-5  # 1.2e-6 measured: bilinear sums in another order
FP16_TOLERANCE = 2e-3  # 4.3e-4 measured: tables of rotations in float16
INT4_TOLERANCE = 1e-4  # 1.6e-6 measured
# One of every family and layout; the table in docs/families.md has all.
ENGINES = ("vipllava", "onevision", "v1.3")
GRAPHS = ("bakllava", "vipllava", "onevision", "v1")
Make = Callable[[str], Kept]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """make(kind) -> a checkpoint of that kind, questions and transformers' logits; made once."""
    return cache(lambda kind: check.make(tmp_path_factory.mktemp(kind) / kind, kind))


def exported(kept: Kept, scheme: str) -> Path:
    """The export that the error of this scheme was measured with, made where it is not there yet."""
    plan = kept.checkpoint.folder / f"{scheme}.plan"
    if not plan.with_suffix(".json").exists():
        {"fp16": check.fp16_error, "int4": check.int4_error}[scheme](kept)
    return plan


@pytest.mark.parametrize("kind", ALL)
def test_torch_block_by_block(make: Make, kind: str) -> None:
    assert check.torch_error(make(kind)) < TORCH_TOLERANCE


@pytest.mark.parametrize("kind", GRAPHS)
def test_the_float16_graph(make: Make, kind: str) -> None:
    assert check.fp16_error(make(kind)) < FP16_TOLERANCE


@pytest.mark.parametrize("kind", GRAPHS)
def test_the_int4_graph(make: Make, kind: str) -> None:
    assert check.int4_error(make(kind)) < INT4_TOLERANCE


@pytest.mark.parametrize("kind", ENGINES)
def test_the_engine_runs_every_planned_linear_on_the_calibrated_integers(make: Make, kind: str) -> None:
    planned, integer = check.build_engine(make(kind))
    assert planned == integer >= 33


def test_the_measure_tells_models_apart(make: Make) -> None:
    """A placement in another order, or another picture, is no rounding error."""
    kept = make("next-qwen")
    changed = replace(kept, wanted=[w[::-1].copy() for w in kept.wanted])
    assert check.torch_error(changed) > 0.1


def test_every_family_is_among_the_kinds(make: Make) -> None:
    assert {make(kind).checkpoint.hf_config.model_type for kind in ALL} == {family.model_type for family in FAMILIES}


def test_the_table_has_every_kind() -> None:
    text = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    table = text.partition(check.BEGIN)[2].partition(check.END)[0]
    named = [line.split("|")[1].strip() for line in table.splitlines()[2:]]
    assert named == list(ALL.values())


@pytest.mark.parametrize("kind", ["vipllava", "next-qwen", "v1.3"])
def test_transformers_loads_the_calibrated_checkpoint(
    make: Make, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The identity in the place of a projector's second linear, several features and the newline included.

    Both multiply by BLAS: other last bits turn an activation that lies between two codes to the other one, a whole step.
    """
    monkeypatch.setattr(matmul, "prefers_onednn", lambda: False)
    kept = make(kind)
    folder = kept.checkpoint.folder
    made = qvlm_export.export(folder, tmp_path / "x.plan", scheme="int4", backend="onnx", samples=2)
    calibrated = made.manifest.file("calibrated")
    theirs = AutoModelForImageTextToText.from_pretrained(calibrated, dtype=torch.float32).eval()
    blocks = check.make_blocks(kept.checkpoint.hf_config)
    checkpoint = CalibratedCheckpoint(calibrated)
    source = check.DequantizedSource(checkpoint)
    step = check.fake_quantized_step(checkpoint, source)
    for question in kept.questions[:2]:
        wanted = check.reference_logits(theirs, question)
        epsilon = kept.checkpoint.config.text.rms_norm_eps
        got = check.walked_logits(blocks, source, epsilon, question.sample, step)
        assert check.relative(got, wanted) < 1e-4


# The rungs of qvlm-eval


@pytest.mark.parametrize("kind", ALL)
def test_the_torch_rung(make: Make, kind: str) -> None:
    """All weights in memory and a cache, another path than block by block."""
    kept = make(kind)
    with open_eval_model(find_eval_model(str(kept.checkpoint.folder), "torch"), device="cpu") as model:
        for question, wanted in zip(kept.questions, kept.wanted, strict=True):
            got = check.session_logits(model.session, question.sample)
            assert check.relative(got, wanted) < TORCH_TOLERANCE


@pytest.mark.parametrize("kind", GRAPHS)
def test_the_simulated_rung(make: Make, kind: str) -> None:
    """Of an export, with the roundings of its graph: the graph is its reference, and the torch rung is further away."""
    kept = make(kind)
    plan = exported(kept, "int4")
    for name in ("simulated", "graph"):
        with open_eval_model(find_eval_model(str(plan), name), device="cpu") as model:
            if name == "simulated":
                simulated = [check.session_logits(model.session, q.sample) for q in kept.questions]
            else:
                found = [check.session_logits(model.session, q.sample) for q in kept.questions]
    assert max(map(check.relative, found, simulated)) < INT4_TOLERANCE
    assert min(map(check.relative, simulated, kept.wanted)) > 100 * INT4_TOLERANCE


@pytest.mark.parametrize("kind", ["next-llama3", "onevision", "v1.5", "v1.6-mistral"])
def test_questions_are_answered_as_by_transformers(make: Make, kind: str, tmp_path: Path) -> None:
    """Pictures of unlike shapes and a question without one, in batches of equal length."""
    kept = make(kind)
    processor, questions, wanted = load_processor(kept.checkpoint.folder), [], {}
    for number, size in enumerate([(60, 90), (60, 90), (30, 20), (200, 210), None, (60, 90)]):
        pictures = [] if size is None else [random_picture(number, size)]
        for picture in pictures:
            picture.save(tmp_path / f"{number}.png")
        questions.append(Question(str(number), "Is it red?", tmp_path / f"{number}.png" if pictures else None))
        text = chat_text(processor, [{"role": "user", "text": "Is it red?", "images": len(pictures)}])
        given = processor(images=[pictures] if pictures else None, text=[text], return_tensors="pt")
        tokens = kept.reference.generate(**given, max_new_tokens=6, do_sample=False)[0, given["input_ids"].shape[1] :]
        wanted[str(number)] = Answer(processor.tokenizer.decode(tokens, skip_special_tokens=True).strip())
    with open_eval_model(find_eval_model(str(kept.checkpoint.folder), "torch"), device="cpu", batch=4) as model:
        batches = list(ask_all(model, questions, Manner(max_new_tokens=6, batch=4)))
    tiled = kept.checkpoint.config.tiles is not None  # then pictures of another shape are another number of tokens
    assert sorted(map(len, batches)) == ([1, 1, 1, 3] if tiled else [1, 1, 4])
    assert {one: answer for batch in batches for one, answer in batch.items()} == wanted
    assert len(set(wanted.values())) > 2


# Decoding


@pytest.mark.parametrize("kind", ["bakllava", "next-llama3", "onevision"])
def test_greedy_answers_are_those_of_transformers(make: Make, kind: str, tmp_path: Path) -> None:
    """Token for token: one batch of pictures of unlike tiles, past a sliding window, the tower run several times."""
    kept = make(kind)
    folder = kept.checkpoint.folder
    chosen = kept.questions[:3]
    session = export_session(folder, tmp_path, "float32", Limits(400, max_batch=3, max_images=4))
    config = kept.checkpoint.config
    rows = [len(q.sample.pixel_values) * config.vision.tokens_per_image for q in chosen]
    joined = join_placements([q.sample.placement for q in chosen], rows)
    pixels = np.concatenate([q.sample.pixel_values for q in chosen])
    sequences = session.start([q.sample.input_ids for q in chosen], pixels, joined)
    steps = list(session.generate(sequences, 8, frozenset()))
    for row, question in enumerate(chosen):
        wanted = kept.reference.generate(**question.given, max_new_tokens=8, min_new_tokens=8, do_sample=False)[0]
        assert [step[row] for step in steps] == wanted[len(question.sample.input_ids) :].tolist()


@pytest.mark.parametrize("kind", ["next-vicuna", "onevision"])
def test_logits_from_what_the_processor_gives(make: Make, kind: str) -> None:
    kept = make(kind)
    with qvlm_export.load(exported(kept, "fp16"), "onnxruntime:cpu") as model:
        for question, wanted in zip(kept.questions[:3], kept.wanted, strict=False):
            given = {key: np.asarray(value) for key, value in question.given.items()}
            got = model.logits(given["input_ids"], given["pixel_values"], given["image_sizes"])[0]
            assert check.relative(got, wanted) < FP16_TOLERANCE
        ids, pixels = given["input_ids"], given["pixel_values"]
        with pytest.raises(UserError, match="give pixel_values and image_sizes as its processor does"):
            model.logits(ids, pixels)
        with pytest.raises(UserError, match="the placement of their features is missing"):
            model.session.logits(ids, question.sample.pixel_values)
        with pytest.raises(UserError, match=r"the prompt has \d+ image tokens, \d+ tiles make \d+; give one image for each"):
            model.logits(ids[:, 9:], pixels, given["image_sizes"])


def test_a_conversation_about_tiled_pictures(make: Make) -> None:
    """The second turn shows another picture; what is computed is what one long prompt gives."""
    kept = make("next-vicuna")
    red, wide = Image.new("RGB", (60, 50), (200, 30, 30)), Image.new("RGB", (120, 40), (20, 30, 220))
    with qvlm_export.load(exported(kept, "fp16"), "onnxruntime:cpu") as model:
        chat = model.chat()
        first = "".join(chat.say("What?", [red], max_new_tokens=3))
        second = "".join(chat.say("And this?", [wide], max_new_tokens=3))
        answered = {"role": "assistant", "text": first}
        turns = [
            {"role": "user", "text": "What?", "images": 1},
            answered,
            {"role": "user", "text": "And this?", "images": 1},
        ]
        new = encode_pictures(model.processor, model.manifest.config, chat_text(model.processor, turns), [red, wide])
        wanted = model.session.logits(new.input_ids[None], new.pixel_values, new.placement)[0, -1]
        said = model.processor.tokenizer.decode([int(wanted.argmax())], skip_special_tokens=True).lstrip()
        assert second.startswith(said)


# Pictures of one turn


def random_picture(seed: int, size: tuple[int, int]) -> Image.Image:
    """size: height and width."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8))


def test_onevision_cuts_only_a_picture_that_comes_alone(make: Make) -> None:
    config = make("onevision").checkpoint.config
    assert tile_counts(config, [(200, 210)]) == [21]
    assert tile_counts(config, [(200, 210), (30, 20)]) == [1, 1]
    assert tile_counts(make("next-qwen").checkpoint.config, [(200, 210), (30, 20)]) == [5, 3]


def test_limits_leave_room_for_the_largest_picture(make: Make) -> None:
    folder = make("onevision").checkpoint.folder
    plan = plan_export(ExportOptions(str(folder), folder / "x.plan", scheme="fp16", backend="onnx"))
    config = plan.checkpoint.config
    assert plan.limits.max_images == config.most_tiles == 37
    assert plan.limits.max_length == min(2048, config.text.max_position_embeddings)


def test_processors_are_saved_as_they_were(make: Make, tmp_path: Path) -> None:
    """What an export keeps gives the same tokens and pixels as the checkpoint's own."""
    for kind in ALL:
        folder = make(kind).checkpoint.folder
        own, config = load_processor(folder), make(kind).checkpoint.config
        own.save_pretrained(tmp_path / kind)
        kept = load_processor(tmp_path / kind)
        picture = Image.fromarray(np.random.default_rng(1).integers(0, 255, (50, 90, 3), dtype=np.uint8))
        turns = [
            {"role": "user", "text": " What is it?\n Be short.", "images": 1},
            {"role": "assistant", "text": "A ring."},
            {"role": "user", "text": "Sure?"},
        ]
        assert chat_text(kept, turns) == chat_text(own, turns)
        new, old = (encode_pictures(p, config, chat_text(p, turns), [picture]) for p in (kept, own))
        np.testing.assert_array_equal(new.input_ids, old.input_ids)
        np.testing.assert_array_equal(new.pixel_values, old.pixel_values)
