"""Accuracy check of every model family on small random checkpoints: against transformers, on ONNX Runtime, as engines.

    python -m tools.families.check --out docs/families.md

Errors are relative: the L2 norm of the difference of all logits, divided by that of transformers' logits; the largest over
several questions. Engines are built by TensorRT-RTX for sm89 and read back, not run.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

import qvlm_export
from qvlm_export.calibrate.blockwise.blocks import ModelBlocks, make_blocks
from qvlm_export.calibrate.blockwise.forward import Step, float_step, load_head, run_decoder_blocks, run_vision_blocks
from qvlm_export.calibrate.checkpoint.calibrated import CalibratedCheckpoint
from qvlm_export.calibrate.checkpoint.prefix import cut_prefix
from qvlm_export.calibrate.checkpoint.samples import Sample
from qvlm_export.calibrate.checkpoint.tensor_source import TensorSource
from qvlm_export.calibrate.quantization.fake_quantized import DequantizedSource, fake_quantized_step, round_rotary_tables
from qvlm_export.checkpoints.chat_templates import chat_text
from qvlm_export.checkpoints.checkpoint import Checkpoint, open_checkpoint
from qvlm_export.engines.check.graph_weights import wrong_weights
from qvlm_export.engines.runtime.session import Session
from qvlm_export.inputs.samples import encode_prompt, load_processor
from tools.families.random_families import KINDS, write_family
from tools.families.random_original import ORIGINALS, write_original

SAMPLES = 4  # size of the calibration set, from the built-in one
# Heights and widths of the images of each question: wide; small; nearly square and large; two of different shapes.
IMAGE_SIZES = ([(60, 90)], [(30, 20)], [(200, 210)], [(40, 300), (90, 80)])


@dataclass(frozen=True)
class Question:
    """One question. given: the inputs of transformers' model. sample: the same for ours."""

    given: dict[str, Any]
    sample: Sample


@dataclass(frozen=True)
class Kept:
    """A checkpoint with questions.

    reference: transformers' model in float32. wanted: its logits for each question, float32 [S, vocab].
    """

    checkpoint: Checkpoint
    questions: list[Question]
    reference: torch.nn.Module
    wanted: list[np.ndarray]


@dataclass(frozen=True)
class Row:
    """Results of one kind of checkpoint.

    torch, fp16, int4: relative errors of the block-by-block model, of the float16 graph, and of the INT4 graph against fake
    quantization in torch. quantized: quantized linears. integer: those of them that run on integers in the engine.
    """

    kind: str
    repositories: str
    torch: float
    fp16: float
    int4: float
    integer: int
    quantized: int


def make_cases(checkpoint: Checkpoint) -> list[Question]:
    """A question for each entry of IMAGE_SIZES, encoded by the checkpoint's own processor."""
    processor, rng, cases = load_processor(checkpoint.folder), np.random.default_rng(0), []
    for sizes in IMAGE_SIZES:
        images = [Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in sizes]
        text = chat_text(processor, [{"role": "user", "text": "What color is it?", "images": len(images)}])
        inputs = processor(images=[images], text=[text], return_tensors="pt")
        encoded = encode_prompt(processor, checkpoint.config, text, images)
        sample = Sample(encoded.input_ids, encoded.pixel_values, len(encoded.input_ids), encoded.placement)
        cases.append(Question(dict(inputs), sample))
    return cases


def reference_logits(model: torch.nn.Module, case: Question) -> np.ndarray:
    """Logits of transformers' model, [S, vocab]."""
    with torch.inference_mode():
        logits: np.ndarray = model(**case.given).logits[0].numpy()
    return logits


def walked_logits(blocks: ModelBlocks, source: TensorSource, epsilon: float, sample: Sample, step: Step) -> np.ndarray:
    """Logits of the model computed block by block, [S, vocab]."""
    features = run_vision_blocks(blocks, source, [sample], step)
    hidden = run_decoder_blocks(blocks, source, [sample], features, step)
    return load_head(source, epsilon).logits(hidden[0][0]).numpy()


def simulated_logits(checkpoint: Checkpoint, folder: Path) -> Callable[[Sample], np.ndarray]:
    """A function that computes logits with fake quantization in torch, with floats rounded as in the float16 graph.

    The logits are those behind the prefix, if the checkpoint was calibrated with one.
    """
    calibrated, text = CalibratedCheckpoint(folder), checkpoint.config.text
    source = DequantizedSource(calibrated, "float16")
    prefix = calibrated.read_prefix((text.num_layers, text.num_kv_heads, text.head_dim))
    blocks = replace(round_rotary_tables(make_blocks(checkpoint.hf_config), "float16"), prefix=prefix)
    step, tokens = fake_quantized_step(calibrated, source), () if prefix is None else prefix.token_ids
    return lambda sample: walked_logits(blocks, source, text.rms_norm_eps, cut_prefix([sample], tokens)[0], step)


def session_logits(session: Session, sample: Sample) -> np.ndarray:
    """Logits of an exported model, [S, vocab]."""
    logits: np.ndarray = session.logits(sample.input_ids[None], sample.pixel_values, sample.placement)[0]
    return logits


