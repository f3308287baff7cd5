"""The float graphs against transformers in float32: prefill, decoding with the static cache, generation."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from export_graphs import export_session
from transformers import LlavaForConditionalGeneration

from qvlm_export.engines.config import Limits

IMAGE_TOKENS, IMAGE_ID = 36, 4
# of the relative L2 error; 1e-6 was measured
TOLERANCE = 1e-4
GEOMETRIES = {"grouped": {"kv_heads": 2}, "full": {"kv_heads": 4}, "tied": {"tie": True}}


def reference(folder) -> LlavaForConditionalGeneration:
    return LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def prompt(rng: np.random.Generator, images: int, words: int) -> np.ndarray:
    """Random token ids, int64 [S], with the tokens of `images` images among them."""
    parts = [[1], rng.integers(5, 300, 3)]
    for _ in range(images):
        parts += [[IMAGE_ID] * IMAGE_TOKENS, rng.integers(5, 300, 2)]
    return np.concatenate([*parts, rng.integers(5, 300, words)]).astype(np.int64)


def pixels(rng: np.random.Generator, images: int) -> np.ndarray:
    return rng.standard_normal((images, 3, 48, 48)).astype(np.float32)


def error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Relative L2 error."""
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def reference_logits(model, ids: np.ndarray, images: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        pixel_values = torch.tensor(images) if len(images) else None
        return model(input_ids=torch.tensor(ids)[None], pixel_values=pixel_values).logits.numpy()


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("images", [0, 1, 2])
def test_prefill_logits_match_transformers(llava, tmp_path, geometry, images):
    folder = llava(dtype="float32", **GEOMETRIES[geometry])
    rng = np.random.default_rng(images)
    ids, shown = prompt(rng, images, 17), pixels(rng, images)
    session = export_session(folder, tmp_path, "float32", Limits(160))
    expected = reference_logits(reference(folder), ids, shown)
    actual = session.logits(ids[None], shown)
    assert actual.shape == expected.shape
    assert error(actual, expected) < TOLERANCE


@pytest.mark.parametrize("geometry", ["grouped", "full"])
@pytest.mark.parametrize("batch", [1, 3])
def test_each_decode_step_matches_transformers(llava, tmp_path, geometry, batch):
    """Unequal lengths and different image counts in one batch; every step is compared with a full forward pass."""
    folder = llava(dtype="float32", **GEOMETRIES[geometry])
    rng = np.random.default_rng(batch)
    rows = [prompt(rng, images, words) for images, words in ((1, 5), (0, 31), (2, 2))][:batch]
    shown = [pixels(rng, n) for n in (1, 0, 2)][:batch]
    session = export_session(folder, tmp_path, "float32", Limits(128, max_batch=3))
    model = reference(folder)
    runner = session.runner
    all_pixels = np.concatenate(shown)
    sequences = session.start(rows, all_pixels)
    dummy = np.zeros((1, 256), np.float32)
    for row, ids in enumerate(rows):
        expected = reference_logits(model, ids, shown[row])[0]
        assert error(sequences.logits[row], expected[-1]) < TOLERANCE
    lengths = np.array([len(r) for r in rows], np.int64)
    for _ in range(6):
        new = rng.integers(5, 300, (batch, 1))
        logits = runner.step(new, dummy, lengths[:, None], lengths, sequences.cache)
        rows = [np.append(ids, token) for ids, token in zip(rows, new[:, 0], strict=True)]
        lengths = lengths + 1
        for row, ids in enumerate(rows):
            assert error(logits[row, -1], reference_logits(model, ids, shown[row])[0, -1]) < TOLERANCE


def test_chunked_prefill_equals_one_prefill(llava, tmp_path):
    """The second turn of a chat, with an image, is appended to the first."""
    folder = llava(dtype="float32")
    rng = np.random.default_rng(5)
    first, second = prompt(rng, 1, 4), prompt(rng, 1, 6)
    shown = pixels(rng, 2)
    session = export_session(folder, tmp_path, "float32", Limits(160))
    expected = session.logits(np.concatenate([first, second])[None], shown)
    sequences = session.start([first], shown[:1])
    assert error(sequences.logits[0], expected[0, len(first) - 1]) < TOLERANCE
    session.extend(sequences, [second], shown[1:])
    assert error(sequences.logits[0], expected[0, -1]) < TOLERANCE


def test_cache_can_be_filled_to_the_last_slot(llava, tmp_path):
    folder = llava(dtype="float32")
    rng = np.random.default_rng(6)
    ids = prompt(rng, 0, 20)
    session = export_session(folder, tmp_path, "float32", Limits(len(ids) + 3))
    produced = [step[0] for step in session.generate(session.start([ids]), 50, frozenset())]
    assert len(produced) == 3
    model = reference(folder)
    for token in produced:
        assert token == int(reference_logits(model, ids, np.zeros((0, 3, 48, 48)))[0, -1].argmax())
        ids = np.append(ids, token)


@pytest.mark.parametrize("geometry", ["grouped", "full"])
def test_fifty_greedy_generations_equal_transformers(llava, tmp_path, geometry):
    """In ten batches of five, token for token against transformers' generate."""
    folder = llava(dtype="float32", **GEOMETRIES[geometry])
    rng = np.random.default_rng(7)
    session = export_session(folder, tmp_path, "float32", Limits(160, max_batch=5, max_images=10))
    model = reference(folder)
    model.generation_config.eos_token_id = None  # compare all tokens: a random model may generate </s> anywhere
    for _ in range(10):
        counts = rng.integers(0, 3, 5)
        rows = [prompt(rng, n, int(rng.integers(1, 20))) for n in counts]
        shown = [pixels(rng, n) for n in counts]
        steps = list(session.generate(session.start(rows, np.concatenate(shown)), 8, frozenset()))
        for row, ids in enumerate(rows):
            images = {"pixel_values": torch.tensor(shown[row])} if counts[row] else {}
            tensor = torch.tensor(ids)[None]
            expected = model.generate(
                tensor, attention_mask=torch.ones_like(tensor), max_new_tokens=8, do_sample=False, **images
            )
            assert [step[row] for step in steps] == expected[0, len(ids) :].tolist()


def test_a_stopped_sequence_yields_no_more_tokens(llava, tmp_path):
    folder = llava(dtype="float32")
    rng = np.random.default_rng(8)
    rows = [prompt(rng, 0, 4), prompt(rng, 0, 9)]
    session = export_session(folder, tmp_path, "float32", Limits(64, max_batch=2))
    unstopped = list(session.generate(session.start(rows), 6, frozenset()))
    stop = unstopped[0][0]
    stopped = list(session.generate(session.start(rows), 6, frozenset({stop})))
    assert stopped[0] == unstopped[0]
    assert all(step[0] is None for step in stopped[1:])
    assert [step[1] for step in stopped] == [step[1] for step in unstopped[: len(stopped)]]


@pytest.mark.parametrize("feature", [-1, -2, 2])
def test_every_feature_layer_and_class_token_matches_transformers(llava, tmp_path, feature):
    strategy = "full" if feature == 2 else "default"
    changes = {"vision_feature_layer": feature, "vision_feature_select_strategy": strategy}
    folder = llava(dtype="float32", **changes)
    rng = np.random.default_rng(9)
    tokens = IMAGE_TOKENS + (strategy == "full")
    ids = np.concatenate([[1], [IMAGE_ID] * tokens, rng.integers(5, 300, 4)]).astype(np.int64)
    shown = pixels(rng, 1)
    session = export_session(folder, tmp_path, "float32", Limits(64))
    assert error(session.logits(ids[None], shown), reference_logits(reference(folder), ids, shown)) < TOLERANCE


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_graphs_contain_native_operators_only(llava, tmp_path, dtype):
    export_session(llava(dtype="float32"), tmp_path, dtype, Limits(64))
    for name in ("vision", "language"):
        path = tmp_path / f"{name}.onnx"
        onnx.checker.check_model(str(path), full_check=True)
        model = onnx.load(path, load_external_data=False)
        assert [(o.domain, o.version) for o in model.opset_import] == [("", 24)]
        assert {node.domain for node in model.graph.node} == {""}
        weights = [n.op_type for n in model.graph.node if n.op_type == "Transpose" and n.input[0].endswith(".weight")]
        assert weights == []


def test_parameters_have_the_names_of_the_checkpoint(llava, tmp_path):
    export_session(llava(dtype="float32"), tmp_path, "float16", Limits(64))
    model = onnx.load(tmp_path / "language.onnx", load_external_data=False)
    names = {tensor.name for tensor in model.graph.initializer}
    assert "language_model.model.layers.0.input_layernorm.weight" in names
    assert "language_model.model.embed_tokens.weight" in names
    assert "language_model.model.layers.1.mlp.down_proj.weight_transposed" in names
