"""The Q/DQ passes: the patterns in written graphs node by node, the stored integers, and the arithmetic of one linear."""

from __future__ import annotations

import re

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from small_export import PARTS, calibrate, make_graph, of_part, open_small, quantized_graph, schemes_of, write_quantized

from qvlm_export.calibrate.blockwise.blocks import make_blocks
from qvlm_export.calibrate.checkpoint.calibrated import CalibratedCheckpoint, CalibratedWriter, QuantizedLinear
from qvlm_export.calibrate.checkpoint.scheme import W8A8, LinearScheme
from qvlm_export.calibrate.errors import UserError
from qvlm_export.engines.graph.float_graphs import fill_weights
from qvlm_export.engines.graph.qdq import find_linears, insert_qdq, transpose_float_weights
from qvlm_export.engines.graph.write import write_graph

GROUPS_64 = LinearScheme(weight_bits=4, activation_bits=None, group_size=64)
GROUPS_128 = LinearScheme(weight_bits=4, activation_bits=None, group_size=128)
DTYPES = {"float16": ir.DataType.FLOAT16, "float32": ir.DataType.FLOAT}
TEXT, TOWER = "language_model.model.layers", "vision_tower.vision_model.encoder.layers"
MIXED = {
    f"{TEXT}.0.self_attn.q_proj": W8A8,
    f"{TEXT}.0.self_attn.k_proj": GROUPS_128,
    f"{TEXT}.0.self_attn.v_proj": W8A8,
    f"{TEXT}.0.mlp.down_proj": W8A8,
    f"{TEXT}.1.mlp.up_proj": GROUPS_64,
    f"{TOWER}.1.mlp.fc2": W8A8,
    f"{TOWER}.2.self_attn.k_proj": GROUPS_64,
    "multi_modal_projector.linear_2": W8A8,
}
NARROW = {
    f"{TEXT}.0.self_attn.q_proj": LinearScheme(6, 6, None),
    f"{TEXT}.0.self_attn.k_proj": LinearScheme(4, 4, 128),
    f"{TEXT}.0.self_attn.v_proj": LinearScheme(3, 6, 64),
    f"{TEXT}.0.mlp.down_proj": LinearScheme(3, None, 128),
    f"{TEXT}.1.mlp.up_proj": LinearScheme(4, 8, 64),
    f"{TOWER}.1.mlp.fc2": LinearScheme(8, 4, None),
    f"{TOWER}.2.self_attn.k_proj": LinearScheme(6, None, None),
    "multi_modal_projector.linear_2": LinearScheme(3, 4, 128),
}
SCHEMES = {"mixed": MIXED, "narrow": NARROW}


@pytest.fixture(scope="module")
def checkpoint(llava):
    return open_small(llava())


@pytest.fixture(scope="module", params=["int4", "int8", "sim-w4a4", *SCHEMES])
def calibrated(request, checkpoint, tmp_path_factory):
    schemes = SCHEMES.get(request.param) or schemes_of(checkpoint, request.param)
    return calibrate(checkpoint, schemes, tmp_path_factory.mktemp("calibrated"))


@pytest.fixture(scope="module", params=[(part, dtype) for part in PARTS for dtype in DTYPES], ids="-".join)
def written(request, checkpoint, calibrated, tmp_path_factory):
    """(part, linear -> scheme, calibrated checkpoint, the written model with its data, ONNX's number of the float type)."""
    part, dtype = request.param
    path = write_quantized(checkpoint, calibrated, part, DTYPES[dtype], tmp_path_factory.mktemp("written"))
    return part, of_part(calibrated.schemes, part), calibrated, onnx.load(path), DTYPES[dtype].value


def producers(model):
    """Value name -> the node that computes it."""
    return {output: node for node in model.graph.node for output in node.output}


def initializers(model):
    return {tensor.name: tensor for tensor in model.graph.initializer}


def matmuls(model):
    return {node.name: node for node in model.graph.node if node.op_type == "MatMul"}


def attributes(node):
    return {a.name: a.i for a in node.attribute}


def every_linear(checkpoint, part):
    """Names of all linears of the graph `part`, the output head included."""
    names = [*make_blocks(checkpoint.hf_config).quantizable(), "language_model.lm_head"]
    return {name for name in names if name.startswith("language_model.") == (part == "language")}


def test_exactly_the_linears_with_a_scheme_are_quantized(checkpoint, written):
    part, schemes, _, model, _ = written
    producer_of, stored = producers(model), initializers(model)
    names_by_kind = {"DequantizeLinear": set(), "float": set()}
    for name, node in matmuls(model).items():
        weight = node.input[1]
        names_by_kind["float" if weight in stored else producer_of[weight].op_type].add(name)
    assert names_by_kind["DequantizeLinear"] == set(schemes)
    assert names_by_kind["float"] == every_linear(checkpoint, part) - set(schemes)
    activations = [scheme.activation_bits for scheme in schemes.values() if scheme.activation_bits]
    assert [node.op_type for node in model.graph.node].count("DequantizeLinear") == len(schemes) + len(activations)


