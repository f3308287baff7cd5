"""Our rows of the methods benchmark: calibrates, computes with fake quantization in torch, and stores what it computed.

    python -m tools.bench.ours --row rtn --cells W8A8/0 W4A16/0 --model qvlm_export/tiny --data build/bench/data \\
        --evaluation build/bench/data/evaluation-1000.npz --out DIR

One process runs all cells of one row. For each cell it writes COLUMN-SEED.npy (logits of the answer tokens, or hidden states
of all tokens with `--states hidden`) and COLUMN-SEED.json (cost and settings) into DIR and then prints the cell. The peers'
programs write the same for one cell. A model is calibrated and run behind the prefix of its chat template, as an export is.
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
from qvlm_export.calibrate.blockwise.forward import compute_prefix, float_step
from qvlm_export.calibrate.blockwise.job import CalibrationJob, Progress
from qvlm_export.calibrate.calibrators.rtn import calibrate_rtn
from qvlm_export.calibrate.calibrators.search import calibrate_search
from qvlm_export.calibrate.checkpoint.calibrated import CalibratedCheckpoint, CalibratedWriter
from qvlm_export.calibrate.checkpoint.prefix import cut_prefix
from qvlm_export.calibrate.checkpoint.samples import Sample
from qvlm_export.calibrate.checkpoint.scheme import LinearScheme, fit_scheme
from qvlm_export.calibrate.quantization.config import FAST, FULL, FULL_LARGE, RTN_LINEAR, LinearConfig, SearchConfig
from qvlm_export.calibrate.quantization.fake_quantized import DequantizedSource, fake_quantized_step
from qvlm_export.calibrate.qvlm.calibrator import calibrate_qvlm
from qvlm_export.calibrate.qvlm.config import QVLM, QvlmConfig
from qvlm_export.checkpoints.checkpoint import Checkpoint, open_checkpoint
from qvlm_export.inputs.prefix import find_common_prefix
from qvlm_export.inputs.samples import load_processor
from tools.bench.cells.evaluate import EVALUATIONS, Evaluation, answer_logits
from tools.bench.data import CALIBRATION_SAMPLES, calibration_file, load_samples
from tools.peers.common import LOGITS, Measured, measured
from tools.peers.rows import ALL

GROUP_SIZE = 64
Calibrator = Callable[[CalibrationJob, CalibratedWriter, Progress], dict[str, Any]]


@dataclass(frozen=True)
class OurRow:
    """A row of the table.

    line: the line of the summary table to which it belongs. columns: the schemes that can be run; those that are not in
    `main` are run with --extra only, as are all columns of the ablations. prefix: whether the model is calibrated and run
    behind the keys and values of the tokens that all its prompts begin with. strict: whether every linear keeps its scheme;
    else inputs that 8 bits cannot hold stay float.
    """

    name: str
    line: str
    calibrator: Calibrator
    columns: tuple[str, ...] = ALL
    main: tuple[str, ...] = ALL
    prefix: bool = True
    strict: bool = False


def _make_calibrator(config: SearchConfig) -> Calibrator:
    return functools.partial(calibrate_search, config=config)


def _make_qvlm(config: QvlmConfig) -> Calibrator:
    return functools.partial(calibrate_qvlm, config=config)


def _change_linear(config: SearchConfig, **settings: Any) -> SearchConfig:
    """The configuration with other settings of its linears."""
    return replace(config, linear=replace(config.linear, **settings))


SMALL = replace(FULL, large=None)  # `full` of small decoders, of which the ablations change one part
GPTQ = LinearConfig(activation_ranges="absmax", weight_ranges="absmax", ridge=None)
ROWS = (
    OurRow("rtn", "round-to-nearest, absmax", calibrate_rtn),
    OurRow("percentile", "layer-wise percentile", _make_qvlm(replace(QVLM, partition="layers", vision_epochs=0))),
    OurRow("smoothquant", "SmoothQuant", _make_calibrator(SearchConfig("smoothquant", RTN_LINEAR))),
    OurRow("awq", "AWQ-style", _make_calibrator(SearchConfig("awq", RTN_LINEAR))),
    OurRow("gptq", "GPTQ", _make_calibrator(SearchConfig("none", GPTQ))),
    OurRow(
        "equalize-mse-gptq",
        "equalization + output-MSE + GPTQ",
        _make_calibrator(SearchConfig("search", LinearConfig(ridge=None))),
    ),
    OurRow("qvlm", "Q-VLM as printed", _make_qvlm(QVLM)),
    OurRow("fast", "ours, fast", _make_calibrator(FAST)),
    OurRow("full", "ours, full", _make_calibrator(FULL)),
    OurRow(
        "qvlm: no visual-encoder optimization",
        "Q-VLM, no visual-encoder optimization",
        _make_qvlm(replace(QVLM, vision_epochs=0)),
        main=(),
    ),
    OurRow("qvlm: no entropy term", "Q-VLM, no entropy term", _make_qvlm(replace(QVLM, entropy_weight=0.0)), main=()),
    OurRow("fast: no prefix", "fast, no prefix", _make_calibrator(FAST), main=(), prefix=False),
    # Only inputs in 8 bits may fall back to float.
    OurRow("fast: strict", "fast, strict", _make_calibrator(FAST), columns=("W8A8", "W4A8"), main=(), strict=True),
    *(
        OurRow(f"fast: {name}", f"fast, {name}", _make_calibrator(config), main=())
        for name, config in {
            "no equalization": replace(FAST, equalization="none"),
            "equalization by one exponent": replace(FAST, equalization="search"),
            "tokens by logits": replace(FAST, token_weighting="logits"),
            "tokens by kind": replace(FAST, token_weighting="modality"),
            "no output matching": _change_linear(FAST, ridge=None),
            "residual stream not matched": _change_linear(FAST, match_residual=False),
            "round-to-nearest": _change_linear(FAST, rounding="nearest"),
            "absmax activation ranges": _change_linear(FAST, activation_ranges="absmax"),
            "activation ranges by output error": _change_linear(FAST, activation_ranges="output"),
            "weight ranges by output error": _change_linear(FAST, weight_ranges="output"),
            "covering weight ranges": _change_linear(FAST, weight_ranges="covering"),
            "no refitted scales": _change_linear(FAST, refit_scales=False),
            "two questions per image": replace(FAST, questions_per_image=2),
            "random words": replace(FAST, random_word_prompts=1),
        }.items()
    ),
    *(
        OurRow(f"full: {name}", f"full, {name}", _make_calibrator(config), main=())
        for name, config in {
            "rounded by GPTQ": _change_linear(SMALL, rounding="gptq"),
            "round-to-nearest": _change_linear(SMALL, rounding="nearest"),
            "own questions only": replace(SMALL, questions_per_image=1, random_word_prompts=0),
            "no random words": replace(SMALL, random_word_prompts=0),
            "no leverage": replace(SMALL, leverage=False),
            "no gradients": replace(_change_linear(SMALL, rounding="gptq"), token_weighting="plain"),
            "tokens by kind": replace(SMALL, token_weighting="modality"),
            "tokens by logits": replace(SMALL, token_weighting="logits"),
            "tokens by KL": replace(SMALL, token_weighting="kl"),
            "factors and ranges without output Hessians": _change_linear(SMALL, by_output=False),
            "tower for its own output": replace(SMALL, vision_target="own"),
            "tower round-to-nearest": replace(SMALL, vision_target="none"),
            "no equalization": replace(SMALL, equalization="none"),
            "equalization by one exponent": replace(SMALL, equalization="search"),
            "absmax activation ranges": _change_linear(SMALL, activation_ranges="absmax"),
            "weight ranges by output error": _change_linear(SMALL, weight_ranges="output"),
            "absmax weight ranges": _change_linear(SMALL, weight_ranges="absmax"),
            "weight ranges by residual error": _change_linear(SMALL, weight_ranges="residual"),
            "refitted scales": _change_linear(SMALL, refit_scales=True),
            "no output matching": _change_linear(SMALL, ridge=None),
        }.items()
    ),
    *(
        OurRow(f"full of trained decoders: {name}", f"full, {name}", _make_calibrator(config), main=())
        for name, config in {
            "covering weight ranges": _change_linear(FULL_LARGE, weight_ranges="covering"),
            "no refitted scales": _change_linear(FULL_LARGE, refit_scales=False),
            "residual stream not matched": _change_linear(FULL_LARGE, match_residual=False),
            "rounded by GPTQ": _change_linear(FULL_LARGE, rounding="gptq"),
            "gradients of answers": replace(FULL_LARGE, probed_tokens="answers"),
            "leverage": replace(FULL_LARGE, leverage=True),
            "gradients not tempered": replace(FULL_LARGE, temper_gradients=False),
            "tokens by KL": replace(FULL_LARGE, token_weighting="kl"),
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


@functools.lru_cache(maxsize=1)
def find_prefix(model_folder: Path) -> tuple[int, ...]:
    """The tokens that all prompts of the model's chat template begin with, which an export uses by default."""
    checkpoint, _ = load_model(model_folder)
    return find_common_prefix(load_processor(model_folder), checkpoint.config)


