"""Parts of the methods benchmark: metrics, the file of results, data files, tables, and the outliers of tiny-hard."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from paths import TINY
from random_llava import write_random_llava
from small_export import mixed_samples, open_small
from transformers import LlavaForConditionalGeneration

from qvlm_export.calibrate.blockwise.blocks import make_blocks
from qvlm_export.calibrate.checkpoint.samples import Sample
from qvlm_export.inputs.samples import load_processor
from tools.bench import methods, ours, runtime
from tools.bench.cells.results import Cell, Results
from tools.bench.data import (
    answer_spans,
    calibration_file,
    calibration_items,
    encode_items,
    load_samples,
    make_data,
    save_samples,
)
from tools.bench.methods import score
from tools.bench.tables import ablation_table, best_of, medians, write_tables
from tools.peers.common import SCHEMES, check_levels, equal_lengths, measured
from tools.peers.rows import ALL, ROWS
from tools.study import reach
from tools.tiny import plant_hard_outliers

PIXELS = np.zeros((1, 3, 4, 4), np.float32)


def sample(answer: list[int]) -> Sample:
    """A sample with a prompt of two tokens and this answer."""
    return Sample(np.array([9, 9, *answer]), PIXELS, 2)


def test_score_agrees_with_values_computed_by_hand():
    samples = [sample([0]), sample([1, 0])]
    reference = np.log(np.array([[0.5, 0.5], [0.25, 0.75], [0.75, 0.25]], np.float32))
    other = np.log(np.array([[0.5, 0.5], [0.25, 0.75], [0.25, 0.75]], np.float32))
    scores = score(reference, other, samples)
    kl = 0.75 * np.log(3) - 0.25 * np.log(3)
    assert scores["kl"] == pytest.approx(kl / 3, rel=1e-5)
    assert scores["top1"] == pytest.approx(2 / 3)
    assert scores["exact_match"] == 0.5  # the last token of the second question is wrong
    noise, signal = 2 * np.log(3) ** 2, float((reference**2).sum())
    assert scores["sqnr_db"] == pytest.approx(10 * np.log10(signal / noise), rel=1e-5)
    assert answer_spans(samples) == [(1, 2), (1, 3)]


def test_results_survive_a_killed_run(tmp_path):
    path, cell = tmp_path / "results.jsonl", Cell("tiny", "rtn", "W8A8", 0)
    Results(path).add(cell, {"model_hash": "a", "kl": 1.0})
    with path.open("a") as file:
        file.write('{"model": "tiny", "row": "rt')  # half a line
    reopened = Results(path)
    assert reopened.get(cell, "a")["kl"] == 1.0
    assert reopened.get(cell, "b") is None  # another model with the same name
    reopened.add(Cell("tiny", "rtn", "W8A8", 1), {"model_hash": "a", "kl": 2.0})
    reopened.add(cell, {"model_hash": "a", "kl": 3.0})
    records = Results(path).current()
    assert sorted(record["kl"] for record in records) == [2.0, 3.0]  # the last line of a cell counts


def test_only_cells_without_a_result_are_run(tmp_path):
    results = Results(tmp_path / "results.jsonl")
    results.add(Cell("m", "rtn", "W8A8", 0, 0), {"model_hash": "a"})
    results.add(Cell("m", "rtn", "W8A8", 1, 10), {"model_hash": "a"})  # another evaluation set: another cell
    bench = methods.Bench(Path("m"), tmp_path, "a", results, tmp_path, tmp_path / "e.npz", 0, 64, lambda _: {})
    row = next(r for r in ours.ROWS if r.name == "rtn")
    cells = list(methods.cells_to_run(bench, row, ("W8A8", "W4A4"), (0, 1), extra=False, redo=False))
    assert [(c.column, c.seed) for c in cells] == [("W8A8", 1), ("W4A4", 0), ("W4A4", 1)]
    assert len(list(methods.cells_to_run(bench, row, ("W8A8",), (0,), extra=False, redo=True))) == 1
    assert (
        len(list(methods.cells_to_run(replace(bench, calibration_size=8), row, ("W8A8",), (0,), extra=False, redo=False)))
        == 1
    )
    peer = next(r for r in ROWS if r.name == "modelopt: awq_full")
    assert not list(methods.cells_to_run(bench, peer, ALL, (0,), extra=False, redo=False))
    assert len(list(methods.cells_to_run(bench, peer, ALL, (0,), extra=True, redo=False))) == len(peer.columns)


def test_saved_samples_are_read_back_unchanged(tmp_path):
    samples = encode_items(calibration_items(1, count=3), load_processor(TINY))
    save_samples(tmp_path / "data.npz", samples)
    for before, after in zip(samples, load_samples(tmp_path / "data.npz"), strict=True):
        assert np.array_equal(before.input_ids, after.input_ids)
        assert np.array_equal(before.pixel_values, after.pixel_values)
        assert before.answer_start == after.answer_start
        assert after.input_ids.dtype == np.int64
        assert after.input_ids[-1] == 2  # the end token belongs to the answer


def test_a_smaller_calibration_set_holds_the_first_samples_of_the_default_one(tmp_path):
    make_data(TINY, tmp_path, questions=1, samples=2)
    few, (first, second) = (
        load_samples(calibration_file(tmp_path, 1, 2)),
        encode_items(calibration_items(1)[:2], load_processor(TINY)),
    )
    assert [one.input_ids.tolist() for one in few] == [first.input_ids.tolist(), second.input_ids.tolist()]
    assert np.array_equal(few[1].pixel_values, second.pixel_values)
    assert not calibration_file(tmp_path, 1).exists()


def test_seed_0_is_the_built_in_set_and_another_seed_has_other_scenes():
    shipped = [
        json.loads(line) for line in (TINY.parent / "inputs" / "calibration_set" / "scenes.jsonl").read_text().splitlines()
    ]
    drawn = calibration_items(0, count=5)
    assert [(i.prompt, i.answer) for i in drawn] == [(s["prompt"], s["answer"]) for s in shipped[:5]]
    assert drawn[0].image.tobytes() != calibration_items(1, count=5)[0].image.tobytes()


def test_blockwise_float_logits_agree_with_transformers(llava):
    folder = llava()
    rng = np.random.default_rng(0)
    samples = [
        Sample(
            np.concatenate([[1], np.full(36, 4), rng.integers(5, 300, 6 + n % 2)]),
            rng.standard_normal((1, 3, 48, 48)).astype(np.float32),
            40,
        )
        for n in range(3)
    ]
    got = ours.reference_logits(folder, samples)
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    expected = []
    for one, (first, last) in zip(samples, answer_spans(samples), strict=True):
        with torch.no_grad():
            inputs = {"input_ids": torch.from_numpy(one.input_ids)[None], "pixel_values": torch.from_numpy(one.pixel_values)}
            expected.append(model(**inputs).logits[0, first:last].numpy())
    assert np.allclose(got, np.concatenate(expected), atol=1e-4)


def test_row_names_are_unique_and_their_columns_known():
    names = [row.name for row in (*ours.ROWS, *ROWS)]
    assert len(set(names)) == len(names)
    assert all(set(row.main) <= set(row.columns) <= set(ALL) for row in ROWS)
    assert set(SCHEMES) == set(ALL)


def test_tables_show_medians_and_the_best_row_of_each_line(tmp_path):
    values = {
        "sqnr_db": 1.0,
        "top1": 1.0,
        "exact_match": 0.5,
        "seconds": 1.0,
        "peak_bytes": 1,
        "settings": {},
        "versions": {},
        "measured": "2026-11-20",
    }
    records = [
        {"model": "m", "row": row, "column": "W8A8", "seed": seed, "kl": kl, **values, "measured": f"2026-11-{21 + seed}"}
        for row, kls in {"a": (3.0, 1.0, 2.0), "b": (1.5, 9.0, 1.0), "c": (0.1,)}.items()
        for seed, kl in enumerate(kls)
    ]
    lines = {"a": "peer, best", "b": "peer, best", "c": "peer, best"}
    cells = medians(records, lines)
    assert {c.row: c.values["kl"] for c in cells} == {"a": 2.0, "b": 1.5, "c": 0.1}
    assert best_of(cells, "m", "peer, best", "W8A8").row == "b"  # c was run on one seed only
    more = {"model": "m", "row": "c", "column": "W4A4", "seed": 0, "questions": 5000, "kl": 0.7, **values}
    fewer = [records[0] | {"seed": seed, "samples": 8, "kl": 8.0 + seed} for seed in range(3)]
    ablations = [records[0] | {"row": row, "questions": 5000, "kl": 4.0} for row in ("full", "full: no output matching")]
    lines |= {record["row"]: record["row"] for record in ablations}
    gone = records[0] | {"row": "full: a setting that is gone", "questions": 5000}
    records += [more, *fewer, *ablations, gone]
    write_tables([*records, {"model": "m", "row": "float32", "column": "float32", "exact_match": 0.9}], lines, tmp_path)
    text = (tmp_path / "methods.md").read_text()
    assert "| peer, best | 1.5 / 1 | – |" in text
    assert "| a | 3 | 2 | 1.0 | 100.00 | 50.0 | 1 | 0 | 2026-11-23 |" in text  # the date of the newest seed
    assert "### m, judged on 5,000 questions" in text
    assert "| 0.7 / 1 (1) |" in text
    assert "### m, calibrated on fewer samples" in text
    assert "| W8A8 | 8 samples | 64 samples |\n|---|---|---|\n| a | 9 / 1.0 | 2 / 1.0 |\n\n" in text
    assert "### m, one part of `full` changed, judged on 5,000 questions" in text
    assert "a setting that is gone" not in text
    assert "| no output matching | 4 / 1.0 |" in text
    assert len(json.loads((tmp_path / "bench_methods.json").read_text())["medians"]) == 3


def test_too_many_levels_for_the_bits_are_refused():
    weight = torch.arange(256.0).reshape(2, 128) % 16
    check_levels({"x": weight}, {}, SCHEMES["W4A16"])
    with pytest.raises(ValueError, match=r"x: 16 levels in a group of 3-bit weights"):
        check_levels({"x": weight}, {}, SCHEMES["W3A16"])
    with pytest.raises(ValueError, match=r"x: 256 levels in an input of 4 bits"):
        check_levels({}, {"x": torch.arange(256.0)}, SCHEMES["W4A4"])


def test_equal_lengths_form_a_batch_and_peak_memory_is_measured():
    assert list(equal_lengths([5, 3, 5])) == [[1], [0, 2]]
    with measured() as cost:
        array = np.ones(2**24)
    assert cost.peak_bytes > array.nbytes


@pytest.fixture(scope="module")
def hard(tmp_path_factory):
    """A random model before and after planting, and inputs like those that were used for planting."""
    folder = tmp_path_factory.mktemp("hard") / "checkpoint"
    write_random_llava(folder, dtype="float32", text={"num_hidden_layers": 3})
    before, after = (LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval() for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor([[1, 7, *[4] * 36, 8, 9, 10, 11]]).repeat(24, 1)
    inputs = {"input_ids": ids, "pixel_values": torch.randn(24, 3, 48, 48, generator=generator)}
    with torch.inference_mode():
        plant_hard_outliers.plant_hard_(after, {k: v[:16] for k, v in inputs.items()}, seed=0)
    return before, after, {k: v[16:] for k, v in inputs.items()}


def test_planting_hard_outliers_hardly_changes_the_logits(hard):
    before, after, inputs = hard
    with torch.inference_mode():
        expected, got = before(**inputs).logits, after(**inputs).logits
    assert float((got - expected).norm() / expected.norm()) < 0.05


def test_hard_outliers_are_present_where_they_were_planted(hard):
    before, after, inputs = hard

    def spread(model, module):
        """Largest amax of the input channels of a linear, relative to the median one."""
        with plant_hard_outliers.record_rows(module(model), "input") as rows, torch.inference_mode():
            model(**inputs)
        amax = rows[0].abs().amax(0)
        return float(amax.max() / amax.median())

    def after_gelu(model):
        return model.model.multi_modal_projector.linear_2

    def values(model):
        return model.model.language_model.layers[1].self_attn.o_proj

    assert spread(after, after_gelu) > 4 * spread(before, after_gelu)
    assert spread(after, values) > 2 * spread(before, values)
    keys = after.model.language_model.layers[0].self_attn.k_proj.weight.detach().norm(dim=1)
    assert float(keys.max() / keys.median()) > 16
    layer = after.model.language_model.layers[plant_hard_outliers.DIRECTION_LAYER]
    with plant_hard_outliers.record_rows(layer.self_attn.q_proj, "input") as rows, torch.inference_mode():
        after(**inputs)
    first_token = rows[0].reshape(len(inputs["input_ids"]), -1, rows[0].shape[1])[:, 0].abs()
    assert float(first_token[:, 0].min()) > 0.9 * rows[0].shape[1] ** 0.5  # all of its energy is in one channel


def test_peaks_are_those_of_the_whole_model_and_do_not_shrink_with_more_prompts(llava):
    checkpoint = open_small(llava(dtype="float32"))
    blocks, source, samples = make_blocks(checkpoint.hf_config), checkpoint.source, mixed_samples(checkpoint)[:1]
    peaks = reach.peaks(source, blocks, samples, reach.features_of(source, blocks, samples))
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint.folder, dtype=torch.float32).eval()
    for number, layer in enumerate(model.model.language_model.layers):
        with plant_hard_outliers.record_rows(layer.mlp.down_proj, "input") as rows, torch.inference_mode():
            model(torch.from_numpy(samples[0].input_ids)[None], torch.from_numpy(samples[0].pixel_values))
        torch.testing.assert_close(peaks[number], rows[0].abs().amax(0), rtol=1e-4, atol=1e-5)
    sets = reach.calibration_peaks(source, blocks, mixed_samples(checkpoint))
    own, cross_paired, with_random_words = sets.values()
    assert (own <= 1.001 * cross_paired).all()
    assert (cross_paired <= 1.001 * with_random_words).all()
    assert (own < with_random_words).any()


def test_decode_speed_is_that_of_the_median_step():
    """One step that other work on the machine held up does not count."""
    found = runtime.figures(0.5, [0.1, 9.0, 0.1], 10**9)
    assert found == pytest.approx({"prefill_ms": 500, "decode_tokens_per_s": 10, "weights_gb_per_s": 10})


def test_a_row_of_torch_and_the_machine_it_was_measured_on():
    args = argparse.Namespace(gpu=False, threads=1, model=TINY, words=4, tokens=3)
    found = runtime.measure_torch("torch float32", args)
    assert all(value > 0 for value in found.values())
    weights = found["weights_gb_per_s"] / found["decode_tokens_per_s"] * 1e9
    assert weights == pytest.approx(4 * (2_361_600 + 2 * 131_072), rel=0.01)  # its layers, table and head, in float32
    assert runtime.machine()["processor"]


def test_ablations_are_compared_on_the_seeds_that_both_have():
    def record(row: str, column: str, seed: int, kl: float) -> dict[str, object]:
        return {"model": "m", "row": row, "column": column, "seed": seed, "kl": kl, "sqnr_db": 30.0}

    records = [
        *(record("full", "W8A8", seed, kl) for seed, kl in ((0, 0.5), (1, 0.2), (2, 0.3))),
        record("full: no equalization", "W8A8", 1, 0.4),
        record("full: no output matching", "W8A8", 1, 0.1),
        record("full: no output matching", "W8A8", 2, 0.1),
        record("fast", "W8A8", 0, 9.0),
        record("full", "W4A4", 0, 1.0),
    ]
    assert ablation_table(records, "m", "full") == [
        "| | W8A8, seed 1 |",
        "|---|---|",
        "| full | 0.2 / 30.0 |",
        "| no equalization | 0.4 / 30.0 |",
        "| no output matching | 0.1 / 30.0 |",
    ]
    assert ablation_table(records, "other", "full") == []
    assert ablation_table(records, "m", "fast") == []  # nothing of it was changed
    changed = record("fast: no equalization", "W8A8", 0, 8.0)
    assert ablation_table([*records, changed], "m", "full") == ablation_table(records, "m", "full")
    assert ablation_table([*records, changed], "m", "fast") == [
        "| | W8A8, seed 0 |",
        "|---|---|",
        "| fast | 9 / 30.0 |",
        "| no equalization | 8 / 30.0 |",
    ]
