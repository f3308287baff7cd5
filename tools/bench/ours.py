"""Our own rows of the benchmark: calibrate, simulate in torch, hand back logits. One process runs all cells of one row.

    python -m tools.bench.ours --row rtn --cells W8A8/0 W4A16/0 --model qvlm_export/tiny --data build/bench/data \\
        --evaluation build/bench/data/evaluation-1000.npz --out DIR

Writes COLUMN-SEED.npy and .json into DIR, as the peers' programs do for one cell, and prints each cell when it is written.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qvlm_export.calibrate.blockwise.blocks import ModelBlocks, make_blocks
from qvlm_export.calibrate.blockwise.forward import Step, embed_tokens, float_step, load_finite, load_head, run_vision_blocks
from qvlm_export.calibrate.blockwise.job import CalibrationJob, Progress
from qvlm_export.calibrate.calibrators.rtn import calibrate_rtn
from qvlm_export.calibrate.calibrators.search import calibrate_search
from qvlm_export.calibrate.checkpoint.calibrated import CalibratedCheckpoint, CalibratedWriter
from qvlm_export.calibrate.checkpoint.samples import Sample
from qvlm_export.calibrate.checkpoint.scheme import LinearScheme, fit_scheme
from qvlm_export.calibrate.checkpoint.tensor_source import TensorSource
from qvlm_export.calibrate.quantization.config import FAST, FULL, RTN_LINEAR, LinearConfig, SearchConfig
from qvlm_export.calibrate.quantization.fake_quantized import DequantizedSource, fake_quantized_step
from qvlm_export.calibrate.qvlm.calibrator import calibrate_percentile, calibrate_qvlm
from qvlm_export.checkpoints.checkpoint import Checkpoint, open_checkpoint
from tools.bench.data import CALIBRATION_SAMPLES, answer_spans, calibration_file, load_samples
from tools.peers.common import Measured, equal_lengths, measured
from tools.peers.rows import ALL

GROUP_SIZE = 64
VISION_BATCH = 50
Calibrator = Callable[[CalibrationJob, CalibratedWriter, Progress], dict[str, Any]]


@dataclass(frozen=True)
class OurRow:
    """A row of the table. main: columns that are run without being asked for; the others, ablations say, with --extra."""

    name: str
    line: str
    calibrator: Calibrator
    columns: tuple[str, ...] = ALL
    main: tuple[str, ...] = ALL


def _searching(method: SearchConfig) -> Calibrator:
    return functools.partial(calibrate_search, method=method)


def _changed(whole: SearchConfig, **settings: Any) -> SearchConfig:
    """`fast` or `full`, its variant changed."""
    return replace(whole, linear=replace(whole.linear, **settings))


GPTQ = LinearConfig(activation_ranges="absmax", weight_ranges="absmax", ridge=None)
ROWS = (
    OurRow("rtn", "round-to-nearest, absmax", calibrate_rtn),
    OurRow("percentile", "layer-wise percentile", calibrate_percentile),
    OurRow("smoothquant", "SmoothQuant", _searching(SearchConfig("smoothquant", RTN_LINEAR))),
    OurRow("awq", "AWQ-style", _searching(SearchConfig("awq", RTN_LINEAR))),
    OurRow("gptq", "GPTQ", _searching(SearchConfig("none", GPTQ))),
    OurRow("fold-mse-gptq", "folding + output-MSE + GPTQ", _searching(SearchConfig("search", LinearConfig(ridge=None)))),
    OurRow("printed", "Q-VLM as printed", calibrate_qvlm),
    OurRow("fast", "ours, fast", _searching(FAST)),
    OurRow("full", "ours, full", _searching(FULL)),
    *(
        OurRow(f"fast: {name}", f"fast, {name}", _searching(method), main=())
        for name, method in {
            "no folding": replace(FAST, equalization="none"),
            "folding by one exponent": replace(FAST, equalization="search"),
            "tokens by logits": replace(FAST, token_weighting="logits"),
            "tokens by modality": replace(FAST, token_weighting="modality"),
            "no aiming": _changed(FAST, ridge=None),
            "rounded to nearest": _changed(FAST, rounding="nearest"),
            "largest values as ranges": _changed(FAST, activation_ranges="absmax"),
            "activations clipped": _changed(FAST, activation_ranges="output"),
            "weights clipped": _changed(FAST, weight_ranges="output"),
        }.items()
    ),
    *(
        OurRow(f"full: {name}", f"full, {name}", _searching(method), main=())
        for name, method in {
            "rounded by GPTQ": _changed(FULL, rounding="gptq"),
            "rounded to nearest": _changed(FULL, rounding="nearest"),
            "no undecided prompts": replace(FULL, mixup_prompts=0),
            "own questions only": replace(FULL, questions=1, mixup_prompts=0, random_word_prompts=0),
            "no scrambled texts": replace(FULL, random_word_prompts=0),
            "no leverage": replace(FULL, leverage=False),
            "all tokens and directions alike": replace(_changed(FULL, rounding="gptq"), token_weighting="plain"),
            "tokens by modality": replace(FULL, token_weighting="modality"),
            "by logits": replace(FULL, token_weighting="logits"),
            "by KL": replace(FULL, token_weighting="kl"),
            "factors and ranges by the output as it is": _changed(FULL, by_output=False),
            "tower for itself": replace(FULL, vision="own"),
            "tower rounded to nearest": replace(FULL, vision="none"),
            "no folding": replace(FULL, equalization="none"),
            "folding by one exponent": replace(FULL, equalization="search"),
            "largest values as ranges": _changed(FULL, activation_ranges="absmax"),
            "weights clipped": _changed(FULL, weight_ranges="output"),
            "largest weights as ranges": _changed(FULL, weight_ranges="absmax"),
            "ranges as GPTQ rounds best": _changed(FULL, weight_ranges="rounded"),
            "no aiming": _changed(FULL, ridge=None),
            "no learning": replace(FULL, learn_steps=0),
            "300 steps of learning": replace(FULL, learn_steps=300),
            "rounded to nearest, 300 steps of learning": replace(_changed(FULL, rounding="nearest"), learn_steps=300),
        }.items()
    ),
)


@functools.lru_cache(maxsize=1)
def opened(model_folder: Path) -> tuple[Checkpoint, ModelBlocks]:
    """The checkpoint and its empty blocks, read once a process."""
    checkpoint = open_checkpoint(str(model_folder))
    return checkpoint, make_blocks(checkpoint.hf_config)


def plan_of(checkpoint: Checkpoint, blocks: ModelBlocks, column: str) -> dict[str, LinearScheme]:
    """The column's scheme for every quantizable linear: tower, projector and decoder, without lm_head."""
    weight, _, activation = column.removeprefix("W").partition("A")
    activation_bits = None if activation == "16" else int(activation)
    return {
        name: fit_scheme(name, checkpoint.source.shape(f"{name}.weight"), int(weight), activation_bits, (GROUP_SIZE,))
        for name in blocks.quantizable()
    }