def test_linears_that_read_one_value_share_one_quantizer(written):
    _, schemes, _, model, _ = written
    producer_of, quantizers, clipped = producers(model), {}, set()
    for name, scheme in schemes.items():
        if scheme.activation_bits:
            quantizer = producer_of[producer_of[matmuls(model)[name].input[0]].input[0]]
            if scheme.activation_bits < 8:
                assert quantizer.op_type == "Clip"
                clipped.add(quantizer.name)
                quantizer = producer_of[quantizer.input[0]]
            assert quantizer.op_type == "QuantizeLinear"
            quantizers.setdefault((quantizer.input[0], scheme.activation_bits), set()).add(quantizer.name)
    assert all(len(names) == 1 for names in quantizers.values())
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("QuantizeLinear") == len(quantizers)
    assert len(clipped) == sum(bits < 8 for _, bits in quantizers)


def test_a_decoder_layer_needs_four_quantizers(checkpoint, tmp_path):
    calibrated = calibrate(checkpoint, of_part(schemes_of(checkpoint, "int8"), "language"), tmp_path)
    model = quantized_graph(checkpoint, calibrated, "language", ir.DataType.FLOAT16)
    readers = {}
    for node in model.graph:
        if node.op_type == "QuantizeLinear":
            linears = [use.node.outputs[0].uses()[0].node.name for use in node.outputs[0].uses()]
            readers[node.name] = sorted(name.rpartition(".")[2] for name in linears)
    assert list(readers.values()) == 2 * [
        ["k_proj", "q_proj", "v_proj"],
        ["o_proj"],
        ["gate_proj", "up_proj"],
        ["down_proj"],
    ]


def test_w8a8_linears_have_the_form_that_tensorrt_fuses(written):
    _, schemes, calibrated, model, float_type = written
    producer_of, stored = producers(model), initializers(model)
    for name in (n for n, scheme in schemes.items() if scheme == W8A8):
        activation, weight = (producer_of[value] for value in matmuls(model)[name].input)
        quantizer = producer_of[activation.input[0]]
        assert [n.op_type for n in (quantizer, activation, weight)] == ["QuantizeLinear", *2 * ["DequantizeLinear"]]

        # One scale for the whole activation: in the graph's type to quantize, in float32 to dequantize.
        assert attributes(quantizer) == {}
        assert attributes(activation) == {"output_dtype": float_type}
        for scale, expected_type in ((quantizer.input[1], float_type), (activation.input[1], onnx.TensorProto.FLOAT)):
            assert (stored[scale].data_type, list(stored[scale].dims)) == (expected_type, [])
            assert float(numpy_helper.to_array(stored[scale])) == calibrated.input_scale(name)
        for node in (quantizer, activation):
            zero = stored[node.input[2]]
            assert (zero.data_type, list(zero.dims)) == (onnx.TensorProto.INT8, [])
            assert numpy_helper.to_array(zero) == 0

        # One scale per output, which is axis 1 of [in, out].
        assert attributes(weight) == {"axis": 1, "output_dtype": float_type}
        outputs = stored[weight.input[0]].dims[1]
        assert stored[weight.input[0]].data_type == onnx.TensorProto.INT8
        scale, zero = stored[weight.input[1]], stored[weight.input[2]]
        assert (scale.data_type, list(scale.dims)) == (onnx.TensorProto.FLOAT, [outputs])
        assert (zero.data_type, list(zero.dims)) == (onnx.TensorProto.INT8, [outputs])
        assert not numpy_helper.to_array(zero).any()


def test_activations_of_few_bits_are_clipped_as_integers(written):
    _, schemes, calibrated, model, _ = written
    producer_of, stored = producers(model), initializers(model)
    for name in (n for n, scheme in schemes.items() if scheme.activation_bits and scheme.activation_bits < 8):
        clip = producer_of[producer_of[matmuls(model)[name].input[0]].input[0]]
        low, high = (numpy_helper.to_array(stored[value]) for value in clip.input[1:])
        half = 2 ** (schemes[name].activation_bits - 1)
        assert (low.dtype, low.shape, int(low), int(high)) == (np.int8, (), -half, half - 1)
        scales = [stored[producer_of[value].input[1]] for value in (clip.input[0], matmuls(model)[name].input[0])]
        assert [float(numpy_helper.to_array(scale)) for scale in scales] == [calibrated.input_scale(name)] * 2