def run_cell(
    model_folder: Path, row: OurRow, column: str, calibration: Sequence[Sample], evaluation: Sequence[Sample], states: str
) -> tuple[np.ndarray, dict[str, Any]]:
    """Calibrates one cell; returns what `EVALUATIONS[states]` computes on `evaluation`, and the record of its cost.

    The cost leaves out opening the checkpoint. The calibrated checkpoint is written to a temporary folder and read back, so
    the results are those of what is stored.
    """
    checkpoint, blocks = load_model(model_folder)
    tokens = find_prefix(model_folder) if row.prefix else ()
    with measured() as prefix_cost:
        if tokens:
            blocks = replace(blocks, prefix=compute_prefix(blocks, checkpoint.source, tokens))
            calibration = cut_prefix(calibration, tokens)
    schemes = schemes_of(checkpoint, blocks, column)
    job = CalibrationJob(blocks, checkpoint.source, schemes, calibration, strict=row.strict)
    found, summary, cost = calibrate_and_run(job, checkpoint, row.calibrator, evaluation, EVALUATIONS[states])
    settings = {k: v for k, v in summary.items() if isinstance(v, str | int | float)}
    fallbacks = sum(len(block.get("fallbacks", ())) for block in summary.get("blocks", ()))
    record = {
        "seconds": prefix_cost.seconds + cost.seconds,
        "wall_seconds": prefix_cost.wall_seconds + cost.wall_seconds,
        "peak_bytes": max(prefix_cost.peak_bytes, cost.peak_bytes),
        "settings": {**settings, "prefix": len(tokens), "linears": len(schemes), "fallbacks": fallbacks},
        "versions": versions(),
        "threads": torch.get_num_threads(),
    }
    return found, record


