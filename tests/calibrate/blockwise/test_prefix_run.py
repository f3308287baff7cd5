"""The decoder behind a prefix: the float model does not change, whatever of a prompt is computed beforehand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import copy_checkpoint
from small_export import make_sample, open_small
from transformers import LlavaForConditionalGeneration

from qvlm_export.calibrate.blockwise.blocks import make_blocks
from qvlm_export.calibrate.blockwise.forward import (
    DecoderRun,
    compute_prefix,
    float_step,
    run_decoder_blocks,
    sliding_window_mask,
)
from qvlm_export.calibrate.checkpoint.prefix import cut_prefix
from qvlm_export.calibrate.checkpoint.samples import Sample
from qvlm_export.checkpoints.checkpoint import Checkpoint

Llava = Callable[..., Path]


@pytest.fixture(params=[None, 6], ids=["llama", "mistral with a window"])
def checkpoint(request: pytest.FixtureRequest, llava: Llava, tmp_path: Path) -> Checkpoint:
    if request.param is None:
        return open_small(llava())

    def edit(config: dict[str, Any]) -> None:
        config["text_config"] |= {"model_type": "mistral", "sliding_window": request.param}

    return open_small(copy_checkpoint(llava(), tmp_path / "mistral", edit))


def text_samples(checkpoint: Checkpoint) -> list[Sample]:
    """Texts of different lengths with the same first five tokens."""
    samples = [make_sample(checkpoint, words=words, images=0, seed=words) for words in (9, 17, 12)]
    first = samples[0].input_ids[:5]
    return [replace(s, input_ids=np.concatenate([first, s.input_ids[5:]])) for s in samples]


def hidden(checkpoint: Checkpoint, samples: list[Sample], prefix: Any = None) -> list[torch.Tensor]:
    blocks = replace(make_blocks(checkpoint.hf_config), prefix=prefix)
    none = [torch.zeros(0, 1)] * len(samples)
    return list(run_decoder_blocks(blocks, checkpoint.source, samples, none, float_step(checkpoint.source)))


@pytest.mark.parametrize("count", [1, 5])
def test_what_follows_a_prefix_is_what_it_was(checkpoint: Checkpoint, count: int) -> None:
    samples = text_samples(checkpoint)
    ids = samples[0].input_ids[:count]
    prefix = compute_prefix(make_blocks(checkpoint.hf_config), checkpoint.source, ids)
    for whole, behind in zip(hidden(checkpoint, samples), hidden(checkpoint, cut_prefix(samples, ids), prefix), strict=True):
        assert behind.shape[1] == whole.shape[1] - count
        torch.testing.assert_close(behind, whole[:, count:], rtol=1e-4, atol=1e-4)


def test_keys_and_values_are_those_of_transformers(checkpoint: Checkpoint) -> None:
    ids = text_samples(checkpoint)[0].input_ids[:5]
    prefix = compute_prefix(make_blocks(checkpoint.hf_config), checkpoint.source, ids)
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint.folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        cache = model(input_ids=torch.from_numpy(ids)[None], use_cache=True).past_key_values
    for layer, (keys, values) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
        for got, expected in ((keys, cache.layers[layer].keys), (values, cache.layers[layer].values)):
            np.testing.assert_allclose(got, expected[0].numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [None, 2, 4, 100])
@pytest.mark.parametrize("start", [0, 3])
def test_the_mask_counts_positions_from_the_first_of_the_prefix(window: int | None, start: int) -> None:
    mask = sliding_window_mask(5, window, start=start)
    if mask is None:
        assert start == 0
        assert window is None or window >= 5
        return
    assert mask.shape == (1, 1, 5, start + 5)
    for query in range(5):
        for key in range(start + 5):
            age = start + query - key
            assert bool(mask[0, 0, query, key]) == (0 <= age < (window or 100))


def test_values_are_divided_by_head_and_channel() -> None:
    values = torch.arange(24.0).reshape(1, 2, 3, 4) + 1
    run = DecoderRun(torch.nn.Identity(), None, torch.ones_like(values), values)
    factors = torch.arange(8.0) + 1
    divided = run.divide_values(factors).values
    assert divided is not None
    for head in range(2):
        torch.testing.assert_close(divided[0, head], values[0, head] / factors[4 * head : 4 * head + 4])
    assert DecoderRun(torch.nn.Identity(), None).divide_values(factors).values is None
