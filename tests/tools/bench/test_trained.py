"""The trained model in the methods benchmark: hidden states behind a prefix, scores of a cell, options, tables."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from transformers import LlavaForConditionalGeneration

from qvlm_export.inputs.samples import load_processor
from tools.bench import methods, ours
from tools.bench.cells import trained
from tools.bench.cells.evaluate import answer_logits, hidden_states
from tools.bench.data import calibration_items, load_samples, save_samples
from tools.bench.tables import write_tables
from tools.peers import common
from tools.smol.samples import encode_sample
from tools.smol.scores import KINDS


@pytest.fixture(scope="module")
def folders(llava, tmp_path_factory):
    """A random checkpoint and a data folder like that of make_data: a sample of each kind, in English without picture."""
    model, data = llava(dtype="float32"), tmp_path_factory.mktemp("data")
    processor = load_processor(model)
    samples = [
        encode_sample(processor, item.prompt, item.answer, None if kind == "english" else item.image)
        for kind, item in zip(KINDS, calibration_items(0, count=len(KINDS)), strict=True)
    ]
    for name in ("calibration-0", "calibration-1", "test"):
        save_samples(data / f"{name}.npz", samples)
        (data / f"{name}.jsonl").write_text("".join(json.dumps({"kind": kind}) + "\n" for kind in KINDS))
    return model, data


def test_hidden_states_of_all_programs_agree_and_those_of_the_prefix_are_unknown(folders):
    model, data = folders
    samples, (checkpoint, blocks) = load_samples(data / "test.npz"), ours.load_model(model)
    theirs = common.hidden_states(common.load_model(model), data / "test.npz")
    step = ours.float_step(checkpoint.source)
    own = hidden_states(checkpoint, blocks, checkpoint.source, step, samples)
    np.testing.assert_allclose(own, theirs, atol=1e-4)
    tokens = ours.find_prefix(model)
    assert len(tokens) > 0
    behind = ours.replace(blocks, prefix=ours.compute_prefix(blocks, checkpoint.source, tokens))
    found = hidden_states(checkpoint, behind, checkpoint.source, step, samples)
    places = np.concatenate([np.arange(len(sample.input_ids)) for sample in samples])
    assert (np.isnan(found).all(1) == (places < len(tokens))).all()
    np.testing.assert_allclose(found[places >= len(tokens)], theirs[places >= len(tokens)], atol=1e-4)
    logits = [answer_logits(checkpoint, b, checkpoint.source, step, samples) for b in (blocks, behind)]
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-3)


def row_of(name):
    return next(row for row in ours.ROWS if row.name == name)


def test_a_cell_says_whether_it_has_a_prefix_and_how_many_inputs_stay_float(folders):
    model, data = folders
    samples = load_samples(data / "test.npz")
    strict = []

    def calibrate(job, writer, progress):
        strict.append(job.strict)
        summary = ours.calibrate_rtn(job, writer, progress)
        return summary | {"blocks": [{"fallbacks": ["a", "b"]}, {"fallbacks": ["c"]}, {}]}

    row = ours.OurRow("new", "new", calibrate)
    hidden, record = ours.run_cell(model, row, "W8A8", samples, samples, common.HIDDEN)
    assert record["settings"]["prefix"] == len(ours.find_prefix(model))
    assert record["settings"]["fallbacks"] == 3
    assert record["settings"]["linears"] == len(ours.schemes_of(*ours.load_model(model), "W8A8"))
    assert np.isnan(hidden).any()
    for changed in (row_of("fast: no prefix"), row_of("fast: strict")):
        row = ours.replace(changed, calibrator=calibrate)
        hidden, record = ours.run_cell(model, row, "W8A8", samples, samples, common.HIDDEN)
        assert np.isnan(hidden).any() == row.prefix == (record["settings"]["prefix"] > 0)
    assert strict == [False, False, True]


def test_a_cell_is_scored_from_its_hidden_states(folders, tmp_path):
    model, data = folders
    bench = methods.open_trained(model, data, tmp_path, tmp_path)
    (exact,) = bench.results.current()
    assert (exact["kl"], exact["top1"], exact["questions"]) == (0, 1, len(KINDS))
    assert exact["perplexity"] == exact["float_perplexity"] > 1
    noise = np.random.default_rng(0).standard_normal((1, 1)).astype(np.float32)
    hidden = np.load(data / "float.npy") * (1 + 0.3 * noise)
    places = np.concatenate([np.arange(len(sample.input_ids)) for sample in load_samples(data / "test.npz")])
    hidden[places < len(ours.find_prefix(model))] = np.nan  # of prefixes, which are not scored
    np.save(tmp_path / "cell.npy", hidden)
    (tmp_path / "cell.json").write_text(json.dumps({"seconds": 2.0, "settings": {}}))
    cell = methods.Cell(model.name, "rtn", "W8A8", 0, len(KINDS))
    bench.add_cell(cell, tmp_path / "cell.npy")
    record = bench.results.get(cell, bench.model_hash)
    assert 0 < record["kl"] < 10
    assert record["kl"] == record["kinds"]["all"]["text"]["kl"]
    assert record["processor"]
    tokens = [record["kinds"][kind]["text"]["tokens"] for kind in ("all", *KINDS)]
    assert tokens[0] == sum(tokens[1:])


def test_options_choose_what_is_stored_and_scored(monkeypatch, folders, tmp_path, capsys):
    model, data = folders
    options = {"model": "m", "calibration": "c", "evaluation": "e", "out": "o", "column": "W8A8", "row": "gptq"}
    command = ["x", *(part for key, value in options.items() for part in (f"--{key}", value))]
    monkeypatch.setattr(sys, "argv", command)
    assert common.parse_job("").states == common.LOGITS
    monkeypatch.setattr(sys, "argv", [*command, "--states", "hidden"])
    assert common.parse_job("").states == common.HIDDEN
    bench = methods.open_trained(model, data, tmp_path, tmp_path)
    assert (bench.states, bench.evaluation, bench.data) == (common.HIDDEN, data / "test.npz", data)
    validation = methods.open_trained(model, data, tmp_path, tmp_path, validation=True)
    assert validation.evaluation == data / "calibration-1.npz"
    assert validation.questions == len(load_samples(validation.evaluation))
    monkeypatch.setattr(sys, "argv", ["x", "--data", "d", "--validation"])
    assert methods.parse_args().seeds == [0]
    for command, message in ((["--validation"], "needs --data"), (["--data", "d", "--questions", "10"], "fixed sizes")):
        monkeypatch.setattr(sys, "argv", ["x", *command])
        with pytest.raises(SystemExit):
            methods.parse_args()
        assert message in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["x", "--data", "d", "--questions", "10"])
    with pytest.raises(SystemExit):
        methods.parse_args()
    assert "sets of fixed sizes" in capsys.readouterr().err


def test_our_program_stores_hidden_states(folders, tmp_path, monkeypatch, capsys):
    model, data = folders
    options = {"row": "rtn", "cells": "W4A16/0", "model": model, "data": data, "evaluation": data / "test.npz"}
    options |= {"out": tmp_path, "states": "hidden"}
    monkeypatch.setattr(sys, "argv", ["x", *(str(part) for key, value in options.items() for part in (f"--{key}", value))])
    monkeypatch.setattr(torch, "manual_seed", lambda _: None)
    ours.main()
    tokens = sum(len(sample.input_ids) for sample in load_samples(data / "test.npz"))
    assert len(np.load(tmp_path / "W4A16-0.npy")) == tokens
    assert capsys.readouterr().out.split() == ["W4A16/0", str(tmp_path / "W4A16-0.npy")]


def record(row, column, seed, kl, **settings):
    score = {"tokens": 100, "kl": kl, "kl_error": 0.1 * kl, "top1": 90.0, "perplexity": 9.0, "float_perplexity": 8.0}
    kinds = {kind: {"text": score, "answer": score} for kind in ("all", *KINDS)}
    cell = {"model": "smol", "row": row, "column": column, "seed": seed, "questions": 208, "model_hash": "a"}
    cost = {"seconds": 60.0, "peak_bytes": 2**30, "settings": settings, "versions": {}, "measured": "2026-11-30"}
    own = {key: score[key] for key in ("kl", "kl_error", "perplexity", "float_perplexity")}
    return {**cell, **cost, **own, "top1": 0.9, "kinds": kinds, "processor": "a processor"}


def test_the_trained_model_comes_first_on_the_page(tmp_path):
    lines = {row.name: row.line for row in (*ours.ROWS, *methods.PEER_ROWS)}
    exact = {**record("float32", "float32", 0, 0.0), "perplexity": 8.0}
    own = {"linears": 70, "prefix": 24}
    records = [
        exact,
        record("fast", "W8A8", 0, 0.01, fallbacks=7, **own),
        record("fast: strict", "W8A8", 0, 0.005, fallbacks=0, **own),
        record("rtn", "W8A8", 0, 0.5, fallbacks=0, **own),
        record("modelopt: smoothquant 0.5", "W8A8", 0, 0.03),
        record("modelopt: max", "W8A8", 0, 0.9),
        record("llmcompressor: gptq", "W8A8", 0, 0.04),
        record("fast", "W4A16", 0, 0.02, fallbacks=0, **own),
    ]
    section = trained.make_section([*records, {"model": "tiny", "row": "rtn"}], lines)
    tiny = {"model": "tiny", "row": "rtn", "column": "W8A8", "seed": 0, "kl": 0.1, "sqnr_db": 1.0, "top1": 1.0}
    tiny |= {"exact_match": 0.5, "seconds": 1.0, "peak_bytes": 1, "measured": "2026-11-27", "settings": {}}
    tiny |= {"versions": {"qvlm-export": "0"}}
    exact_tiny = {"model": "tiny", "row": "float32", "column": "float32", "exact_match": 0.9}
    write_tables([tiny, exact_tiny], lines, tmp_path, section)
    text = (tmp_path / "methods.md").read_text()
    assert text.index("## smol") < text.index("## tiny")
    assert "One calibration seed so far." in text
    assert "processor: a processor" in text
    summary = text[text.index("| | W8A8 | W4A16 |") :]
    assert summary.splitlines()[2:10] == [
        "| float | 0 / 100 / 8.0 | 0 / 100 / 8.0 |",
        "| round-to-nearest, absmax | 0.5 / 90.0 / 9.0 | – |",
        "| modelopt, best as released | 0.03 / 90.0 / 9.0 | – |",
        "| llmcompressor, best | 0.04 / 90.0 / 9.0 | – |",
        "| ours, fast | 0.01 / 90.0 / 9.0 | 0.02 / 90.0 / 9.0 |",
        "| fast, strict | 0.005 / 90.0 / 9.0 | – |",
        "| KL of the best peer / KL of `fast` | 3 | – |",
        "| KL of the best peer / KL of `fast: strict` | 6 | – |",
    ]
    assert "`fast` at W8A8: 7 of 70 linears (seed 0)" in text
    detail = [line for line in text.splitlines() if line.startswith("| fast: strict | 1 | 0.005 | 0.0005 | 90.00 | 9.00 |")]
    assert detail[0].endswith("| 24 | 0 | 60 | 1024 | 2026-11-30 |")
    assert "were measured before that, without both. They are of `tiny`." in text
    content = json.loads((tmp_path / "bench_methods.json").read_text())
    assert content["settings"]["smol, fast, W8A8"]["fallbacks"] == 7
    assert {cell["model"] for cell in content["medians"]} == {"smol", "tiny"}


def test_what_was_scored_on_the_validation_set_has_a_section_of_its_own():
    lines, rows = {row.name: row.line for row in ours.ROWS}, {"fast": 0.3, "fast: strict": 0.2}
    tested = [record("float32", "float32", 0, 0.0), record("fast", "W8A8", 0, 0.1, linears=70)]
    chosen = [record("float32", "float32", 0, 0.0), *(record(row, "W8A8", 0, kl, linears=70) for row, kl in rows.items())]
    section = trained.make_section([*({**r, "questions": 64} for r in chosen), *tested], lines)
    text = "\n".join(section.text)
    assert text.index("## smol\n") < text.index("## smol, validation")
    assert "scored on the 64 of seed 1" in text
    assert "| ours, fast | 0.1 / 90.0 / 9.0 |" in text
    found = [line.split(" | ") for line in text[text.index("W8A8, validation") :].splitlines() if "fast" in line]
    assert [line[2] for line in found] == ["0.2", "0.3"]
    assert [(cell.row, cell.values["kl"]) for cell in section.cells] == [("fast", 0.1)]
    assert len(section.records) == 5


def test_more_seeds_give_medians():
    lines = {row.name: row.line for row in ours.ROWS}
    records = [record("fast", "W8A8", seed, kl, fallbacks=seed, linears=70) for seed, kl in enumerate((0.1, 0.3, 0.2))]
    text = "\n".join(trained.make_section([record("float32", "float32", 0, 0.0), *records], lines).text)
    assert "Medians over 3 calibration seeds" in text
    assert "| ours, fast | 0.2 / 90.0 / 9.0 |" in text
    assert "1 of 70 linears (seed 1), 2 of 70 linears (seed 2)" in text


def test_checks_of_peers_look_at_a_sample_with_a_picture(folders):
    inputs = common.inputs_of(folders[1] / "test.npz")
    without = [one for one in inputs if "pixel_values" not in one]
    assert len(without) == 1
    assert common.with_picture([*without, *inputs]) is inputs[0]


def test_transformers_gives_the_same_hidden_states(folders):
    model, data = folders
    samples = load_samples(data / "test.npz")
    whole = LlavaForConditionalGeneration.from_pretrained(model, dtype=torch.float32).eval()
    found = common.hidden_states(whole, data / "test.npz")
    with torch.no_grad():
        last = samples[-1]
        inputs = {"input_ids": torch.from_numpy(last.input_ids)[None], "pixel_values": torch.from_numpy(last.pixel_values)}
        logits = whole(**inputs).logits[0].numpy()
        ours_logits = whole.lm_head(torch.from_numpy(found[-len(last.input_ids) :])).numpy()
    np.testing.assert_allclose(ours_logits, logits, atol=1e-3)
