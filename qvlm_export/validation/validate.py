"""`qvlm-validate` without its command line: opens an export and its checkpoint, climbs the ladder, asks Polygraphy."""

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
from qvlm_export.engines.check.metrics import Sums
from qvlm_export.engines.check.polygraphy import Saved, compare_runs, engine_runners, save_case, session_runners
from qvlm_export.engines.config import ModelConfig
from qvlm_export.engines.manifest import Manifest, read_manifest, verify_file
from qvlm_export.inputs.samples import default_calibration, encode_entries, load_processor, read_entries
from qvlm_export.pipeline.progress import Reporter
from qvlm_export.validation.accuracy import ENGINE, FLOAT, GRAPH, Check, ComparisonChain, check_thresholds, find_loss
from qvlm_export.validation.compare import ComparisonJob, compare_forms, graph_obstacle, record_traces


@dataclass(frozen=True)
class ValidateOptions:
    """What the command line says. reference: None for the checkpoint that was exported. samples: None for the built-in."""

    plan: Path
    reference: str | None = None
    samples: Path | None = None
    limit: int = 64
    min_agreement: float | None = None
    max_kl: float | None = None
    per_layer: bool = False
    save_polygraphy: Path | None = None


@dataclass(frozen=True)
class Validation:
    """All that was found. polygraphy: None when Polygraphy had nothing to compare."""

    manifest: Manifest
    reference: str
    samples: int
    ladder: ComparisonChain
    checks: Sequence[Check]
    polygraphy: Saved | None

    @property
    def passed(self) -> bool:
        verdicts = () if self.polygraphy is None else self.polygraphy.verdicts
        return not self.ladder.wrong and all(c.passed for c in self.checks) and all(v.passed for v in verdicts)

    def summary(self) -> dict[str, Any]:
        """The result as JSON holds it: None for a mean over no token, and for an SQNR without noise."""
        ladder, loss = self.ladder, find_loss(self.ladder)
        return {
            "plan": self.manifest.path.with_suffix(".plan").name,
            "scheme": self.manifest.scheme,
            "reference": self.reference,
            "samples": self.samples,
            "rungs": [_rung(ladder, rung.name, rung.logits is not None, rung.reason) for rung in ladder.rungs],
            "loss": None if loss is None else {"rung": loss.rung, "kl": _finite(loss.kl), "layers": list(loss.layers)},
            "weights": {"checked": ladder.linears, "wrong": [dataclasses.asdict(w) for w in ladder.wrong]},
            "layers": [
                {
                    "block": layer.block,
                    "sqnr_db": _finite(layer.sqnr_db),
                    "graph_compared": layer.graph_sqnr_db is not None,
                    "graph_sqnr_db": _finite(layer.graph_sqnr_db),
                }
                for layer in ladder.layers
            ],
            "thresholds": [{**dataclasses.asdict(c), "got": _finite(c.got)} for c in self.checks],
            "polygraphy": None if self.polygraphy is None else _polygraphy(self.polygraphy),
            "passed": self.passed,
        }


def _rung(ladder: ComparisonChain, name: str, ran: bool, reason: str) -> dict[str, Any]:
    status = "reference" if name == FLOAT else "run" if ran else "not run"
    found = [c for c in ladder.comparisons if c.rung == name]
    comparisons = [
        {"against": c.against, "tokens": {g: _scores(s) for g, s in {"all": c.total, **c.groups}.items()}} for c in found
    ]
    return {"name": name, "status": status, "reason": reason, "comparisons": comparisons}


def _scores(sums: Sums) -> dict[str, Any]:
    return {
        "count": sums.tokens + sums.not_finite,
        "not_finite": sums.not_finite,
        "kl": _finite(sums.mean_kl),
        "agreement": _finite(sums.agreement),
        "sqnr_db": _finite(sums.sqnr_db),
        "cosine": _finite(sums.mean_cosine),
    }