def calibrated_logits(
    model_folder: Path,
    method_name: str,
    column: str,
    calibration_samples: Sequence[Sample],
    evaluation_samples: Sequence[Sample],
) -> tuple[np.ndarray, dict[str, Any]]:
    """Logits that predict the answers, float32 [tokens, vocab], and what the calibration cost and said.

    Opening the checkpoint is not measured. The calibrated checkpoint lies in a temporary folder and is read back for the
    simulation, so what is judged is what is stored.
    """
    row = next(r for r in ROWS if r.name == method_name)
    checkpoint, blocks = opened(model_folder)
    job = CalibrationJob(blocks, checkpoint.source, plan_of(checkpoint, blocks, column), calibration_samples)
    logits, summary, cost = judged(job, checkpoint, row.calibrator, evaluation_samples)
    record = {
        "seconds": cost.seconds,
        "wall_seconds": cost.wall_seconds,
        "peak_bytes": cost.peak_bytes,
        "settings": {k: v for k, v in summary.items() if isinstance(v, str | int | float)},
        "versions": versions(),
        "threads": torch.get_num_threads(),
    }
    return logits, record


def judged(
    job: CalibrationJob, checkpoint: Checkpoint, calibrator: Calibrator, samples: Sequence[Sample]
) -> tuple[np.ndarray, dict[str, Any], Measured]:
    """Logits of the answers to `samples` by what the calibrator stored, its summary, and what it cost."""
    with tempfile.TemporaryDirectory() as scratch:
        writer = CalibratedWriter(Path(scratch))
        with measured() as cost:
            summary = calibrator(job, writer, lambda *_: None)
            writer.finish(checkpoint.config_json, summary)
        calibrated = CalibratedCheckpoint(Path(scratch))
        source = DequantizedSource(calibrated)
        return answer_logits(checkpoint, job.blocks, source, fake_quantized_step(calibrated, source), samples), summary, cost


