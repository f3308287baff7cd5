"""Runs one calibrated checkpoint both ways, in torch and on ONNX Runtime, and sees the integers that the graph rounds to."""

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
        """The graph whose further outputs are the codes of every quantized activation, beside the shipped one."""
        return self.graphs[part].with_name(f"{part}.marked.onnx")


@dataclass
class Codes:
    """The graph's integers by linear, and the roundings of the simulation that fell the other way."""

    graph: dict[str, np.ndarray]
    ties: list[float] = field(default_factory=list)  # how far each was from the middle of two codes, in steps

    def count(self) -> int:
        return sum(codes.size for codes in self.graph.values())


def make_case(
    checkpoint: Checkpoint,
    plan: Mapping[str, LinearScheme],
    folder: Path,
    samples: list[Sample],
    calibrator: Calibrator = calibrate_rtn,
) -> Case:
    """Calibrates on `samples` and writes the graphs, the shipped and the marked ones."""
    calibrated = calibrate(checkpoint, plan, folder / "calibrated", samples, calibrator)
    graphs = {part: write_quantized(checkpoint, calibrated, part, ir.DataType.FLOAT16, folder) for part in PARTS}
    case = Case(checkpoint, calibrated, graphs)
    for part, graph in graphs.items():
        ir.save(_marked(ir.load(graph)), case.marked(part))
    return case


def _marked(model: ir.Model) -> ir.Model:
    """Outputs `codes.LINEAR`, made by copies of the quantizers: the nodes that are there are fused as they were."""
    for product in [node for node in model.graph if node.op_type == "MatMul"]:
        chain, value = [], product.inputs[0]
        while value.producer() is not None and value.producer().op_type in QUANTIZERS:
            chain.append(value.producer())
            value = value.producer().inputs[0]
        for node in reversed(chain[1:]):  # all but the DequantizeLinear
            copy = ir.node(node.op_type, [value, *node.inputs[1:]])
            model.graph.insert_before(product, copy)
            value = copy.outputs[0]
            value.name, value.dtype = f"{node.op_type}.{product.name}", ir.DataType.INT8
        if chain:
            value.name = f"codes.{product.name}"
            model.graph.outputs.append(value)
    return model


def run_graphs(case: Case, sample: Sample, *, marked: bool) -> tuple[np.ndarray, Codes]:
    """Logits float32 [S, vocab] of both graphs as a session runs them, and the codes where the graphs are marked."""
    text, length, codes = case.checkpoint.config.text, len(sample.input_ids), Codes({})

    def run(part: str, feeds: Mapping[str, np.ndarray], output: str) -> np.ndarray:
        graph = case.marked(part) if marked else case.graphs[part]
        session = open_float32_session(graph, case.graphs[part].with_name(f"{part}.onnx.data"), threads=1)
        names = [value.name for value in session.get_outputs() if value.name.startswith("codes.")]
        found, *integers = session.run([output, *names], feeds)
        codes.graph |= {name.removeprefix("codes."): array for name, array in zip(names, integers, strict=True)}
        return found

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
    """Logits float32 [S, vocab] in torch.

    as_graph: floats and tables rounded as a float16 graph stores them. forced: go on with the graph's integers wherever the
    simulation rounded otherwise, and note how near to a tie that was.
    """
    blocks, source = make_blocks(case.checkpoint.hf_config), DequantizedSource(case.calibrated)
    if as_graph:
        blocks, source = round_rotary_tables(blocks, "float16"), DequantizedSource(case.calibrated, "float16")
    step = fake_quantized_step(case.calibrated, source) if quantize else float_step(source)
    if forced is not None:
        step = _forced(step, case.calibrated, forced)
    features = run_vision_blocks(blocks, source, [sample], step)
    (hidden,) = run_decoder_blocks(blocks, source, [sample], features, step)
    return load_head(source, case.checkpoint.config.text.rms_norm_eps).logits(hidden[0]).detach().numpy()


def _forced(step: Step, calibrated: CalibratedCheckpoint, codes: Codes) -> Step:
    """The step, with hooks before and behind its own: they see inputs as they are and as they were quantized."""

    def forced(block: Block, inputs: list[torch.Tensor], run: Run) -> list[torch.Tensor]:
        def watched(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
            names = [name for name in block.linear_names() if name in codes.graph]
            layers = [module.get_submodule(name.removeprefix(f"{block.prefix}.")) for name in names]
            handles = [h for name, layer in zip(names, layers, strict=True) for h in hook(name, layer)]
            output = run(module, x)
            for handle in handles:
                handle.remove()
            return output

        return step(block, inputs, watched)

    def hook(name: str, layer: nn.Module) -> list:
        scale, seen = calibrated.input_scale(name), {}

        def before(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            seen["steps"] = args[0] / scale

        def behind(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            mine = (args[0] / scale).round()
            theirs = torch.from_numpy(codes.graph[name].reshape(mine.shape)).float()
            apart = mine != theirs
            codes.ties.extend((seen["steps"] - (mine + theirs) / 2)[apart].abs().tolist())
            return (theirs * scale, *args[1:])

        return [layer.register_forward_pre_hook(before, prepend=True), layer.register_forward_pre_hook(behind)]

    return forced


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    """Largest difference, relative to the largest value that was wanted."""
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())
