"""Runs a calibrated checkpoint with fake quantization in torch and as graphs on ONNX Runtime, and compares integers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from small_export import LIMITS, PARTS, Calibrator, calibrate, write_quantized
from torch import nn

from qvlm_export.calibrate.blockwise.blocks import Block, make_blocks
from qvlm_export.calibrate.blockwise.forward import Run, Step, float_step, load_head, run_decoder_blocks, run_vision_blocks
from qvlm_export.calibrate.calibrators.rtn import calibrate_rtn
from qvlm_export.calibrate.checkpoint.calibrated import CalibratedCheckpoint
from qvlm_export.calibrate.checkpoint.samples import Sample
from qvlm_export.calibrate.checkpoint.scheme import LinearScheme
from qvlm_export.calibrate.quantization.fake_quantized import (
    DequantizedSource,
    fake_quantized_step,
    round_rotary_tables,
)
from qvlm_export.checkpoints.checkpoint import Checkpoint
from qvlm_export.engines.runtime.onnx_runner import open_float32_session

QUANTIZERS = ("DequantizeLinear", "Clip", "QuantizeLinear")


@dataclass(frozen=True)
class Case:
    """A calibrated checkpoint with its float16 graphs."""

    checkpoint: Checkpoint
    calibrated: CalibratedCheckpoint
    graphs: Mapping[str, Path]

    def marked(self, part: str) -> Path:
        """Path of a copy of the graph that also outputs the integer codes of every quantized activation."""
        return self.graphs[part].with_name(f"{part}.marked.onnx")


@dataclass
class Codes:
    """Integer codes of quantized activations in the graph, by linear, and where fake quantization rounded otherwise."""

    graph: dict[str, np.ndarray]
    ties: list[float] = field(default_factory=list)  # distance of each such value from the middle of the two codes, in steps

    def count(self) -> int:
        """Number of codes of all linears."""
        return sum(codes.size for codes in self.graph.values())


def make_case(
    checkpoint: Checkpoint,
    schemes: Mapping[str, LinearScheme],
    folder: Path,
    samples: list[Sample],
    calibrator: Calibrator = calibrate_rtn,
) -> Case:
    """Calibrates on `samples` and writes the graphs and their marked copies."""
    calibrated = calibrate(checkpoint, schemes, folder / "calibrated", samples, calibrator)
    graphs = {part: write_quantized(checkpoint, calibrated, part, ir.DataType.FLOAT16, folder) for part in PARTS}
    case = Case(checkpoint, calibrated, graphs)
    for part, graph in graphs.items():
        ir.save(_add_code_outputs(ir.load(graph)), case.marked(part))
    return case


def _add_code_outputs(model: ir.Model) -> ir.Model:
    """Adds an output `codes.LINEAR` for each quantized activation, in place; returns the model.

    The codes are computed by copies of the quantizers, so that the original nodes are fused as in the graph without outputs.
    """
    for product in [node for node in model.graph if node.op_type == "MatMul"]:
        chain, value = [], product.inputs[0]
        while value.producer() is not None and value.producer().op_type in QUANTIZERS:
            chain.append(value.producer())
            value = value.producer().inputs[0]
        for node in reversed(chain[1:]):  # all except the DequantizeLinear
            copy = ir.node(node.op_type, [value, *node.inputs[1:]])
            model.graph.insert_before(product, copy)
            value = copy.outputs[0]
            value.name, value.dtype = f"{node.op_type}.{product.name}", ir.DataType.INT8
        if chain:
            value.name = f"codes.{product.name}"
            model.graph.outputs.append(value)
    return model


def run_graphs(case: Case, sample: Sample, *, marked: bool) -> tuple[np.ndarray, Codes]:
    """Logits float32 [S, vocab] of both graphs, as a session runs them.

    With `marked`, also the integer codes of all quantized activations; otherwise none.
    """
    text, length, codes = case.checkpoint.config.text, len(sample.input_ids), Codes({})

    def run(part: str, feeds: Mapping[str, np.ndarray], output: str) -> np.ndarray:
        graph = case.marked(part) if marked else case.graphs[part]
        session = open_float32_session(graph, case.graphs[part].with_name(f"{part}.onnx.data"), threads=1)
        names = [value.name for value in session.get_outputs() if value.name.startswith("codes.")]
        result, *integers = session.run([output, *names], feeds)
        codes.graph |= {name.removeprefix("codes."): array for name, array in zip(names, integers, strict=True)}
        return result

    embeds = np.zeros((1, text.hidden_size), np.float32)
    if len(sample.pixel_values):
        embeds = run("vision", {"pixel_values": sample.pixel_values}, "image_embeds")
    cache = np.zeros((1, text.num_kv_heads, LIMITS.max_length, text.head_dim), np.float32)
    feeds = {
        "input_ids": sample.input_ids[None],
        "image_embeds": embeds,
        "position_ids": np.arange(length)[None],
        "write_index": np.zeros(1, np.int64),
        **{f"past_key_values.{i}.{kind}": cache for i in range(text.num_layers) for kind in ("key", "value")},
    }
    return run("language", feeds, "logits")[0], codes


def simulate(
    case: Case,
    sample: Sample,
    *,
    as_graph: bool = True,
    quantize: bool = True,
    forced: Codes | None = None,
) -> np.ndarray:
    """Logits float32 [S, vocab] with fake quantization in torch.

    as_graph: floats and rotary tables are rounded as a float16 graph stores them. quantize: whether to quantize inputs.
    forced: the graph's integers, which replace those of fake quantization where the two differ; the distance of such values
    from a tie is appended to `forced.ties`.
    """
    blocks, source = make_blocks(case.checkpoint.hf_config), DequantizedSource(case.calibrated)
    if as_graph:
        blocks, source = round_rotary_tables(blocks, "float16"), DequantizedSource(case.calibrated, "float16")
    step = fake_quantized_step(case.calibrated, source) if quantize else float_step(source)
    if forced is not None:
        step = _force_codes(step, case.calibrated, forced)
    features = run_vision_blocks(blocks, source, [sample], step)
    (hidden,) = run_decoder_blocks(blocks, source, [sample], features, step)
    return load_head(source, case.checkpoint.config.text.rms_norm_eps).logits(hidden[0]).detach().numpy()


def _force_codes(step: Step, calibrated: CalibratedCheckpoint, codes: Codes) -> Step:
    """The step with two more hooks on each linear: one gets inputs before their quantization, the other one after it."""

    def step_with_codes(block: Block, inputs: list[torch.Tensor], run: Run) -> list[torch.Tensor]:
        def run_with_hooks(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
            names = [name for name in block.linear_names() if name in codes.graph]
            layers = [module.get_submodule(name.removeprefix(f"{block.prefix}.")) for name in names]
            handles = [h for name, layer in zip(names, layers, strict=True) for h in add_hooks(name, layer)]
            output = run(module, x)
            for handle in handles:
                handle.remove()
            return output

        return step(block, inputs, run_with_hooks)

    def add_hooks(name: str, layer: nn.Module) -> list:
        scale, unquantized = calibrated.input_scale(name), {}

        def before_quantization(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            unquantized["steps"] = args[0] / scale

        def after_quantization(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            codes_here = (args[0] / scale).round()
            graph_codes = torch.from_numpy(codes.graph[name].reshape(codes_here.shape)).float()
            differ = codes_here != graph_codes
            codes.ties.extend((unquantized["steps"] - (codes_here + graph_codes) / 2)[differ].abs().tolist())
            return (graph_codes * scale, *args[1:])

        return [
            layer.register_forward_pre_hook(before_quantization, prepend=True),
            layer.register_forward_pre_hook(after_quantization),
        ]

    return step_with_codes


def relative(result: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference, relative to the largest magnitude of `expected`."""
    return float(np.abs(result - expected).max() / np.abs(expected).max())
