"""The session: lengths are checked before the cache is written, and sequences stay usable after errors and interruptions."""

from __future__ import annotations

import numpy as np
import pytest
from export_graphs import export_session

from qvlm_export.calibrate.errors import UserError
from qvlm_export.engines.config import Limits
from qvlm_export.engines.runtime.open import choose_runtime
from qvlm_export.engines.runtime.sampling import Sampling

LENGTH = 48


@pytest.fixture(scope="module")
def session(llava, tmp_path_factory):
    folder = tmp_path_factory.mktemp("session")
    return export_session(llava(dtype="float32"), folder, "float32", Limits(LENGTH, max_batch=2, max_images=1))


def random_tokens(count: int, seed: int = 0) -> np.ndarray:
    """Random text tokens, int64 [count]."""
    return np.random.default_rng(seed).integers(5, 300, count).astype(np.int64)


def test_extending_past_the_cache_is_refused_and_changes_nothing(session):
    sequences = session.start([random_tokens(40)])
    before, tokens = sequences.logits.copy(), list(sequences.tokens[0])
    with pytest.raises(UserError, match=r"context would be 60 tokens long, the engine was built for 48"):
        session.extend(sequences, [random_tokens(20, 1)])
    assert sequences.tokens[0] == tokens
    assert (sequences.logits == before).all()
    session.extend(sequences, [random_tokens(8, 1)])
    whole = session.logits(np.concatenate([random_tokens(40), random_tokens(8, 1)])[None])
    np.testing.assert_allclose(sequences.logits[0], whole[0, -1], rtol=1e-4, atol=1e-4)


def test_an_interrupted_generation_continues_where_it_stopped(session):
    whole = [s[0] for s in session.generate(session.start([random_tokens(10)]), 8, frozenset())]
    sequences = session.start([random_tokens(10)])
    steps = session.generate(sequences, 8, frozenset())
    first = [next(steps)[0] for _ in range(3)]
    steps.close()
    rest = [s[0] for s in session.generate(sequences, 5, frozenset())]
    assert first + rest == whole


def test_generation_stops_at_the_end_of_the_cache(session):
    sequences = session.start([random_tokens(LENGTH - 2)])
    assert len(list(session.generate(sequences, 10, frozenset()))) == 2
    assert len(list(session.generate(sequences, 10, frozenset()))) == 0


def test_batched_rows_equal_single_rows(session):
    rows = [random_tokens(7, 3), random_tokens(19, 4)]
    sampling = Sampling(temperature=0.8, seed=5)
    both = list(session.generate(session.start(rows), 6, frozenset(), Sampling()))
    for number, row in enumerate(rows):
        alone = list(session.generate(session.start([row]), 6, frozenset(), Sampling()))
        assert [s[0] for s in alone] == [s[number] for s in both]
    sampled = [list(session.generate(session.start(rows), 6, frozenset(), sampling)) for _ in range(2)]
    assert sampled[0] == sampled[1]


def test_padding_beyond_the_cache_is_refused_and_changes_nothing(session):
    """The padding of the shorter row would be written beyond the cache, which TensorRT does without an error."""
    rows = [random_tokens(40, 3), random_tokens(4, 4)]
    sequences = session.start(rows)
    before = sequences.logits.copy()
    with pytest.raises(UserError, match="padding this batch would reach beyond the 48 tokens of the cache"):
        session.extend(sequences, [random_tokens(2, 5), random_tokens(10, 6)])
    assert [len(tokens) for tokens in sequences.tokens] == [40, 4]
    session.extend(sequences, [random_tokens(2, 5), random_tokens(3, 6)])
    alone = session.start([np.concatenate([rows[1], random_tokens(3, 6)])])
    assert not np.array_equal(sequences.logits, before)
    np.testing.assert_allclose(sequences.logits[1], alone.logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("token", [-1, 512, 10**9])
def test_a_token_outside_the_vocabulary_is_refused(session, token):
    with pytest.raises(UserError, match=rf"^token {token} is not one of the 512 of this model's vocabulary$"):
        session.logits(np.array([[5, token, 6]]))


def test_images_and_image_tokens_must_agree(session):
    pixels = np.zeros((1, 3, 48, 48), np.float32)
    with pytest.raises(UserError, match="0 image tokens, 1 images"):
        session.logits(random_tokens(5)[None], pixels)
    with pytest.raises(UserError, match="36 image tokens, 0 images"):
        session.logits(np.full((1, 36), 4))


def test_errors_about_shapes_and_limits_name_the_numbers(session):
    with pytest.raises(UserError, match="empty"):
        session.logits(np.zeros((1, 0), np.int64))
    with pytest.raises(UserError, match=r"\[2, 5\]"):
        session.logits(np.ones((2, 5), np.int64))
    with pytest.raises(UserError, match="3 prompts at once, the engine was built for 2"):
        session.start([random_tokens(3)] * 3)
    with pytest.raises(UserError, match="50 tokens"):
        session.logits(random_tokens(50)[None])


def test_the_choice_of_runtime_comes_with_its_reason(session):
    manifest = session.manifest
    assert choose_runtime(manifest, "onnxruntime") == ("onnxruntime", "as asked")
    object.__setattr__(manifest, "backend", {"name": "onnx", "version": None, "targets": []})
    assert choose_runtime(manifest, "auto") == ("onnxruntime", "this export has no engine")
    with pytest.raises(UserError, match="has no engine; use --runtime onnxruntime"):
        choose_runtime(manifest, "tensorrt")
    with pytest.raises(UserError, match="unknown; choose one of"):
        choose_runtime(manifest, "cuda")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_refused(session, monkeypatch, value):
    """At the prompt nothing changes; while tokens are generated, the sequence stays as it was before the bad step."""
    sequences = session.start([random_tokens(10), random_tokens(7)])
    lengths, real = list(map(len, sequences.tokens)), session.runner.step

    def overflow(*arguments):
        logits = real(*arguments)
        logits[1, -1, 5] = value
        return logits

    monkeypatch.setattr(session.runner, "step", overflow)
    words = r"^the logits are NaN or infinite \(onnxruntime on cpu\).* range of float32.*; qvlm-validate --per-layer"
    with pytest.raises(UserError, match=words):
        session.extend(sequences, [random_tokens(3), random_tokens(3)])
    assert list(map(len, sequences.tokens)) == lengths
    steps = session.generate(sequences, 4, frozenset())
    next(steps)
    with pytest.raises(UserError, match=words):
        next(steps)
    assert list(map(len, sequences.tokens)) == [length + 1 for length in lengths]


def test_logits_of_rows_that_have_ended_do_not_matter(session, monkeypatch):
    sequences = session.start([random_tokens(10), random_tokens(7)])
    ends, goes_on = sequences.logits.argmax(-1)
    real = session.runner.step

    def overflow(*arguments):
        logits = real(*arguments)
        logits[0] = np.nan
        return logits

    monkeypatch.setattr(session.runner, "step", overflow)
    assert ends != goes_on
    assert len(list(session.generate(sequences, 4, frozenset({int(ends)})))) >= 2


def test_whole_logits_are_refused_unless_the_caller_counts_them(session, monkeypatch):
    real = session.runner.step

    def overflow(*arguments):
        logits = real(*arguments)
        logits[0, 2] = np.inf
        return logits

    monkeypatch.setattr(session.runner, "step", overflow)
    with pytest.raises(UserError, match="NaN or infinite"):
        session.logits(random_tokens(5)[None])
    assert np.isinf(session.logits(random_tokens(5)[None], require_finite=False)).any()
