"""The prefix cache: samples behind a prefix, its file, and what a prompt shares with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from qvlm_export.calibrate.checkpoint.prefix import (
    PrefixCache,
    count_shared,
    cut_prefix,
    put_first,
    read_prefix,
    write_prefix,
)
from qvlm_export.calibrate.checkpoint.samples import Sample
from qvlm_export.calibrate.errors import UserError

SHAPE = (2, 3, 4)  # layers, kv_heads, head_dim


def make_prefix(tokens: int = 5) -> PrefixCache:
    rng = np.random.default_rng(0)
    keys, values = (tuple(rng.standard_normal((3, tokens, 4)).astype(np.float32) for _ in range(2)) for _ in range(2))
    return PrefixCache(tuple(range(10, 10 + tokens)), keys, values)


def make_sample(*ids: int) -> Sample:
    return Sample(np.array(ids, np.int64), np.zeros((0, 3, 1, 1), np.float32), len(ids) - 1)


def test_samples_lose_their_first_tokens() -> None:
    (cut,) = cut_prefix([make_sample(7, 8, 1, 2, 3)], (7, 8))
    assert cut.input_ids.tolist() == [1, 2, 3]
    assert cut.answer_start == 2


@pytest.mark.parametrize("ids", [(7, 9, 1, 2), (7, 8), (7,), (8, 7, 1)])
def test_a_sample_that_begins_otherwise_is_named(ids: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"^sample 2 does not begin with the 2 tokens of the prefix; .* or set --prefix 0$"):
        cut_prefix([make_sample(7, 8, 1), make_sample(*ids)], (7, 8))


@given(st.lists(st.integers(0, 2), max_size=6), st.lists(st.integers(0, 2), max_size=6))
def test_what_a_prompt_shares_is_counted_up_to_its_last_token(prefix: list[int], prompt: list[int]) -> None:
    count = count_shared(prefix, prompt)
    assert prefix[:count] == prompt[:count]
    assert count <= max(len(prompt) - 1, 0)
    if count < min(len(prefix), len(prompt) - 1):
        assert prefix[count] != prompt[count]


@pytest.mark.parametrize(("float_type", "error"), [("float16", 1e-3), ("bfloat16", 8e-3), ("float32", 0)])
def test_a_file_gives_back_what_was_written(tmp_path: Path, float_type: str, error: float) -> None:
    prefix, path = make_prefix(), tmp_path / "prefix.safetensors"
    write_prefix(path, prefix, float_type)
    read = read_prefix(path, SHAPE)
    assert read.token_ids == prefix.token_ids
    for got, expected in zip(read.arrays(), prefix.arrays(), strict=True):
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, expected, rtol=error)


@pytest.mark.parametrize(
    ("shape", "words"),
    [((3, 3, 4), "lacks key_values.2.key"), ((2, 2, 4), r"has shape \[3, 5, 4\]"), ((2, 3, 8), r"needs \[3, 5, 8\]")],
)
def test_the_file_of_another_model_is_refused(tmp_path: Path, shape: tuple[int, int, int], words: str) -> None:
    path = tmp_path / "prefix.safetensors"
    write_prefix(path, make_prefix(), "float16")
    with pytest.raises(UserError, match=words):
        read_prefix(path, shape)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "prefix.safetensors"
    with pytest.raises(UserError, match=r"prefix.safetensors"):
        read_prefix(path, SHAPE)
    write_prefix(path, make_prefix(), "float16")
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    with pytest.raises(UserError, match="cannot be read as a prefix cache"):
        read_prefix(path, SHAPE)
    path.write_bytes(whole)
    tensors = load_file(path)
    tensors["key_values.1.value"][0, 0, 0] = np.nan
    save_file(tensors, path)
    with pytest.raises(UserError, match=r"key_values\.1\.value has .* not finite"):
        read_prefix(path, SHAPE)


def test_arrays_have_the_order_of_a_cache() -> None:
    prefix = make_prefix()
    key, value = prefix.arrays()[2:]
    assert key is prefix.keys[1]
    assert value is prefix.values[1]
    cache = put_first(np.ones((2, 3, 7, 4), np.float32), key)
    np.testing.assert_array_equal(cache[1, :, :5], key)
    assert (cache[:, :, 5:] == 1).all()
    assert len(replace(prefix, token_ids=(1, 2))) == 2
