"""Validation of an export against its float checkpoint: `qvlm-validate` without its command line.

Opens the export, the checkpoint it was made from and the samples, compares all forms of the model (`compare.py`), checks
graph and engine with NVIDIA Polygraphy where both can run, and puts the results into one summary.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qvlm_export.calibrate.checkpoint.samples import Sample
from qvlm_export.calibrate.errors import UserError
from qvlm_export.checkpoints.checkpoint import Checkpoint, open_checkpoint
from qvlm_export.checkpoints.origin import open_exported
from qvlm_export.engines.check.metrics import Sums
from qvlm_export.engines.check.polygraphy import SavedComparison, compare_runs, engine_runners, save_case, session_runners
from qvlm_export.engines.check.thresholds import MAX_KL, MIN_AGREEMENT
from qvlm_export.engines.config import ModelConfig
from qvlm_export.engines.manifest import Manifest, read_manifest, verify_file
from qvlm_export.inference.forms import ENGINE, FLOAT, GRAPH
from qvlm_export.inputs.samples import default_calibration, encode_entries, load_processor, read_entries
from qvlm_export.pipeline.fetch import fetch_weights
from qvlm_export.pipeline.progress import Reporter
from qvlm_export.validation.accuracy import (
    Check,
    ComparisonChain,
    check_same_model,
    check_thresholds,
    find_accuracy_loss,
)
from qvlm_export.validation.compare import ComparisonJob, compare_forms, find_traced_sample, graph_obstacle
from qvlm_export.validation.reference import ReferenceInput, reference_inputs


@dataclass(frozen=True)
class ValidateOptions:
    """The options of the command line.

    plan: X.plan, or X.json beside it. reference: the float checkpoint; None for the one that was exported. revision: of a
    reference on the Hub. samples: a JSONL
    file; None for the built-in samples. limit: the number of samples at most. min_agreement (0 to 1) and max_kl (nats per
    token): thresholds on answer tokens; None for no threshold. per_layer: score every block of the graph, too.
    save_polygraphy: a folder for the files with which Polygraphy repeats the comparison; None to write none.
    """

    plan: Path
    reference: str | None = None
    revision: str | None = None
    samples: Path | None = None
    limit: int = 64
    min_agreement: float | None = MIN_AGREEMENT
    max_kl: float | None = MAX_KL
    per_layer: bool = False
    save_polygraphy: Path | None = None


@dataclass(frozen=True)
class Validation:
    """The result of a validation.

    reference: the name of the float checkpoint. samples: their number. polygraphy: None when Polygraphy had nothing to
    compare.
    """

    manifest: Manifest
    reference: str
    samples: int
    chain: ComparisonChain
    checks: Sequence[Check]
    polygraphy: SavedComparison | None

    @property
    def passed(self) -> bool:
        """Whether the graph holds the calibrated weights, every threshold is met, and Polygraphy passed every output."""
        verdicts = () if self.polygraphy is None else self.polygraphy.verdicts
        return not self.chain.wrong_weights and all(c.passed for c in self.checks) and all(v.passed for v in verdicts)

    def summary(self) -> dict[str, Any]:
        """Returns the result as JSON values: None stands for a mean over no token, and for an SQNR without any noise."""
        chain, loss = self.chain, find_accuracy_loss(self.chain)
        return {
            "plan": self.manifest.path.with_suffix(".plan").name,
            "scheme": self.manifest.scheme,
            "reference": self.reference,
            "samples": self.samples,
            "forms": [_summarize_form(chain, run.name, run.logits is not None, run.reason) for run in chain.runs],
            "loss": None if loss is None else {"form": loss.form, "kl": _finite(loss.kl), "layers": list(loss.layers)},
            "weights": {"checked": chain.checked_linears, "wrong": [dataclasses.asdict(w) for w in chain.wrong_weights]},
            "layers": [
                {
                    "block": layer.block,
                    "sqnr_db": _finite(layer.sqnr_db),
                    "graph_compared": layer.graph_sqnr_db is not None,
                    "graph_sqnr_db": _finite(layer.graph_sqnr_db),
                }
                for layer in chain.layers
            ],
            "thresholds": [{**dataclasses.asdict(c), "got": _finite(c.got)} for c in self.checks],
            "largest_activation": chain.largest_activation,
            "polygraphy": None if self.polygraphy is None else _summarize_polygraphy(self.polygraphy),
            "passed": self.passed,
        }


def _summarize_form(chain: ComparisonChain, name: str, ran: bool, reason: str) -> dict[str, Any]:
    status = "reference" if name == FLOAT else "run" if ran else "not run"
    comparisons = [
        {"against": c.against, "tokens": {k: _summarize_sums(s) for k, s in {"all": c.total, **c.by_kind}.items()}}
        for c in chain.comparisons
        if c.form == name
    ]
    return {"name": name, "status": status, "reason": reason, "comparisons": comparisons}


def _summarize_sums(sums: Sums) -> dict[str, Any]:
    return {
        "count": sums.tokens + sums.not_finite,
        "not_finite": sums.not_finite,
        "kl": _finite(sums.mean_kl),
        "agreement": _finite(sums.agreement),
        "sqnr_db": _finite(sums.sqnr_db),
        "cosine": _finite(sums.mean_cosine),
    }


def _summarize_polygraphy(saved: SavedComparison) -> dict[str, Any]:
    verdicts = [{**dataclasses.asdict(v), "snr_db": _finite(v.snr_db)} for v in saved.verdicts]
    folder = None if saved.folder is None else str(saved.folder)
    return {"folder": folder, "commands": list(saved.commands), "verdicts": verdicts}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def validate(options: ValidateOptions, reporter: Reporter) -> Validation:
    """Validates an export as the options say. Raises UserError for bad input, before any model runs."""
    if options.plan.suffix not in (".plan", ".json"):
        raise UserError(f"{options.plan}: give the .plan that qvlm-export wrote, or the .json beside it")
    manifest = read_manifest(options.plan.with_suffix(".json"))
    checkpoint = open_reference(manifest, options.reference, options.revision)
    inputs = read_inputs(manifest, options.samples, options.limit)
    if options.save_polygraphy is not None:
        _prepare_folder(options.save_polygraphy, manifest)
    if options.per_layer and not os.access(manifest.path.parent, os.W_OK):
        raise UserError(f"--per-layer: writes a small graph beside the export, but {manifest.path.parent} is read-only")
    checkpoint = fetch_weights(checkpoint, reporter)
    job = ComparisonJob(manifest, checkpoint, inputs, options.per_layer)
    chain = compare_forms(job, reporter)
    saved = _run_polygraphy(manifest, job.samples[find_traced_sample(job.samples)], chain, options.save_polygraphy, reporter)
    checks = [*check_same_model(chain), *check_thresholds(chain, options.min_agreement, options.max_kl)]
    return Validation(manifest, checkpoint.name, len(inputs), chain, checks, saved)


def open_reference(manifest: Manifest, reference: str | None, revision: str | None = None) -> Checkpoint:
    """Opens the float checkpoint `reference`, or the one that was exported when it is None.

    revision: of a reference on the Hub, whose weights may have to be downloaded. Raises UserError when the checkpoint cannot
    be opened, or has another configuration than the export.
    """
    if reference is None and revision is not None:
        raise UserError(f"--revision {revision}: is of --reference; without it, the exported commit is compared with")
    name = str(manifest.model["name"]) if reference is None else reference
    try:
        if reference is None:
            checkpoint = open_exported(manifest.model, manifest.path.parent)
        else:
            checkpoint = open_checkpoint(reference, revision)
    except UserError as error:
        message = str(error).replace("--model", "--reference")  # the name of the option in this command
        remedy = "" if reference else f" ({manifest.path.name} was exported from it; --reference says where it is now)"
        raise UserError(message + remedy) from error
    if difference := _describe_difference(checkpoint.config, manifest.config):
        raise UserError(f"--reference {name}: {difference}; give the checkpoint that was exported")
    return checkpoint


def _describe_difference(config: ModelConfig, exported: ModelConfig) -> str | None:
    """Describes the first value in which a model's configuration differs from the exported one; None when none does."""
    actual, expected = dataclasses.asdict(config), dataclasses.asdict(exported)
    for part, value in expected.items():
        for key, expected_value in (value if isinstance(value, dict) else {"": value}).items():
            actual_value = actual[part][key] if key else actual[part]
            is_known = key not in ("rope_frequencies", "rope_scale") or bool(exported.text.rope_frequencies)
            if is_known and actual_value != expected_value:  # exports before 0.10 do not hold the rotary frequencies
                return f"{part}{'.' + key if key else ''} is {actual_value}, the export has {expected_value}"
    return None


