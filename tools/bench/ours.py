"""Our rows of the methods benchmark: calibrates, computes with fake quantization in torch, and stores the logits.

    python -m tools.bench.ours --row rtn --cells W8A8/0 W4A16/0 --model qvlm_export/tiny --data build/bench/data \\
        --evaluation build/bench/data/evaluation-1000.npz --out DIR

One process runs all cells of one row. For each cell it writes COLUMN-SEED.npy (logits of the answer tokens) and
COLUMN-SEED.json (cost and settings) into DIR and then prints the cell. The peers' programs write the same for one cell.
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
    """A row of the table.

    line: the line of the summary table to which it belongs. columns: the schemes that can be run; those that are not in
    `main` are run with --extra only, as are all columns of the ablations.
    """

    name: str
    line: str
    calibrator: Calibrator
    columns: tuple[str, ...] = ALL
    main: tuple[str, ...] = ALL


def _make_calibrator(config: SearchConfig) -> Calibrator:
    return functools.partial(calibrate_search, config=config)


def _change_linear(config: SearchConfig, **settings: Any) -> SearchConfig:
    """The configuration with other settings of its linears."""
    return replace(config, linear=replace(config.linear, **settings))


GPTQ = LinearConfig(activation_ranges="absmax", weight_ranges="absmax", ridge=None)
ROWS = (
    OurRow("rtn", "round-to-nearest, absmax", calibrate_rtn),
    OurRow("percentile", "layer-wise percentile", calibrate_percentile),
    OurRow("smoothquant", "SmoothQuant", _make_calibrator(SearchConfig("smoothquant", RTN_LINEAR))),
    OurRow("awq", "AWQ-style", _make_calibrator(SearchConfig("awq", RTN_LINEAR))),
    OurRow("gptq", "GPTQ", _make_calibrator(SearchConfig("none", GPTQ))),
    OurRow(
        "equalize-mse-gptq",
        "equalization + output-MSE + GPTQ",
        _make_calibrator(SearchConfig("search", LinearConfig(ridge=None))),
    ),
    OurRow("qvlm", "Q-VLM as printed", calibrate_qvlm),
    OurRow("fast", "ours, fast", _make_calibrator(FAST)),
    OurRow("full", "ours, full", _make_calibrator(FULL)),
    *(
        OurRow(f"fast: {name}", f"fast, {name}", _make_calibrator(config), main=())
        for name, config in {
            "no equalization": replace(FAST, equalization="none"),
            "equalization by one exponent": replace(FAST, equalization="search"),
            "tokens by logits": replace(FAST, token_weighting="logits"),
            "tokens by kind": replace(FAST, token_weighting="modality"),
            "no output matching": _change_linear(FAST, ridge=None),
            "round-to-nearest": _change_linear(FAST, rounding="nearest"),
            "absmax activation ranges": _change_linear(FAST, activation_ranges="absmax"),
            "activation ranges by output error": _change_linear(FAST, activation_ranges="output"),
            "weight ranges by output error": _change_linear(FAST, weight_ranges="output"),
        }.items()
    ),
    *(
        OurRow(f"full: {name}", f"full, {name}", _make_calibrator(config), main=())
        for name, config in {
            "rounded by GPTQ": _change_linear(FULL, rounding="gptq"),
            "round-to-nearest": _change_linear(FULL, rounding="nearest"),
            "no mixup prompts": replace(FULL, mixup_prompts=0),
            "own questions only": replace(FULL, questions_per_image=1, mixup_prompts=0, random_word_prompts=0),
            "no random words": replace(FULL, random_word_prompts=0),
            "no leverage": replace(FULL, leverage=False),
            "no gradients": replace(_change_linear(FULL, rounding="gptq"), token_weighting="plain"),
            "tokens by kind": replace(FULL, token_weighting="modality"),
            "tokens by logits": replace(FULL, token_weighting="logits"),
            "tokens by KL": replace(FULL, token_weighting="kl"),
            "factors and ranges without output Hessians": _change_linear(FULL, by_output=False),
            "tower for its own output": replace(FULL, vision_target="own"),
            "tower round-to-nearest": replace(FULL, vision_target="none"),
            "no equalization": replace(FULL, equalization="none"),
            "equalization by one exponent": replace(FULL, equalization="search"),
            "absmax activation ranges": _change_linear(FULL, activation_ranges="absmax"),
            "weight ranges by output error": _change_linear(FULL, weight_ranges="output"),
            "absmax weight ranges": _change_linear(FULL, weight_ranges="absmax"),
            "weight ranges by GPTQ error": _change_linear(FULL, weight_ranges="rounded"),
            "no output matching": _change_linear(FULL, ridge=None),
            "no learned rounding": replace(FULL, learn_steps=0),
            "300 steps of learned rounding": replace(FULL, learn_steps=300),
            "round-to-nearest, 300 steps of learned rounding": replace(
                _change_linear(FULL, rounding="nearest"), learn_steps=300
            ),
        }.items()
    ),
)


@functools.lru_cache(maxsize=1)
def load_model(model_folder: Path) -> tuple[Checkpoint, ModelBlocks]:
    """The opened checkpoint and its blocks without weights; cached, so that a process opens it once."""
    checkpoint = open_checkpoint(str(model_folder))
    return checkpoint, make_blocks(checkpoint.hf_config)


def schemes_of(checkpoint: Checkpoint, blocks: ModelBlocks, column: str) -> dict[str, LinearScheme]:
    """The scheme of a column, such as W4A16, for every linear of tower, projector and decoder; lm_head stays float."""
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
    """Calibrates one cell; returns logits of the answer tokens, float32 [tokens, vocab], and the record of its cost.

    The cost leaves out opening the checkpoint. The calibrated checkpoint is written to a temporary folder and read back, so
    the logits are those of what is stored.
    """
    row = next(r for r in ROWS if r.name == method_name)
    checkpoint, blocks = load_model(model_folder)
    job = CalibrationJob(blocks, checkpoint.source, schemes_of(checkpoint, blocks, column), calibration_samples)
    logits, summary, cost = calibrate_and_run(job, checkpoint, row.calibrator, evaluation_samples)
    record = {
        "seconds": cost.seconds,
        "wall_seconds": cost.wall_seconds,
        "peak_bytes": cost.peak_bytes,
        "settings": {k: v for k, v in summary.items() if isinstance(v, str | int | float)},
        "versions": versions(),
        "threads": torch.get_num_threads(),
    }
    return logits, record


def calibrate_and_run(
    job: CalibrationJob, checkpoint: Checkpoint, calibrator: Calibrator, samples: Sequence[Sample]
) -> tuple[np.ndarray, dict[str, Any], Measured]:
    """Calibrates and runs the fake-quantized model on `samples`.

    Returns logits of the answer tokens, float32 [tokens, vocab], the summary of the calibrator, and its cost.
    """
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
    """Logits of the answer tokens, float32 [tokens, vocab], block by block; questions of equal length form a batch.

    The counterpart of peers.common.answer_logits, which runs a whole torch model.
    """
    images = []
    for start in range(0, len(samples), VISION_BATCH):
        part = samples[start : start + VISION_BATCH]
        stacked = Sample(np.zeros(0, np.int64), np.concatenate([s.pixel_values for s in part]), 0)
        images += run_vision_blocks(blocks, source, [stacked], step)[0].chunk(len(part))
    table = load_finite(source, "language_model.model.embed_tokens.weight")
    batches = list(equal_lengths([len(s.input_ids) for s in samples]))
    hidden = [torch.cat([embed_tokens(table, blocks.image_token_id, samples[n], images[n]) for n in b]) for b in batches]

    def run(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(x.shape[1])[None]
        rope = blocks.rotary(x, position_ids=positions)
        return module(x, attention_mask=None, position_ids=positions, position_embeddings=rope)

    for block in blocks.text_layers:
        hidden = step(block, hidden, run)
    head = load_head(source, checkpoint.config.text.rms_norm_eps)
    spans = answer_spans(samples)
    logits = {}
    for numbers, batch in zip(batches, hidden, strict=True):
        for row, number in enumerate(numbers):
            first, last = spans[number]
            logits[number] = head.logits(batch[row, first:last]).numpy()
    return np.concatenate([logits[number] for number in range(len(samples))])


def reference_logits(model_folder: Path, samples: Sequence[Sample]) -> np.ndarray:
    """Logits of the answer tokens by the float32 checkpoint, float32 [tokens, vocab]."""
    checkpoint, blocks = load_model(model_folder)
    return answer_logits(checkpoint, blocks, checkpoint.source, float_step(checkpoint.source), samples)


def versions() -> Mapping[str, str]:
    """Installed versions of the packages that determine a result, by name."""
    return {name: importlib.metadata.version(name) for name in ("qvlm-export", "torch", "transformers", "numpy")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", choices=[r.name for r in ROWS], required=True)
    parser.add_argument("--cells", nargs="+", required=True, help="COLUMN/SEED")
    parser.add_argument("--samples", type=int, default=CALIBRATION_SAMPLES, help="size of the calibration set")
    for name in ("model", "data", "evaluation", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    args = parser.parse_args()
    evaluation = load_samples(args.evaluation)
    load_model(args.model)
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
