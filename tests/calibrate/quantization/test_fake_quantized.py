"""The fake-quantized model in its parts, against ONNX's own quantizer, and against transformers on the same checkpoint.

`test_fake_quantized_graph.py` compares it with the written graph.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from simulated import Case, make_case, relative, run_graphs, simulate
from small_export import calibrate, make_sample, mixed_samples, open_small, schemes_of
from torch import nn
from transformers import LlavaForConditionalGeneration

from qvlm_export.calibrate.blockwise.blocks import make_blocks
from qvlm_export.calibrate.blockwise.forward import float_step, load_head, run_decoder_blocks, run_vision_blocks
from qvlm_export.calibrate.quantization.fake_quantized import (
    DequantizedSource,
    fake_quantize_inputs,
    record_outputs,
)
from qvlm_export.calibrate.quantization.quantizer import fake_quantize
from qvlm_export.pipeline.preparation.recipe import PRESETS

QUANTIZED = [name for name, preset in PRESETS.items() if preset.language_model != "float"]
SCHEMES = pytest.mark.parametrize("preset", QUANTIZED)


@pytest.fixture(scope="module")
def checkpoint(llava):
    return open_small(llava())


@pytest.fixture(scope="module")
def calibrated_as(checkpoint, tmp_path_factory):
    """A function preset -> calibrated checkpoint, each calibrated once."""
    checkpoints = {}

    def make(preset):
        if preset not in checkpoints:
            checkpoints[preset] = calibrate(
                checkpoint, schemes_of(checkpoint, preset), tmp_path_factory.mktemp("calibrated")
            )
        return checkpoints[preset]

    return make


@pytest.fixture
def sample(checkpoint):
    """A sample of text with one image."""
    return make_sample(checkpoint, words=20, images=1, seed=5)


@SCHEMES
def test_the_dequantized_source_has_the_tensors_of_the_original_checkpoint(checkpoint, calibrated_as, preset):
    calibrated, stored = calibrated_as(preset), checkpoint.source
    source = DequantizedSource(calibrated)
    assert set(source) == set(stored)
    for name in stored:
        assert name in source
        assert source.shape(name) == stored.shape(name)
        assert source.load(name).dtype == source.dtype(name)
        linear = name.removesuffix(".weight")
        expected = calibrated.linear(linear).dequantized() if linear in calibrated.schemes else stored.load(name)
        np.testing.assert_array_equal(source.load(name), expected)
    for name in calibrated.floats:
        assert (name in source) == (name in set(stored))


def test_float_tensors_are_rounded_to_the_type_of_the_graph(llava, tmp_path):
    checkpoint = open_small(llava(dtype="float32"))
    schemes = schemes_of(checkpoint, "int4")
    source = DequantizedSource(calibrate(checkpoint, schemes, tmp_path), "float16")
    name = "language_model.model.embed_tokens.weight"
    original = checkpoint.source.load(name)
    assert source.dtype(name) == np.float16
    np.testing.assert_array_equal(source.load(name), original.astype(np.float16))
    assert (source.load(name) != original).any()


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_fake_quantize_equals_the_quantizer_of_onnx(bits):
    """The graph has QuantizeLinear, a Clip to the codes of fewer bits than 8, and DequantizeLinear."""
    scale, half = np.float32(0.0371), 2 ** (bits - 1)
    steps = np.arange(-140, 141, dtype=np.float32)
    rng = np.random.default_rng(0)
    # Halves, which are rounded to the even neighbour, their neighbours, values beyond the range, and random values.
    x = np.concatenate([steps * scale, (steps + 0.5) * scale, rng.standard_normal(5000, np.float32) * 3])
    x = np.concatenate([x, np.nextafter(x, np.float32(np.inf)), np.nextafter(x, np.float32(-np.inf))])
    constants = [
        numpy_helper.from_array(np.array(scale, np.float32), "scale"),
        *(
            numpy_helper.from_array(np.array(n, np.int8), name)
            for n, name in ((0, "zero"), (-half, "low"), (half - 1, "high"))
        ),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("Clip", ["q", "low", "high"], ["clipped"]),
        helper.make_node("DequantizeLinear", ["clipped", "scale", "zero"], ["y"]),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "quantizer", values[:1], values[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=12)
    onnx.checker.check_model(model)
    (expected,) = ort.InferenceSession(model.SerializeToString()).run(["y"], {"x": x})
    before = x.copy()
    quantized = fake_quantize(torch.from_numpy(x), float(scale), bits).numpy()
    np.testing.assert_array_equal(quantized, expected)
    np.testing.assert_array_equal(x, before)
    assert set(np.round(quantized / scale)) == set(range(-half, half))


def test_only_the_named_linears_are_fake_quantized_and_only_inside_the_context():
    torch.manual_seed(0)
    module = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    x, quantizer = torch.randn(2, 4) * 4, (0.5, 4)
    plain = {name: layer(x) for name, layer in module.items()}
    on_quantized = module["a"](fake_quantize(x, *quantizer))
    with fake_quantize_inputs(module, {"a": quantizer}):
        assert torch.equal(module["a"](x), on_quantized)
        assert torch.equal(module["b"](x), plain["b"])
    with pytest.raises(KeyError), fake_quantize_inputs(module, {"a": quantizer}):
        raise KeyError
    assert not torch.equal(on_quantized, plain["a"])
    assert all(torch.equal(layer(x), plain[name]) for name, layer in module.items())


def test_record_outputs_passes_on_outputs_and_changes_nothing(checkpoint, sample):
    blocks, source, outputs = make_blocks(checkpoint.hf_config), checkpoint.source, {}
    step = record_outputs(float_step(source), outputs.__setitem__)
    features = run_vision_blocks(blocks, source, [sample], step)
    run_decoder_blocks(blocks, source, [sample], features, step)
    order = blocks.all()
    assert list(outputs) == [block.prefix for block in order]
    assert torch.equal(outputs["multi_modal_projector"][0].flatten(0, 1), features[0])


def test_the_head_is_the_final_norm_and_the_output_projection(checkpoint):
    source, epsilon = checkpoint.source, 1e-5
    x = torch.randn(1, 3, checkpoint.config.text.hidden_size)
    gain, head = (source.load(f"language_model.{name}.weight").astype(np.float64) for name in ("model.norm", "lm_head"))
    hidden = x[0].double().numpy()
    expected = (hidden / np.sqrt((hidden**2).mean(-1, keepdims=True) + epsilon) * gain) @ head.T
    np.testing.assert_allclose(load_head(source, epsilon).logits(x[0]).numpy(), expected, rtol=1e-4, atol=1e-5)


@SCHEMES
def test_transformers_computes_the_same_from_the_calibrated_checkpoint(checkpoint, calibrated_as, sample, preset):
    """compressed-tensors, a second implementation, supports all these bits for weights and for activations."""
    case = Case(checkpoint, calibrated_as(preset), {})
    model = LlavaForConditionalGeneration.from_pretrained(case.calibrated.folder, dtype=torch.float32).eval()
    ids, pixels = torch.from_numpy(sample.input_ids)[None], torch.from_numpy(sample.pixel_values)
    with torch.inference_mode():
        expected = model(input_ids=ids, pixel_values=pixels).logits[0].numpy()
    assert relative(simulate(case, sample, as_graph=False), expected) <= 1e-6
    rounded = any(scheme.activation_bits for scheme in case.calibrated.schemes.values())
    # Activations are really quantized in both.
    assert (relative(simulate(case, sample, as_graph=False, quantize=False), expected) > 1e-2) == rounded


def test_without_quantized_activations_only_the_rotary_tables_differ(checkpoint, sample, tmp_path):
    """In int4 with a float tower and projector the graph stores only its rotary tables in float16."""
    schemes = {n: s for n, s in schemes_of(checkpoint, "int4").items() if n.startswith("language_model.")}
    case = make_case(checkpoint, schemes, tmp_path, mixed_samples(checkpoint))
    expected, _ = run_graphs(case, sample, marked=False)
    assert relative(simulate(case, sample), expected) <= 1e-5
    assert 1e-4 < relative(simulate(case, sample, as_graph=False), expected) < 1e-3