def read_inputs(manifest: Manifest, path: Path | None, limit: int) -> list[ReferenceInput]:
    """Reads the first `limit` samples of a JSONL file (None: the built-in samples) through the export's processor.

    Raises UserError for a file that cannot be read, and for samples that the export does not take.
    """
    processor = load_processor(verify_file(manifest, "processor"))
    try:
        entries = read_entries(path or default_calibration(), None, limit)
        samples = encode_entries(entries, processor, manifest.config, manifest.limits.max_length)
        return reference_inputs(processor, entries, samples)
    except UserError as error:
        raise UserError(str(error).replace("--calib-data", "--samples")) from error  # the name of the option here


def _prepare_folder(folder: Path, manifest: Manifest) -> None:
    """Makes the folder of --save-polygraphy. Raises UserError when it is a file, or when the graphs cannot run here."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--save-polygraphy {folder}: is a file; give a folder")
    if reason := graph_obstacle(manifest):
        raise UserError(f"--save-polygraphy: needs the graphs on ONNX Runtime: {reason}")
    folder.mkdir(parents=True, exist_ok=True)


def _run_polygraphy(
    manifest: Manifest, sample: Sample, chain: ComparisonChain, folder: Path | None, reporter: Reporter
) -> SavedComparison | None:
    """Compares the session's graphs and, where they run, the engines in Polygraphy, and writes its files to `folder`.

    None when there is nothing to compare: no folder is given, and graph and engine did not both run.
    """
    ran = {run.name for run in chain.runs if run.logits is not None}
    if folder is None and not {GRAPH, ENGINE} <= ran:
        return None
    with reporter.stage("polygraphy"):
        engines = [engine_runners(manifest)] if ENGINE in ran else []
        if folder is not None:
            with_engine = {"vision_plan", "language_plan"} <= set(manifest.files)
            return save_case(manifest, sample, folder, [session_runners(manifest), *engines], with_engine)
        _, verdicts = compare_runs(manifest, sample, session_runners(manifest), engines)
    return SavedComparison(None, (), tuple(verdicts))