def relative(got: np.ndarray, wanted: np.ndarray) -> float:
    """L2 norm of the difference, relative to that of `wanted`."""
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


def torch_error(case: Kept) -> float:
    """Largest relative error of the float32 model computed block by block."""
    opened = case.checkpoint
    blocks, step = make_blocks(opened.hf_config), float_step(opened.source)
    return max(
        relative(walked_logits(blocks, opened.source, opened.config.text.rms_norm_eps, question.sample, step), wanted)
        for question, wanted in zip(case.questions, case.wanted, strict=True)
    )


def fp16_error(case: Kept) -> float:
    """Largest relative error of the float16 export on ONNX Runtime."""
    plan = case.checkpoint.folder / "fp16.plan"
    qvlm_export.export(case.checkpoint.folder, plan, scheme="fp16", backend="onnx")
    with qvlm_export.load(plan, "onnxruntime:cpu") as model:
        return max(
            relative(session_logits(model.session, question.sample), wanted)
            for question, wanted in zip(case.questions, case.wanted, strict=True)
        )


def int4_error(case: Kept) -> float:
    """Largest relative error of an export with an INT4 decoder on ONNX Runtime, against fake quantization in torch.

    The tower stays float: sums in another order change the INT8 rounding of activations near a tie, and the error would be
    that of a few ties. `build_engine` checks that the integers of the tower in the graph are the calibrated ones.
    """
    folder = case.checkpoint.folder
    recipe, plan = folder / "float_tower.yaml", folder / "int4.plan"
    recipe.write_text('base: int4\nrules: [{match: "[vm]*", scheme: float}]\n')
    result = qvlm_export.export(folder, plan, recipe=recipe, backend="onnx", samples=SAMPLES)
    simulate = simulated_logits(case.checkpoint, result.manifest.file("calibrated"))
    with qvlm_export.load(plan, "onnxruntime:cpu") as model:
        pairs = [(session_logits(model.session, q.sample), simulate(q.sample)) for q in case.questions]
    return max(relative(got[-len(wanted) :], wanted) for got, wanted in pairs)


def build_engine(case: Kept) -> tuple[int, int]:
    """Exports with TensorRT-RTX engines; returns the number of quantized linears, and how many run on the right integers."""
    folder = case.checkpoint.folder
    result = qvlm_export.export(folder, folder / "engine.plan", backend="tensorrt-rtx", targets=("sm89",), samples=SAMPLES)
    manifest = result.manifest
    calibrated = CalibratedCheckpoint(manifest.file("calibrated"))
    wrong = {
        mismatch.linear
        for part in ("vision", "language")
        for mismatch in wrong_weights(manifest.file(f"{part}_onnx"), calibrated, _select_part(manifest.linears, part))
    }
    return len(manifest.linears), sum(check.passed and check.linear not in wrong for check in result.checks)


def _select_part(linears: Iterable[str], part: str) -> list[str]:
    return [name for name in linears if name.startswith("language_model.") == (part == "language")]


def check(kind: str, case: Kept) -> Row:
    """Runs all checks of one kind of checkpoint."""
    quantized, integer = build_engine(case)
    return Row(kind, ALL[kind], torch_error(case), fp16_error(case), int4_error(case), integer, quantized)


ALL = {**{name: kind.repositories for name, kind in KINDS.items()}, **{n: o.repositories for n, o in ORIGINALS.items()}}


def make(folder: Path, kind: str) -> Kept:
    """Writes a checkpoint of a kind and computes transformers' float32 logits for its questions."""
    if kind in ORIGINALS:
        reference = write_original(folder, kind)
    else:
        write_family(folder, kind)
        reference = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    checkpoint = open_checkpoint(str(folder))
    questions = make_cases(checkpoint)
    return Kept(checkpoint, questions, reference, [reference_logits(reference, question) for question in questions])


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| built like | torch, block by block | fp16 graph | int4 graph, against fake-quant | engine: integer linears |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        errors = " | ".join(f"{error:.1e}" for error in (row.torch, row.fp16, row.int4))
        lines.append(f"| {row.repositories} | {errors} | {row.integer} of {row.quantized} |")
    return "\n".join(lines) + "\n"


BEGIN, END = "<!-- table -->\n", "<!-- end of table -->\n"


def replace_table(text: str, rows: list[Row]) -> str:
    """The document with a new table between its two marks."""
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + table(rows) + END + rest.partition(END)[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a Markdown file with the two marks")
    parser.add_argument("--kinds", nargs="*", choices=ALL, default=list(ALL))
    parser.add_argument("--keep", type=Path, help="folder to keep the checkpoints in")
    args = parser.parse_args()
    rows = []
    with nullcontext(args.keep) if args.keep else tempfile.TemporaryDirectory() as place:
        for kind in args.kinds:
            folder = Path(place) / kind
            rows.append(check(kind, make(folder, kind)))
            print(rows[-1], flush=True)
    args.out.write_text(replace_table(args.out.read_text(encoding="utf-8"), rows), encoding="utf-8")


if __name__ == "__main__":
    main()
