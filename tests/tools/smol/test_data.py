"""Sources and files of the smol LLaVA's samples."""

from __future__ import annotations

import numpy as np
import pytest

from qvlm_export.calibrate.checkpoint.samples import Sample
from tools.bench.data import load_samples, save_samples
from tools.peers.common import inputs_of
from tools.smol import make_data, sources


def test_passages_share_no_word_of_a_tale():
    tales = {name: [f"{name}{number}" for number in range(length)] for name, length in (("a", 50), ("b", 30))}
    passages = sources.cut_passages(tales, [(10, 5)] * 4)
    words = [word for passage in passages for word in f"{passage.beginning} {passage.rest}".split()]
    assert len(words) == len(set(words)) == 60
    assert all(len(passage.beginning.split()) == 10 for passage in passages)
    with pytest.raises(ValueError, match="no tale has 60 words left"):
        sources.cut_passages(tales, [(50, 10)])


def test_calibration_and_test_share_no_photograph_and_no_question():
    for table in (sources.PHOTOS, sources.QUESTIONS):
        assert not set(table["calib"]) & set(table["test"])
    assert len(set(sources.QUESTIONS["calib"])) == len(make_data.SEEDS) * make_data.CALIBRATION.questions
    assert len(set(sources.QUESTIONS["test"])) == make_data.TEST.questions


def test_answers_end_with_a_sentence():
    assert make_data.whole_sentences(" One. Two! Thr") == "One. Two!"
    assert make_data.whole_sentences("a red ring ") == "a red ring"
    assert make_data.whole_sentences("It is.\n\nWhy? It is. No, it is not.") == "It is.\n\nWhy?"
    assert make_data.whole_sentences("About 1.5 meters. And") == "About 1.5 meters."


def test_one_text_in_four_has_no_picture(monkeypatch):
    monkeypatch.setattr(sources, "photo_crops", lambda *_: ["crop"] * 8)
    items = [make_data.Item("english", "text", None, None)] * 8
    pictures = [item.image for item in make_data.add_pictures(items, "test", 0, None)]
    assert [number for number, picture in enumerate(pictures) if picture is None] == [0, 4]
    assert pictures.count("crop") == 4


def test_samples_without_a_picture_are_read_back_unchanged(tmp_path):
    pixels = np.random.default_rng(0).standard_normal((1, 3, 2, 2)).astype(np.float32)
    none = np.zeros((0, 3, 1, 1), np.float32)
    samples = [Sample(np.arange(3), none, 1), Sample(np.arange(4), pixels, 2), Sample(np.arange(2), none, 1)]
    save_samples(tmp_path / "data.npz", samples)
    for before, after in zip(samples, load_samples(tmp_path / "data.npz"), strict=True):
        assert np.array_equal(before.input_ids, after.input_ids)
        assert len(before.pixel_values) == len(after.pixel_values)
        assert before.answer_start == after.answer_start
    assert np.array_equal(load_samples(tmp_path / "data.npz")[1].pixel_values, pixels)
    for sample, given in zip(samples, inputs_of(tmp_path / "data.npz"), strict=True):  # as the peers read them
        assert np.array_equal(given["input_ids"][0], sample.input_ids)
        assert ("pixel_values" in given) == (len(sample.pixel_values) == 1)
        assert "pixel_values" not in given or np.array_equal(given["pixel_values"], pixels)
    with pytest.raises(ValueError, match="several images"):
        save_samples(tmp_path / "data.npz", [Sample(np.arange(3), np.concatenate([pixels, pixels]), 1)])