def _polygraphy(saved: Saved) -> dict[str, Any]:
    verdicts = [{**dataclasses.asdict(v), "snr_db": _finite(v.snr_db)} for v in saved.verdicts]
    folder = None if saved.folder is None else str(saved.folder)
    return {"folder": folder, "commands": list(saved.commands), "verdicts": verdicts}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def validate(options: ValidateOptions, reporter: Reporter) -> Validation:
    """The whole command. Raises UserError for bad input, before anything runs."""
    if options.plan.suffix not in (".plan", ".json"):
        raise UserError(f"{options.plan}: give the .plan that qvlm-export wrote, or the .json beside it")
    manifest = read_manifest(options.plan.with_suffix(".json"))
    checkpoint = open_reference(manifest, options.reference)
    samples = read_samples(manifest, options.samples, options.limit)
    if options.save_polygraphy is not None:
        _check_folder(options.save_polygraphy, manifest)
    if options.per_layer and not os.access(manifest.path.parent, os.W_OK):
        raise UserError(f"--per-layer: writes a small graph beside the export, but {manifest.path.parent} is read-only")
    ladder = compare_forms(ComparisonJob(manifest, checkpoint, samples, options.per_layer), reporter)
    saved = _ask_polygraphy(manifest, samples[record_traces(samples)], ladder, options.save_polygraphy, reporter)
    checks = check_thresholds(ladder, options.min_agreement, options.max_kl)
    return Validation(manifest, checkpoint.name, len(samples), ladder, checks, saved)


def open_reference(manifest: Manifest, reference: str | None) -> Checkpoint:
    """The float checkpoint to compare with. Raises UserError when it is not here or is another model."""
    name = str(manifest.model["name"]) if reference is None else reference
    try:
        checkpoint = open_checkpoint(name)
    except UserError as error:
        message = str(error).replace("--model", "--reference")  # what it is called here
        cure = "" if reference else f" ({manifest.path.name} was exported from it; --reference says where it is now)"
        raise UserError(message + cure) from error
    if differing := _differing(checkpoint.config, manifest.config):
        raise UserError(f"--reference {name}: {differing}; give the checkpoint that was exported")
    return checkpoint


def _differing(found: ModelConfig, wanted: ModelConfig) -> str | None:
    """The first value in which two models differ, in words."""
    ours, theirs = dataclasses.asdict(found), dataclasses.asdict(wanted)
    for part, value in theirs.items():
        for key, was in (value if isinstance(value, dict) else {"": value}).items():
            now = ours[part][key] if key else ours[part]
            if now != was:
                return f"{part}{'.' + key if key else ''} is {now}, the export has {was}"
    return None


def read_samples(manifest: Manifest, path: Path | None, limit: int) -> list[Sample]:
    """The first `limit` samples, through the processor of the export."""
    processor = load_processor(verify_file(manifest, "processor"))
    try:
        entries = read_entries(path or default_calibration(), None, limit)
        return encode_entries(entries, processor, manifest.config, manifest.limits.max_length)
    except UserError as error:
        raise UserError(str(error).replace("--calib-data", "--samples")) from error  # what it is called here


def _check_folder(folder: Path, manifest: Manifest) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--save-polygraphy {folder}: is a file; give a folder")
    if reason := graph_obstacle(manifest):
        raise UserError(f"--save-polygraphy: needs the graphs on ONNX Runtime: {reason}")
    folder.mkdir(parents=True, exist_ok=True)


def _ask_polygraphy(
    manifest: Manifest, sample: Sample, ladder: ComparisonChain, folder: Path | None, reporter: Reporter
) -> Saved | None:
    """Polygraphy's word on the session's graphs and, where it runs, on the engine; and its files when asked for."""
    ran = {rung.name for rung in ladder.rungs if rung.logits is not None}
    if folder is None and not {GRAPH, ENGINE} <= ran:
        return None
    with reporter.stage("polygraphy"):
        engines = [engine_runners(manifest)] if ENGINE in ran else []
        if folder is not None:
            with_engine = {"vision_plan", "language_plan"} <= set(manifest.files)
            return save_case(manifest, sample, folder, [session_runners(manifest), *engines], with_engine)
        _, verdicts = compare_runs(manifest, sample, session_runners(manifest), engines)
    return Saved(None, (), tuple(verdicts))
