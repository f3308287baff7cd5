"""Study of massive activations in a trained decoder: where they are, and what a static range leaves for all other values.

    qvlm-export --model build/smol --scheme int8 --backend onnx --calib-data build/smol-data/calibration-0.jsonl \\
        --out build/smol-rtn.plan --prefix 0
    qvlm-export --model build/smol --scheme int8 --backend onnx --calib-data build/smol-data/calibration-0.jsonl \\
        --out build/smol-fast.plan --effort fast
    python -m tools.study.outliers --before build/smol-rtn.plan --after build/smol-fast.plan --docs docs

It runs the float model on some calibration samples and draws the largest magnitude of every token in every decoder layer.
Then it runs both exports with fake quantization in torch and draws, for the input of every down_proj, how many steps of its
quantizer lie between zero and the median magnitude: below about one, most values are rounded to zero.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn

from qvlm_export.calibrate.blockwise.blocks import Block, ModelBlocks, load_block, make_blocks
from qvlm_export.calibrate.blockwise.forward import Run, run_decoder_blocks, run_vision_blocks
from qvlm_export.calibrate.checkpoint.calibrated import CalibratedCheckpoint
from qvlm_export.calibrate.checkpoint.prefix import cut_prefix
from qvlm_export.calibrate.checkpoint.samples import Sample
from qvlm_export.calibrate.checkpoint.tensor_source import TensorSource
from qvlm_export.calibrate.quantization.activation_range import find_massive
from qvlm_export.calibrate.quantization.fake_quantized import DequantizedSource, fake_quantize_inputs
from qvlm_export.checkpoints.checkpoint import Checkpoint, open_checkpoint
from qvlm_export.engines.manifest import Manifest, read_manifest
from qvlm_export.inputs.samples import encode_entries, load_processor, read_entries

SAMPLES, TOKENS = 8, 48  # samples that are run, and tokens of each that are drawn
LINEAR = "mlp.down_proj"
Quantizers = Mapping[str, tuple[float, int]]


@dataclass(frozen=True)
class Observed:
    """What one run shows, by decoder layer.

    inputs: of every sample, the input of down_proj, float32 [tokens, width]. outputs: of every sample, the layer's output,
    float32 [1, tokens, width].
    """

    inputs: dict[int, list[torch.Tensor]]
    outputs: dict[int, list[torch.Tensor]]


def observe(blocks: ModelBlocks, source: TensorSource, samples: Sequence[Sample], quantizers: Quantizers) -> Observed:
    """Runs the model, with fake quantization where there are `quantizers`: linear -> scale and bits."""
    found = Observed({}, {})

    def step(block: Block, inputs: Sequence[torch.Tensor], run: Run) -> list[torch.Tensor]:
        inside = {
            n: quantizers[f"{block.prefix}.{n}"]
            for n, _ in block.module.named_modules()
            if f"{block.prefix}.{n}" in quantizers
        }
        number = blocks.layer_number(block)
        with load_block(block, source) as module, fake_quantize_inputs(module, inside), torch.inference_mode():
            hook = None if number is None else record_input(module, found.inputs.setdefault(number, []))
            outputs = [run(module, x) for x in inputs]
            if hook is not None and number is not None:
                hook.remove()
                found.outputs[number] = outputs
        return outputs

    features = run_vision_blocks(blocks, source, samples, step)
    run_decoder_blocks(blocks, source, samples, features, step)
    return found


def record_input(module: nn.Module, rows: list[torch.Tensor]) -> Any:
    """Appends the input of down_proj, before its quantizer, at every call; returns the handle of the hook."""
    layer = module.get_submodule(LINEAR)
    return layer.register_forward_pre_hook(lambda _, args: rows.append(args[0].flatten(0, -2)), prepend=True)


def steps_of_median(observed: Observed, quantizers: Quantizers, prefix: Callable[[int], str]) -> list[float | None]:
    """Steps between zero and the median magnitude of every down_proj's input; None where it is not quantized.

    prefix: canonical name of a layer by its number.
    """
    steps: list[float | None] = []
    for number in sorted(observed.inputs):
        quantizer = quantizers.get(f"{prefix(number)}.{LINEAR}")
        median = float(torch.cat(observed.inputs[number]).abs().median())
        steps.append(None if quantizer is None else median / quantizer[0])
    return steps


def draw_tokens(observed: Observed, path: Path) -> None:
    """Draws the largest magnitude of each token in each layer, of the first sample: input of down_proj, and output."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (title, tensors) in zip(
        panels, (("input of down_proj", observed.inputs), ("output of the layer", observed.outputs)), strict=True
    ):
        rows = np.stack(
            [tensors[n][0].reshape(-1, tensors[n][0].shape[-1])[:TOKENS].abs().amax(-1).numpy() for n in sorted(tensors)]
        )
        image = axes.imshow(np.log10(np.maximum(rows, 1e-3)), aspect="auto", cmap="magma", interpolation="nearest")
        axes.set(title=title, xlabel="token")
        figure.colorbar(image, ax=axes, label="log10 of the largest magnitude")
    panels[0].set_ylabel("decoder layer")
    figure.savefig(path, dpi=90, metadata={"Software": None})