def test_grouped_weights_have_the_form_that_tensorrt_fuses(written):
    _, schemes, _, model, float_type = written
    producer_of, stored = producers(model), initializers(model)
    for name, scheme in schemes.items():
        if scheme.group_size is None:
            continue
        x, weight = matmuls(model)[name].input
        node = producer_of[weight]
        assert node.op_type == "DequantizeLinear"
        assert attributes(node) == {"axis": 0, "block_size": scheme.group_size}
        assert len(node.input) == 2  # no zero point
        codes, scale = (stored[value] for value in node.input)
        inputs, outputs = codes.dims
        assert codes.data_type == onnx.TensorProto.INT4
        assert (scale.data_type, list(scale.dims)) == (float_type, [inputs // scheme.group_size, outputs])
        assert (x in producer_of and producer_of[x].op_type == "DequantizeLinear") == (scheme.activation_bits is not None)


def test_the_stored_integers_and_scales_are_the_calibrated_ones(written):
    _, schemes, calibrated, model, _ = written
    producer_of, stored = producers(model), initializers(model)
    for name in schemes:
        node = producer_of[matmuls(model)[name].input[1]]
        codes = numpy_helper.to_array(stored[node.input[0]]).astype(np.int8)
        np.testing.assert_array_equal(codes, calibrated.codes(name).T)
        scale = numpy_helper.to_array(stored[node.input[1]])
        np.testing.assert_array_equal(scale.astype(np.float32), calibrated.scale(name).T.astype(np.float32))


def test_float_weights_are_stored_transposed(checkpoint, written):
    part, schemes, _, model, float_type = written
    stored = initializers(model)
    for name in every_linear(checkpoint, part) - set(schemes):
        weight = stored[matmuls(model)[name].input[1]]
        assert weight.data_type == float_type
        np.testing.assert_array_equal(numpy_helper.to_array(weight), checkpoint.source.load(f"{name}.weight").T)
    assert not any(node.op_type == "Transpose" and node.input[0] in stored for node in model.graph.node)
    used = {value for node in model.graph.node for value in node.input}
    assert set(stored) <= used


def test_the_written_file_passes_the_full_checker(checkpoint, calibrated, tmp_path):
    for part in PARTS:
        path = write_quantized(checkpoint, calibrated, part, ir.DataType.FLOAT16, tmp_path)
        onnx.checker.check_model(str(path), full_check=True)
        assert sorted(p.name for p in tmp_path.glob(f"{part}*")) == [f"{part}.onnx", f"{part}.onnx.data"]


def test_the_rewritten_linears_are_returned_in_graph_order(checkpoint, calibrated):
    model = make_graph(checkpoint, "language", ir.DataType.FLOAT16)
    schemes = of_part(calibrated.schemes, "language")
    order = [name for name in find_linears(model) if name in schemes]
    assert insert_qdq(model, schemes, calibrated, ir.DataType.FLOAT16) == order
    assert sorted(order) == sorted(schemes)


def test_without_linears_to_quantize_the_graph_is_unchanged(checkpoint, calibrated):
    model = make_graph(checkpoint, "vision", ir.DataType.FLOAT16)
    before = [(node.op_type, node.name) for node in model.graph], list(model.graph.initializers)
    assert insert_qdq(model, [], calibrated, ir.DataType.FLOAT16) == []
    assert ([(node.op_type, node.name) for node in model.graph], list(model.graph.initializers)) == before


def test_a_linear_that_the_graph_lacks_is_named(checkpoint, calibrated):
    model = make_graph(checkpoint, "vision", ir.DataType.FLOAT16)
    name = f"{TEXT}.0.self_attn.q_proj"
    with pytest.raises(UserError, match=f"^{re.escape(name)}: should be quantized, but the graph has no such linear"):
        insert_qdq(model, [name], calibrated, ir.DataType.FLOAT16)


def one_input_graph(dtype, weights):
    """A graph of one input x [rows, in] and a linear for each weight [out, in], in the form of the float graphs."""
    inputs = next(iter(weights.values())).shape[1]
    x = ir.Value(name="x", shape=ir.Shape(["rows", inputs]), type=ir.TensorType(dtype))
    nodes, outputs, initial = [], [], []
    for name, array in weights.items():
        tensor = ir.Tensor(array.astype(dtype.numpy()), name=f"{name}.weight")
        weight = ir.Value(name=f"{name}.weight", shape=ir.Shape(array.shape), type=ir.TensorType(dtype), const_value=tensor)
        transpose = ir.node("Transpose", [weight], {"perm": [1, 0]})
        product = ir.node("MatMul", [x, transpose.outputs[0]])
        product.outputs[0].name, product.outputs[0].dtype = f"{name}.y", dtype
        product.outputs[0].shape = ir.Shape(["rows", array.shape[0]])
        nodes += [transpose, product]
        outputs.append(product.outputs[0])
        initial.append(weight)
    graph = ir.Graph([x], outputs, nodes=nodes, initializers=initial, opset_imports={"": 24}, name="one")
    return ir.Model(graph, ir_version=12)


def random_linear(scheme, seed, input_scale=None, shape=(6, 128)):
    """A quantized linear with random codes of `shape` [out, in] and random scales."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(scheme.qmin, scheme.qmax + 1, shape).astype(np.int8)
    scale_type = np.float16 if scheme.group_size else np.float32
    return QuantizedLinear(scheme, codes, rng.uniform(0.001, 0.1, scheme.scale_shape(shape)).astype(scale_type), input_scale)


def one_input_case(folder, linears, dtype=ir.DataType.FLOAT):
    """The ONNX model of these linears on one input, quantized, written and read back."""
    writer = CalibratedWriter(folder / "calibrated")
    writer.write_shard("all", linears, {})
    writer.finish({}, {})
    model = one_input_graph(dtype, {name: linear.codes for name, linear in linears.items()})
    insert_qdq(model, linears, CalibratedCheckpoint(folder / "calibrated"), dtype)
    write_graph(model, folder / "one.onnx", lambda _: None)
    return onnx.load(folder / "one.onnx")


@pytest.mark.parametrize("scheme", [GROUPS_64, GROUPS_128, W8A8, *dict.fromkeys(NARROW.values())], ids=lambda s: s.name)
def test_a_quantized_linear_computes_with_its_integers_and_scales(tmp_path, scheme):
    step = None if scheme.activation_bits is None else 0.0625
    linear = random_linear(scheme, seed=0, input_scale=step)
    model = one_input_case(tmp_path, {"some.proj": linear})
    x = np.random.default_rng(1).normal(0, 4, (5, 128)).astype(np.float32)  # exceeds 127 steps, so that codes are clipped
    (y,) = ReferenceEvaluator(model).run(None, {"x": x})
    half = 2 ** ((scheme.activation_bits or 8) - 1)
    rounded = x if step is None else np.clip(np.rint(x / np.float32(step)), -half, half - 1) * np.float32(step)
    np.testing.assert_allclose(y, rounded @ linear.dequantized().T, rtol=1e-5, atol=1e-4)
    assert (rounded == x).all() == (step is None)


def test_readers_of_one_value_with_unequal_bits_share_no_codes(tmp_path):
    """Even when their scales happen to be equal."""
    schemes = {"a.q": LinearScheme(6, 6, None), "a.k": LinearScheme(4, 4, 64), "a.v": LinearScheme(6, 6, None)}
    model = one_input_case(tmp_path, {name: random_linear(s, 0, 0.25) for name, s in schemes.items()}, ir.DataType.FLOAT16)
    producer_of = producers(model)
    clips = {name: producer_of[producer_of[node.input[0]].input[0]].name for name, node in matmuls(model).items()}
    assert clips == {"a.q": "a.q.input_clip", "a.k": "a.k.input_clip", "a.v": "a.q.input_clip"}


def test_readers_of_one_value_with_unequal_scales_have_quantizers_of_their_own(tmp_path):
    linears = {"a.q": random_linear(W8A8, 0, 0.25), "a.k": random_linear(W8A8, 1, 0.25), "a.v": random_linear(W8A8, 2, 0.5)}
    model = one_input_case(tmp_path, linears, ir.DataType.FLOAT16)
    producer_of = producers(model)
    quantizers = {name: producer_of[producer_of[node.input[0]].input[0]].name for name, node in matmuls(model).items()}
    assert quantizers == {"a.q": "a.q.input_q", "a.k": "a.q.input_q", "a.v": "a.v.input_q"}


def test_an_input_scale_that_the_float_type_cannot_hold_is_refused_by_name(tmp_path):
    linears = {"a.q": random_linear(W8A8, 0, float(np.float16(0.1)))}
    with pytest.raises(UserError, match=r"^a\.q: its input_scale 0\.0999\d+ is not a BFLOAT16 value; calibrate again$"):
        one_input_case(tmp_path, linears, ir.DataType.BFLOAT16)


def test_weights_must_be_filled_in_before_they_are_transposed(checkpoint):
    model = make_graph(checkpoint, "vision", ir.DataType.FLOAT16)
    with pytest.raises(ValueError, match="fill in the weights first"):
        transpose_float_weights(model)
    fill_weights(model, checkpoint.source)
    assert set(transpose_float_weights(model)) == every_linear(checkpoint, "vision")
