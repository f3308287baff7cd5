"""The float ONNX graphs of vision tower and decoder, with weights that are loaded lazily from a checkpoint.

A `ModelConfig` and a float type go in, onnx_ir models come out; the pass `insert_qdq` (qdq.py) then quantizes their linears.
All inputs and outputs of the graphs are declared here.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from onnxscript import GraphBuilder

from qvlm_export.calibrate.checkpoint.tensor_source import TensorSource
from qvlm_export.calibrate.errors import UserError
from qvlm_export.engines.config import Limits, ModelConfig
from qvlm_export.engines.graph.language import Cache, Inputs, LanguageGraph
from qvlm_export.engines.graph.vision import VisionGraph

OPSET, IR_VERSION = 24, 12
FLOAT_TYPES = {"float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16, "float32": ir.DataType.FLOAT}


def vision_graph(config: ModelConfig, dtype: ir.DataType) -> ir.Model:
    """Returns the graph pixel_values float32 [images, 3, R, R] -> image_embeds [images * tokens, hidden] of type `dtype`.

    In a model with tiles, pixel_values holds the tiles, and image_embeds has one row more, the `image_newline` vector.
    """
    builder = GraphBuilder(_make_empty_graph("vision"))
    side = config.vision.image_size
    pixels = builder.input("pixel_values", ir.DataType.FLOAT, ["images", 3, side, side])
    cast = pixels if dtype == ir.DataType.FLOAT else builder.op.Cast(pixels, to=dtype)
    embeds = VisionGraph(config, dtype)(builder.op, cast)
    embeds.shape = ir.Shape(["image_tokens", config.text.hidden_size])
    builder.add_output(embeds, "image_embeds")
    return _finish_model(builder)


def language_graph(config: ModelConfig, limits: Limits, dtype: ir.DataType) -> ir.Model:
    """Returns the graph of the decoder with its key/value caches.

    Inputs: input_ids int64 [batch, sequence], image_embeds [image_tokens, hidden] (one dummy row for text),
    position_ids int64 [batch, sequence], write_index int64 [batch], past_key_values.{i}.key and .value
    [batch, kv_heads, max_length, head_dim]. Outputs: logits float32 [batch, sequence, vocab] and present_key_values.{i}.*.
    """
    builder = GraphBuilder(_make_empty_graph("language"))
    text = config.text
    ids = builder.input("input_ids", ir.DataType.INT64, ["batch", "sequence"])
    image_embeds = builder.input("image_embeds", dtype, ["image_tokens", text.hidden_size])
    positions = builder.input("position_ids", ir.DataType.INT64, ["batch", "sequence"])
    index = builder.input("write_index", ir.DataType.INT64, ["batch"])
    shape: list[int | str] = ["batch", text.num_kv_heads, limits.max_length, text.head_dim]
    caches = [
        Cache(*(builder.input(f"past_key_values.{i}.{part}", dtype, shape) for part in ("key", "value")))
        for i in range(text.num_layers)
    ]
    inputs = Inputs(ids, image_embeds, positions, index)
    logits = LanguageGraph(config, limits.max_length, dtype)(builder.op, inputs, caches)
    logits.shape = ir.Shape(["batch", "sequence", text.vocab_size])
    builder.add_output(logits, "logits")
    for i, cache in enumerate(caches):
        for part, value in (("key", cache.key), ("value", cache.value)):
            value.shape = ir.Shape(shape)
            builder.add_output(value, f"present_key_values.{i}.{part}")
    return _finish_model(builder)


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns name -> shape of every tensor that the graphs need from a checkpoint, without building the graphs."""
    modules = (VisionGraph(config, ir.DataType.FLOAT), LanguageGraph(config, 1, ir.DataType.FLOAT))
    shapes = {
        name: tuple(int(d) for d in parameter.shape or ())
        for module in modules
        for name, parameter in module.named_parameters()
    }
    if config.text.tie_word_embeddings:
        del shapes[TIED_HEAD]
    return shapes


TIED_HEAD, TIED_TABLE = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"


def fill_weights(model: ir.Model, source: TensorSource) -> None:
    """Gives every initializer without data, in place, a lazy tensor that is read from `source` when the graph is written.

    An output head that is tied to the embeddings multiplies by the embedding table, which is then stored once.
    """
    if TIED_HEAD in model.graph.initializers and TIED_HEAD not in source:
        _tie_head(model)
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            value.const_value = _make_lazy_tensor(source, str(name), value)


def _tie_head(model: ir.Model) -> None:
    """Lets the head's Transpose read the embedding table, in place. TensorRT stores one table for both then, too."""
    head, table = model.graph.initializers[TIED_HEAD], model.graph.initializers[TIED_TABLE]
    ((transpose, _),) = head.uses()
    ((matmul, _),) = transpose.outputs[0].uses()
    transpose.replace_input_with(0, table)
    matmul.name = TIED_HEAD.removesuffix(".weight")
    model.graph.initializers.pop(TIED_HEAD)


def _make_lazy_tensor(source: TensorSource, source_name: str, value: ir.Value) -> ir.LazyTensor:
    if value.dtype is None or value.shape is None:
        raise ValueError(f"initializer {value.name} has no type")
    dtype: ir.DataType = value.dtype
    return ir.LazyTensor(_make_loader(source, source_name, dtype), dtype=dtype, shape=value.shape, name=value.name)


def _make_loader(source: TensorSource, source_name: str, dtype: ir.DataType) -> Callable[[], ir.TensorProtocol]:
    def load() -> ir.TensorProtocol:
        return ir.Tensor(to_float(source.load(source_name), dtype, source_name), dtype=dtype)

    return load


def to_float(array: np.ndarray, dtype: ir.DataType, name: str) -> np.ndarray:
    """Returns `array` as `dtype`. Raises UserError with the tensor's name when a value is not finite in either type."""
    with np.errstate(over="ignore"):
        converted: np.ndarray = array.astype(dtype.numpy(), copy=False)
    if np.isfinite(converted).all():
        return converted
    if np.isfinite(array).all():
        raise UserError(
            f"{name}: holds values beyond float16's 65504, so it cannot be in a float16 engine; add --dtype bfloat16"
        )
    raise UserError(f"{name}: holds NaN or infinite values; the checkpoint is damaged, download it again")


def _make_empty_graph(name: str) -> ir.Graph:
    return ir.Graph([], [], nodes=[], name=name, opset_imports={"": OPSET})


def _finish_model(builder: GraphBuilder) -> ir.Model:
    for node in builder.graph:
        node.metadata_props.clear()  # onnxscript stores the class names of this package, which do not belong in the file
    return ir.Model(builder.graph, ir_version=IR_VERSION, producer_name="qvlm-export")
