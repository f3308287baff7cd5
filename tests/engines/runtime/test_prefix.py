"""The session behind a prefix: any prompt is answered as without one, and tokens of the prefix are not computed again."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from export_graphs import export_session

from qvlm_export.calibrate.blockwise.blocks import make_blocks
from qvlm_export.calibrate.blockwise.forward import compute_prefix
from qvlm_export.calibrate.errors import PrefixWarning, UserError
from qvlm_export.checkpoints.checkpoint import open_checkpoint
from qvlm_export.engines.config import Limits
from qvlm_export.engines.runtime.session import ContextError, Session

PREFIX = np.array([7, 8, 9, 10], np.int64)
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def plain(llava: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Session:
    """A session on float graphs, so that a prefix must change nothing."""
    folder = tmp_path_factory.mktemp("prefix")
    return export_session(llava(dtype="float32"), folder, "float32", Limits(48, max_batch=3, max_images=1))


@pytest.fixture(scope="module")
def session(plain: Session, llava: Callable[..., Path]) -> Session:
    checkpoint = open_checkpoint(str(llava(dtype="float32")))
    prefix = compute_prefix(make_blocks(checkpoint.hf_config), checkpoint.source, PREFIX)
    return Session(plain.manifest, plain.runner, prefix=prefix)


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", PrefixWarning)
        yield


def prompt(shared: int, own: int, seed: int = 0) -> np.ndarray:
    """A prompt that begins with `shared` tokens of the prefix and goes on with `own` others."""
    return np.concatenate([PREFIX[:shared], np.random.default_rng(seed).integers(20, 300, own)]).astype(np.int64)


@pytest.mark.parametrize(("shared", "own"), [(4, 9), (4, 1), (2, 6), (1, 1), (4, 0), (1, 0)])
def test_logits_are_those_of_the_whole_prompt(session: Session, plain: Session, shared: int, own: int) -> None:
    ids = prompt(shared, own)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PrefixWarning)  # a prompt of a single token shares none
        got = session.logits(ids[None])
    assert got.shape[1] == len(ids)
    np.testing.assert_allclose(got, plain.logits(ids[None]), **CLOSE)


def test_a_prompt_of_raw_tokens_runs_as_a_whole_and_says_so(session: Session, plain: Session) -> None:
    ids = prompt(0, 9)
    with pytest.warns(PrefixWarning, match="does not begin with the 4 tokens behind which the model was calibrated"):
        got = session.logits(ids[None])
    np.testing.assert_array_equal(got, plain.logits(ids[None]))


def test_only_what_follows_the_prefix_is_computed(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    step = session.runner.step

    def watch(ids: np.ndarray, *arguments: Any) -> np.ndarray:
        shapes.append(ids.shape)
        return step(ids, *arguments)

    monkeypatch.setattr(session.runner, "step", watch)
    sequences = session.start([prompt(4, 9), prompt(4, 3, seed=1)])
    assert shapes == [(2, 9)]
    assert [len(tokens) for tokens in sequences.tokens] == [13, 7]


def test_rows_that_share_different_parts_are_answered_as_alone(session: Session, plain: Session) -> None:
    prompts = [prompt(4, 6), prompt(2, 9, seed=1), prompt(1, 3, seed=2)]
    sequences = session.start(prompts)
    together = list(session.generate(sequences, 6, frozenset()))
    for row, ids in enumerate(prompts):
        alone = plain.start([ids])
        steps = list(plain.generate(alone, 6, frozenset()))
        assert [step[row] for step in together] == [step[0] for step in steps]
        assert sequences.tokens[row] == alone.tokens[0]


def test_a_conversation_goes_on_behind_the_prefix(session: Session, plain: Session) -> None:
    first, second = prompt(4, 5), prompt(0, 6, seed=3)
    sequences = session.start([first])
    session.extend(sequences, [second])
    whole = plain.logits(np.concatenate([first, second])[None])
    np.testing.assert_allclose(sequences.logits[0], whole[0, -1], **CLOSE)


def test_the_prefix_counts_towards_the_context(session: Session) -> None:
    session.start([prompt(4, 44)])
    with pytest.raises(ContextError, match="the context would be 49 tokens long, the engine was built for 48"):
        session.start([prompt(4, 45)])
    with pytest.raises(UserError, match="empty"):
        session.start([prompt(0, 0)])


def test_keys_and_values_in_the_cache_are_what_is_attended_to(session: Session) -> None:
    assert session.prefix is not None
    other = replace(session.prefix, values=tuple(values + 1 for values in session.prefix.values))
    changed = Session(session.manifest, session.runner, prefix=other)
    assert not np.allclose(changed.logits(prompt(4, 5)[None])[0, 4:], session.logits(prompt(4, 5)[None])[0, 4:], **CLOSE)


def test_a_shorter_prefix_is_the_beginning_of_a_longer_one(session: Session) -> None:
    assert session.prefix is not None
    first = session.prefix.first(2)
    assert first.token_ids == session.prefix.token_ids[:2]
    assert all(np.array_equal(a, b[:, :2]) for a, b in zip(first.arrays(), session.prefix.arrays(), strict=True))
