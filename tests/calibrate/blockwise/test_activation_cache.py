"""The activation cache returns what was stored, from memory and from disk, and 16-bit storage costs little accuracy."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_export import mixed_samples, open_small, schemes_of

from qvlm_export.calibrate.blockwise.activation_cache import (
    CachedActivations,
    cache_activations,
    open_cached_activations,
    to_16_bits,
    zeros_of_cached_shapes,
)
from qvlm_export.calibrate.blockwise.blocks import make_blocks
from qvlm_export.calibrate.blockwise.job import CalibrationJob
from qvlm_export.calibrate.blockwise.resume import CalibrationWork
from qvlm_export.calibrate.calibrators.search import calibrate_search
from qvlm_export.calibrate.checkpoint.calibrated import CalibratedCheckpoint, CalibratedWriter
from qvlm_export.calibrate.errors import UserError
from qvlm_export.calibrate.quantization.config import SearchConfig


def are_equal(cached: CachedActivations, tensors: list[torch.Tensor]) -> bool:
    return len(cached) == len(tensors) and all(torch.equal(a, b) for a, b in zip(cached, tensors, strict=True))


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5), st.integers(1, 7)), max_size=5), st.integers(0, 400))
def test_tensors_are_the_same_from_memory_and_from_disk(tmp_path, shapes, memory_bytes):
    tensors = [torch.randn(shape) for shape in shapes]
    cached = cache_activations(iter(tensors), tmp_path / "a", narrow=False, memory_bytes=memory_bytes)
    reopened = open_cached_activations(json.loads(json.dumps(cached.describe())), tmp_path / "a")
    assert are_equal(cached, tensors)
    assert are_equal(reopened, tensors)
    assert are_equal(reopened[1:], tensors[1:])
    assert [x.shape for x in zeros_of_cached_shapes(cached.describe())] == [x.shape for x in tensors]


def test_narrow_activations_have_16_bits_on_disk_and_in_memory(tmp_path):
    tensors = [torch.randn(1, 5, 64), torch.full((1, 2, 3), 1e5)]  # the second is beyond float16
    cached = cache_activations(iter(tensors), tmp_path / "a", narrow=True, memory_bytes=2**20)
    assert [item["dtype"] for item in cached.describe()] == ["float16", "bfloat16"]
    assert (tmp_path / "a").stat().st_size == 2 * (5 * 64 + 6)
    expected = [to_16_bits(x).float() for x in tensors]
    assert are_equal(cached, expected)
    assert are_equal(open_cached_activations(cached.describe(), tmp_path / "a"), expected)
    assert torch.allclose(cached[1], tensors[1], rtol=2**-8)


def test_changing_a_read_tensor_in_place_does_not_change_the_cache(tmp_path):
    cached = cache_activations([torch.ones(1, 2, 3)], tmp_path / "a", narrow=False, memory_bytes=2**20)
    cached[0].zero_()
    assert bool((cached[0] == 1).all())


def test_reading_a_truncated_file_names_the_file(tmp_path):
    cached = cache_activations([torch.ones(1, 2, 3)], tmp_path / "a", narrow=False, memory_bytes=0)
    (tmp_path / "a").write_bytes(b"1234")
    with pytest.raises(UserError, match=r"a: is shorter than it was written; delete the work folder"):
        _ = cached[0]


def test_16_bit_activations_change_block_errors_by_at_most_10_percent(llava, tmp_path):
    """Relative to the blocks' errors with 32-bit activations; 5 % was observed, where the errors are 1e-3 at 4 bits."""
    checkpoint, errors = open_small(llava()), {}
    for narrow in (False, True):
        folder = tmp_path / str(narrow)
        job = CalibrationJob(
            make_blocks(checkpoint.hf_config),
            checkpoint.source,
            schemes_of(checkpoint, "int4"),
            mixed_samples(checkpoint),
            CalibrationWork(folder, narrow=narrow, memory_bytes=0),
        )
        writer = CalibratedWriter(folder / "calibrated")
        method = SearchConfig(equalization="none")
        writer.finish(checkpoint.config_json, calibrate_search(job, writer, lambda *_: None, method))
        errors[narrow] = [block["error"] for block in CalibratedCheckpoint(folder / "calibrated").summary["blocks"]]
    assert errors[True] == pytest.approx(errors[False], rel=0.1)
    assert errors[True] != errors[False]  # 16 bits were really used
