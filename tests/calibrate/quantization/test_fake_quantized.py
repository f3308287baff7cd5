"""The simulation by its parts, and against two others: ONNX's own quantizer, and transformers on the same checkpoint.

`test_fake_quantized_graph.py` holds it against the written graph.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from simulated import Case, make_case, relative, run_graphs, simulate
from small_export import calibrate, make_sample, mixed_samples, open_small, plan_of
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
from qvlm_export.pipeline.planning.recipe import PRESETS

QUANTIZED = [name for name, preset in PRESETS.items() if preset.language_model != "float"]
SCHEMES = pytest.mark.parametrize("preset", QUANTIZED)


@pytest.fixture(scope="module")
def checkpoint(llava):
    return open_small(llava())


@pytest.fixture(scope="module")
def calibrated_as(checkpoint, tmp_path_factory):
    """calibrated_as(preset) -> calibrated checkpoint, made once."""
    made = {}

    def make(preset):
        if preset not in made:
            made[preset] = calibrate(checkpoint, plan_of(checkpoint, preset), tmp_path_factory.mktemp("calibrated"))
        return made[preset]

    return make


@pytest.fixture
def sample(checkpoint):
    """Text with one picture."""
    return make_sample(checkpoint, words=20, images=1, seed=5)


@SCHEMES
def test_the_source_looks_like_the_checkpoint_it_came_from(checkpoint, calibrated_as, preset):
    calibrated, stored = calibrated_as(preset), checkpoint.source
    source = DequantizedSource(calibrated)
    assert set(source) == set(stored)
    for name in stored:
        assert name in source
        assert source.shape(name) == stored.shape(name)
        assert source.load(name).dtype == source.dtype(name)
        linear = name.removesuffix(".weight")
        wanted = calibrated.linear(linear).dequantized() if linear in calibrated.schemes else stored.load(name)
        np.testing.assert_array_equal(source.load(name), wanted)
    for name in calibrated.floats:
        assert (name in source) == (name in set(stored))


def test_floats_are_rounded_to_the_type_of_the_graph(llava, tmp_path):
    checkpoint = open_small(llava(dtype="float32"))
    plan = plan_of(checkpoint, "int4")
    source = DequantizedSource(calibrate(checkpoint, plan, tmp_path), "float16")
    name = "language_model.model.embed_tokens.weight"
    wide = checkpoint.source.load(name)
    assert source.dtype(name) == np.float16
    np.testing.assert_array_equal(source.load(name), wide.astype(np.float16))
    assert (source.load(name) != wide).any()


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_fake_quantize_is_the_quantizer_of_onnx(bits):
    """QuantizeLinear, a Clip where there are fewer bits than int8 has, DequantizeLinear."""
    scale, half = np.float32(0.0371), 2 ** (bits - 1)
    steps = np.arange(-140, 141, dtype=np.float32)
    rng = np.random.default_rng(0)
    # Halves, which go to the even neighbour; just beside them; beyond the range; and anything.
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
    (wanted,) = ort.InferenceSession(model.SerializeToString()).run(["y"], {"x": x})
    before = x.copy()
    found = fake_quantize(torch.from_numpy(x), float(scale), bits).numpy()
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(x, before)
    assert set(np.round(found / scale)) == set(range(-half, half))


def test_only_the_named_linears_are_quantized_and_only_inside():
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


def test_recorded_shows_outputs_and_changes_nothing(checkpoint, sample):
    blocks, source, seen = make_blocks(checkpoint.hf_config), checkpoint.source, {}
    step = record_outputs(float_step(source), seen.__setitem__)
    features = run_vision_blocks(blocks, source, [sample], step)
    run_decoder_blocks(blocks, source, [sample], features, step)
    order = blocks.all()
    assert list(seen) == [block.prefix for block in order]
    assert torch.equal(seen["multi_modal_projector"][0].flatten(0, 1), features[0])


def test_the_head_is_the_norm_and_the_product(checkpoint):
    source, epsilon = checkpoint.source, 1e-5
    x = torch.randn(1, 3, checkpoint.config.text.hidden_size)
    gain, head = (source.load(f"language_model.{name}.weight").astype(np.float64) for name in ("model.norm", "lm_head"))
    wide = x[0].double().numpy()
    wanted = (wide / np.sqrt((wide**2).mean(-1, keepdims=True) + epsilon) * gain) @ head.T
    np.testing.assert_allclose(load_head(source, epsilon).logits(x[0]).numpy(), wanted, rtol=1e-4, atol=1e-5)


@SCHEMES
def test_transformers_computes_the_same_from_the_calibrated_checkpoint(checkpoint, calibrated_as, sample, preset):
    """compressed-tensors, a second implementation, knows all these bits and quantizes weights and activations alike."""
    case = Case(checkpoint, calibrated_as(preset), {})
    model = LlavaForConditionalGeneration.from_pretrained(case.calibrated.folder, dtype=torch.float32).eval()
    ids, pixels = torch.from_numpy(sample.input_ids)[None], torch.from_numpy(sample.pixel_values)
    with torch.inference_mode():
        wanted = model(input_ids=ids, pixel_values=pixels).logits[0].numpy()
    assert relative(simulate(case, sample, as_graph=False), wanted) <= 1e-6
    rounded = any(scheme.activation_bits for scheme in case.calibrated.schemes.values())
    # Activations really are quantized, in both.
    assert (relative(simulate(case, sample, as_graph=False, quantize=False), wanted) > 1e-2) == rounded


def test_without_rounded_activations_only_the_tables_differ(checkpoint, sample, tmp_path):
    """int4 with tower and projector left float: the graph stores its rotary tables in float16, nothing else."""
    plan = {n: s for n, s in plan_of(checkpoint, "int4").items() if n.startswith("language_model.")}
    case = make_case(checkpoint, plan, tmp_path, mixed_samples(checkpoint))
    wanted, _ = run_graphs(case, sample, marked=False)
    assert relative(simulate(case, sample), wanted) <= 1e-5
    assert 1e-4 < relative(simulate(case, sample, as_graph=False), wanted) < 1e-3