def answer_logits(
    checkpoint: Checkpoint, blocks: ModelBlocks, source: TensorSource, step: Step, samples: Sequence[Sample]
) -> np.ndarray:
    """What peers.common.answer_logits says of a torch model, block by block: questions of equal length go together."""
    images = []
    for start in range(0, len(samples), VISION_BATCH):
        part = samples[start : start + VISION_BATCH]
        together = Sample(np.zeros(0, np.int64), np.concatenate([s.pixel_values for s in part]), 0)
        images += run_vision_blocks(blocks, source, [together], step)[0].chunk(len(part))
    table = load_finite(source, "language_model.model.embed_tokens.weight")
    groups = list(equal_lengths([len(s.input_ids) for s in samples]))
    hidden = [torch.cat([embed_tokens(table, blocks.image_token_id, samples[n], images[n]) for n in g]) for g in groups]

    def run(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(x.shape[1])[None]
        rope = blocks.rotary(x, position_ids=positions)
        return module(x, attention_mask=None, position_ids=positions, position_embeddings=rope)

    for block in blocks.text_layers:
        hidden = step(block, hidden, run)
    head = load_head(source, checkpoint.config.text.rms_norm_eps)
    spans = answer_spans(samples)
    found = {}
    for numbers, batch in zip(groups, hidden, strict=True):
        for row, number in enumerate(numbers):
            first, last = spans[number]
            found[number] = head.logits(batch[row, first:last]).numpy()
    return np.concatenate([found[number] for number in range(len(samples))])


def reference_logits(model_folder: Path, samples: Sequence[Sample]) -> np.ndarray:
    """The float32 checkpoint's own."""
    checkpoint, blocks = opened(model_folder)
    return answer_logits(checkpoint, blocks, checkpoint.source, float_step(checkpoint.source), samples)


def versions() -> Mapping[str, str]:
    return {name: importlib.metadata.version(name) for name in ("qvlm-export", "torch", "transformers", "numpy")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", choices=[r.name for r in ROWS], required=True)
    parser.add_argument("--cells", nargs="+", required=True, help="COLUMN/SEED")
    parser.add_argument("--samples", type=int, default=CALIBRATION_SAMPLES, help="to calibrate on")
    for name in ("model", "data", "evaluation", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    args = parser.parse_args()
    evaluation = load_samples(args.evaluation)
    opened(args.model)
    for cell in args.cells:
        column, seed = cell.split("/")
        calibration = load_samples(calibration_file(args.data, int(seed), args.samples))
        torch.manual_seed(int(seed))
        logits, record = calibrated_logits(args.model, args.row, column, calibration, evaluation)
        out = args.out / f"{column}-{seed}.npy"
        np.save(out, logits)
        out.with_suffix(".json").write_text(json.dumps(record) + "\n")
        print(f"{cell} {out}", flush=True)


if __name__ == "__main__":
    main()