def calibrate_and_run(
    job: CalibrationJob,
    checkpoint: Checkpoint,
    calibrator: Calibrator,
    samples: Sequence[Sample],
    evaluate: Evaluation = answer_logits,
) -> tuple[np.ndarray, dict[str, Any], Measured]:
    """Calibrates and runs the fake-quantized model on `samples`, behind the prefix of the job if it has one.

    Returns the result of `evaluate` (by default logits of the answer tokens), the summary of the calibrator, and its cost.
    """
    text = checkpoint.config.text
    with tempfile.TemporaryDirectory() as scratch:
        writer = CalibratedWriter(Path(scratch))
        with measured() as cost:
            summary = calibrator(job, writer, lambda *_: None)
            writer.finish(checkpoint.config_json, summary)
        calibrated = CalibratedCheckpoint(Path(scratch))
        # Equalization divides the prefix's values, too, so those that were stored are read.
        prefix = calibrated.read_prefix((text.num_layers, text.num_kv_heads, text.head_dim))
        source, blocks = DequantizedSource(calibrated), replace(job.blocks, prefix=prefix)
        step = fake_quantized_step(calibrated, source)
        return evaluate(checkpoint, blocks, source, step, samples), summary, cost


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
    parser.add_argument("--states", choices=EVALUATIONS, default=LOGITS, help="what is stored")
    for name in ("model", "data", "evaluation", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    args = parser.parse_args()
    evaluation, row = load_samples(args.evaluation), next(r for r in ROWS if r.name == args.row)
    load_model(args.model)
    for cell in args.cells:
        column, seed = cell.split("/")
        calibration = load_samples(calibration_file(args.data, int(seed), args.samples))
        torch.manual_seed(int(seed))
        found, record = run_cell(args.model, row, column, calibration, evaluation, args.states)
        out = args.out / f"{column}-{seed}.npy"
        np.save(out, found)
        out.with_suffix(".json").write_text(json.dumps(record) + "\n")
        print(f"{cell} {out}", flush=True)


if __name__ == "__main__":
    main()
