"""The export, stage by stage: checkpoint -> calibrated checkpoint -> ONNX graphs -> engines -> published files.

Every stage reads and writes files in a work folder beside the output; the results are moved into place at the end, the
manifest last, so that an interrupted export leaves nothing that looks finished. What is finished when it is interrupted is
noted there, and not made again.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from qvlm_export.calibrate.checkpoint.calibrated import CalibratedCheckpoint
from qvlm_export.engines.builder.build import BuildReport
from qvlm_export.engines.check.engine_precision import LinearCheck
from qvlm_export.engines.manifest import Manifest, describe, describe_file, describe_in_background, write_manifest
from qvlm_export.pipeline.fingerprint import work_fingerprint
from qvlm_export.pipeline.planning.estimate import total_sizes
from qvlm_export.pipeline.planning.export_plan import PARTS, ExportOptions, ExportPlan, estimate_export, plan_export
from qvlm_export.pipeline.progress import Reporter
from qvlm_export.pipeline.publish import FOLDER_ROLES, file_names, manifest_path, publish
from qvlm_export.pipeline.stages import FLOAT_TYPE, build, calibrate, stage_key, write_graphs
from qvlm_export.pipeline.work_folder import FINISHED, WorkFolder, explain_failure, read_finished_export, work_folder
from qvlm_export.report.report import write_report

ESTIMATED_ABOVE_BYTES = 2**30  # of weights: smaller models are done before an estimate is read


@dataclass(frozen=True)
class ExportResult:
    """manifest: as written. reports: of the engine builds. seconds, processor_seconds: by stage.

    peak_bytes: resident memory of the export and of its builds.
    """

    manifest: Manifest
    checks: list[LinearCheck]
    reports: list[BuildReport]
    seconds: dict[str, float] = field(default_factory=dict)
    processor_seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: int = 0


def export(options: ExportOptions, reporter: Reporter) -> ExportResult:
    """The whole command. Raises UserError with nothing left at the output path.

    What is unfinished for no fault of the input leaves its work folder, and a line that says how to go on with it.
    """
    plan = plan_export(options)
    if total_sizes(plan.sizes).float16_bytes > ESTIMATED_ABOVE_BYTES:
        reporter.note(estimate_export(plan).in_words())
    with work_folder(options.out, options.work_dir) as work:
        fingerprint = work_fingerprint(plan.checkpoint, plan.linears, plan.samples, options.effort, plan.device)
        if options.resume and (finished := read_finished_export(work, stage_key(plan, fingerprint, PARTS[-1], "build"))):
            return _published(plan, work, finished, reporter)
        work.begin(fingerprint, options.resume)
        try:
            return _run(plan, work, fingerprint, reporter)
        except (Exception, KeyboardInterrupt) as error:
            raise explain_failure(error, plan.disk_bytes, work) from error


def _run(plan: ExportPlan, work: WorkFolder, fingerprint: Mapping[str, str], reporter: Reporter) -> ExportResult:
    calibrated = calibrate(plan, work, reporter)
    interfaces = write_graphs(plan, calibrated, work, fingerprint, reporter)
    with describe_in_background(_finished(plan, work, calibrated)) as described:
        reports, checks = build(plan, work, fingerprint, reporter)
        known = described()
    if calibrated is not None and plan.options.work_dir is None:
        calibrated.folder.rename(work.stage / f"{plan.options.out.stem}.calibrated")
    plan.processor.save_pretrained(work.stage / f"{plan.options.out.stem}.processor")
    with reporter.stage("check"):
        manifest = _manifest(plan, work.stage, calibrated, interfaces, checks)
        manifest = _with_report(plan, work.stage, replace(manifest, files=_described(plan.options.out, work.stage, known)))
        write_manifest(manifest)
    key = stage_key(plan, fingerprint, PARTS[-1], "build")
    work.note_stage(FINISHED, key, [manifest.path], reports=[asdict(r) for r in reports], checks=[asdict(c) for c in checks])
    return _published(plan, work, manifest, reporter)


def _published(plan: ExportPlan, work: WorkFolder, manifest: Manifest, reporter: Reporter) -> ExportResult:
    """Moves a finished export into place."""
    said = work.stages()[FINISHED]
    reports, checks = [BuildReport(**r) for r in said["reports"]], [LinearCheck(**c) for c in said["checks"]]
    work.close()
    publish(work.stage, plan.options.out, {entry["name"] for entry in manifest.files.values()})
    work.remove()
    peak = max([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, *(r.peak_bytes for r in reports)])
    manifest = replace(manifest, path=manifest_path(plan.options.out))
    return ExportResult(manifest, checks, reports, dict(reporter.seconds), dict(reporter.processor_seconds), peak)


def _manifest(
    plan: ExportPlan,
    folder: Path,
    calibrated: CalibratedCheckpoint | None,
    interfaces: dict[str, Any],
    checks: list[LinearCheck],
) -> Manifest:
    return Manifest(
        path=folder / manifest_path(plan.options.out).name,
        model={"name": plan.checkpoint.name, "model_type": plan.checkpoint.hf_config.model_type},
        config=plan.checkpoint.config,
        limits=plan.limits,
        float_type=FLOAT_TYPE,
        scheme=plan.options.scheme if plan.options.recipe is None else plan.options.recipe.name,
        linears={n: s.name + (f" g{s.group_size}" if s.group_size else "") for n, s in plan.linears.items()},
        calibration={} if calibrated is None else calibrated.summary,
        backend={"name": plan.backend.name, "version": plan.backend.version, "targets": list(plan.backend.targets)},
        plan_check=tuple(asdict(check) for check in checks),
        interface=interfaces,
        versions=_versions(),
        files={},
    )


def _finished(plan: ExportPlan, work: WorkFolder, calibrated: CalibratedCheckpoint | None) -> dict[str, Path]:
    """What is written before engines are built, by role."""
    if plan.backend.module is None:  # nothing is built
        return {}
    names = file_names(plan.options.out)
    paths = {f"{part}_{kind}": work.stage / names[f"{part}_{kind}"] for part in PARTS for kind in ("onnx", "data")}
    return paths if calibrated is None or plan.options.work_dir is not None else {**paths, "calibrated": calibrated.folder}


def _described(out: Path, folder: Path, known: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The files of the manifest with their hashes, several at a time. known: of some of them, wherever they were then."""
    # A killed run may have left its report; this one's is described when it is written.
    paths = {role: folder / name for role, name in file_names(out).items() if role != "report"}
    paths |= {role: folder / f"{out.stem}.{role}" for role in FOLDER_ROLES}
    there = {role: path for role, path in paths.items() if path.exists()}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        described = {role: pool.submit(describe, path) for role, path in there.items() if role not in known}
        found = known | {role: task.result() for role, task in described.items()}
    return {role: {**found[role], "name": path.name} for role, path in there.items()}


def _with_report(plan: ExportPlan, folder: Path, manifest: Manifest) -> Manifest:
    """Writes the report of a manifest; returns the manifest with the report among its files."""
    path = folder / file_names(plan.options.out)["report"]
    write_report(manifest, path)
    return replace(manifest, files={**manifest.files, "report": describe_file(path)})


def _versions() -> dict[str, str]:
    packages = ("qvlm-export", "torch", "transformers", "onnx", "onnxscript", "onnx-ir", "numpy")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}