def draw_steps(before: Sequence[float | None], after: Sequence[float | None], path: Path) -> None:
    """Draws the steps of the median by layer, before and after."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    axes = figure.subplots()
    for label, steps, marker in (("round-to-nearest, all tokens", before, "o"), ("fast, behind the prefix", after, "s")):
        points = [(n, value) for n, value in enumerate(steps) if value is not None]
        axes.plot(*zip(*points, strict=True), marker, linestyle="-", markersize=4, label=label)
    axes.set(yscale="log", xlabel="decoder layer", ylabel="steps up to the median")
    axes.axhline(0.5, color="#999999", linestyle="--", linewidth=1)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=90, metadata={"Software": None})


def open_export(plan: Path) -> tuple[Manifest, CalibratedCheckpoint, Quantizers]:
    """The manifest, the calibrated checkpoint and the input quantizers of an export."""
    manifest = read_manifest(plan.with_suffix(".json"))
    calibrated = CalibratedCheckpoint(manifest.file("calibrated"))
    return manifest, calibrated, {n: q for n in calibrated.schemes if (q := calibrated.input_quantizer(n)) is not None}


def run_export(checkpoint: Checkpoint, plan: Path, samples: Sequence[Sample]) -> list[float | None]:
    """Runs an export's calibrated checkpoint in torch; returns the steps of the median by layer."""
    _, calibrated, quantizers = open_export(plan)
    text, blocks = checkpoint.config.text, make_blocks(checkpoint.hf_config)
    prefix = calibrated.read_prefix((text.num_layers, text.num_kv_heads, text.head_dim))
    if prefix is not None:
        blocks, samples = replace(blocks, prefix=prefix), cut_prefix(samples, prefix.token_ids)
    observed = observe(blocks, DequantizedSource(calibrated), samples, quantizers)
    return steps_of_median(observed, quantizers, lambda number: blocks.text_layers[number].prefix)


HEAD = """# Outliers of a trained decoder

Made by `python -m tools.study.outliers` on the trained model of [smol.md](smol.md), with the two exports that the head of
that script names. Few tokens carry activations far beyond all others (Sun et al. 2024, arXiv 2402.17762).

![largest magnitude by layer and token](outliers-tokens.png)

Each square is a token in a layer: the largest magnitude at the input of `down_proj`, and of the layer's output, in the
float model on the first calibration sample; the first {tokens} tokens. The first {prefix} tokens are those that every prompt
of the chat template begins with, but for white space at their end, which may join what follows. `--prefix` (by default all
of them) computes their keys and values once, in float, and calibration and sessions start behind them.

The largest value of a layer's output, where it is massive (above 100, and 300 times the median), over {samples} samples:

| layer | token | channel | magnitude | times the median | behind the prefix: magnitude | times the median |
|---|---|---|---|---|---|---|
"""
STEPS = """
![steps of the quantizer up to the median](outliers-steps.png)

For the input of every `down_proj` of an int8 export: how many steps of its static quantizer lie between zero and the median
magnitude. Below half a step (dashed), more than half of all values are rounded to zero. Layers without a square read float
inputs in the `fast` export (W8A16), as 8 bits would have added more than a ten-thousandth to the squared norm of the block's
output: {fallbacks}.

| layer | round-to-nearest, all tokens | `fast`, behind the prefix |
|---|---|---|
"""


def write_page(docs: Path, checkpoint: Checkpoint, plans: tuple[Path, Path], samples: Sequence[Sample]) -> None:
    """Writes outliers.md, its two pictures and outliers.json."""
    blocks = make_blocks(checkpoint.hf_config)
    observed = observe(blocks, checkpoint.source, samples, {})
    draw_tokens(observed, docs / "outliers-tokens.png")
    manifest, _, _ = open_export(plans[1])
    count = len(manifest.calibration["prefix"]["token_ids"])
    before, after = (run_export(checkpoint, plan, samples) for plan in plans)
    draw_steps(before, after, docs / "outliers-steps.png")
    fallbacks = [
        f"{b['name'].rpartition('.')[2]}" for b in manifest.calibration["blocks"] if LINEAR in b.get("fallbacks", ())
    ]
    page = HEAD.format(tokens=TOKENS, prefix=count, samples=len(samples))
    for number in sorted(observed.outputs):
        whole, behind = observed.outputs[number], [x[:, count:] for x in observed.outputs[number]]
        if found := find_massive(whole):
            rest = find_massive(behind)
            cells = f"{rest['magnitude']:,.0f} | {rest['times_median']:,.0f}" if rest else "not massive | "
            numbers = f"{found['magnitude']:,.0f} | {found['times_median']:,.0f}"
            page += f"| {number} | {found['position']} | {found['channel']} | {numbers} | {cells} |\n"
    page += STEPS.format(fallbacks="layers " + ", ".join(fallbacks))
    for number, values in enumerate(zip(before, after, strict=True)):
        page += f"| {number} | " + " | ".join("float" if v is None else f"{v:.2f}" for v in values) + " |\n"
    (docs / "outliers.md").write_text(page)
    (docs / "outliers.json").write_text(json.dumps({"before": before, "after": after}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="build/smol")
    parser.add_argument("--data", type=Path, default=Path("build/smol-data/calibration-0.jsonl"))
    parser.add_argument("--before", type=Path, required=True, help="an int8 export by round-to-nearest, without prefix")
    parser.add_argument("--after", type=Path, required=True, help="an int8 export by fast, with its prefix")
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    args = parser.parse_args()
    checkpoint = open_checkpoint(args.model)
    entries = read_entries(args.data, SAMPLES, SAMPLES)
    samples = encode_entries(entries, load_processor(checkpoint.folder), checkpoint.config, 4096)
    write_page(args.docs, checkpoint, (args.before, args.after), samples)


if __name__ == "__main__":
    main()
