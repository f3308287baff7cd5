"""The session: lengths are checked before the cache is written, state survives errors and breaks."""

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


def words(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(5, 300, count).astype(np.int64)


def test_extending_past_the_cache_is_refused_and_changes_nothing(session):
    sequences = session.start([words(40)])
    before, tokens = sequences.logits.copy(), list(sequences.tokens[0])
    with pytest.raises(UserError, match=r"context would be 60 tokens long, the engine was built for 48"):
        session.extend(sequences, [words(20, 1)])
    assert sequences.tokens[0] == tokens
    assert (sequences.logits == before).all()
    session.extend(sequences, [words(8, 1)])
    whole = session.logits(np.concatenate([words(40), words(8, 1)])[None])
    np.testing.assert_allclose(sequences.logits[0], whole[0, -1], rtol=1e-4, atol=1e-4)


def test_a_broken_off_generation_goes_on_where_it_stopped(session):
    whole = [s[0] for s in session.generate(session.start([words(10)]), 8, frozenset())]
    sequences = session.start([words(10)])
    steps = session.generate(sequences, 8, frozenset())
    first = [next(steps)[0] for _ in range(3)]
    steps.close()
    rest = [s[0] for s in session.generate(sequences, 5, frozenset())]
    assert first + rest == whole


def test_generation_stops_at_the_end_of_the_cache(session):
    sequences = session.start([words(LENGTH - 2)])
    assert len(list(session.generate(sequences, 10, frozenset()))) == 2
    assert len(list(session.generate(sequences, 10, frozenset()))) == 0


def test_batched_rows_equal_single_rows(session):
    rows = [words(7, 3), words(19, 4)]
    sampling = Sampling(temperature=0.8, seed=5)
    both = list(session.generate(session.start(rows), 6, frozenset(), Sampling()))
    for number, row in enumerate(rows):
        alone = list(session.generate(session.start([row]), 6, frozenset(), Sampling()))
        assert [s[0] for s in alone] == [s[number] for s in both]
    sampled = [list(session.generate(session.start(rows), 6, frozenset(), sampling)) for _ in range(2)]
    assert sampled[0] == sampled[1]


def test_padding_beyond_the_cache_is_refused_and_changes_nothing(session):
    """The shorter row's padding would be written where no cache is, which TensorRT does in silence."""
    rows = [words(40, 3), words(4, 4)]
    sequences = session.start(rows)
    before = sequences.logits.copy()
    with pytest.raises(UserError, match="padding this batch would reach beyond the 48 tokens of the cache"):
        session.extend(sequences, [words(2, 5), words(10, 6)])
    assert [len(tokens) for tokens in sequences.tokens] == [40, 4]
    session.extend(sequences, [words(2, 5), words(3, 6)])
    alone = session.start([np.concatenate([rows[1], words(3, 6)])])
    assert not np.array_equal(sequences.logits, before)
    np.testing.assert_allclose(sequences.logits[1], alone.logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("token", [-1, 512, 10**9])
def test_a_token_outside_the_vocabulary_is_refused(session, token):
    with pytest.raises(UserError, match=rf"^token {token} is not one of the 512 of this model's vocabulary$"):
        session.logits(np.array([[5, token, 6]]))


def test_images_and_image_tokens_must_agree(session):
    pixels = np.zeros((1, 3, 48, 48), np.float32)
    with pytest.raises(UserError, match="0 image tokens, 1 images"):
        session.logits(words(5)[None], pixels)
    with pytest.raises(UserError, match="36 image tokens, 0 images"):
        session.logits(np.full((1, 36), 4))


def test_shapes_and_limits_are_named(session):
    with pytest.raises(UserError, match="empty"):
        session.logits(np.zeros((1, 0), np.int64))
    with pytest.raises(UserError, match=r"\[2, 5\]"):
        session.logits(np.ones((2, 5), np.int64))
    with pytest.raises(UserError, match="3 prompts at once, the engine was built for 2"):
        session.start([words(3)] * 3)
    with pytest.raises(UserError, match="50 tokens"):
        session.logits(words(50)[None])


def test_runtime_choice_says_why(session):
    manifest = session.manifest
    assert choose_runtime(manifest, "onnxruntime") == ("onnxruntime", "as asked")
    object.__setattr__(manifest, "backend", {"name": "onnx", "version": None, "targets": []})
    assert choose_runtime(manifest, "auto") == ("onnxruntime", "this export has no engine")
    with pytest.raises(UserError, match="has no engine; use --runtime onnxruntime"):
        choose_runtime(manifest, "tensorrt")
    with pytest.raises(UserError, match="unknown; choose one of"):
        choose_runtime(manifest, "cuda")
