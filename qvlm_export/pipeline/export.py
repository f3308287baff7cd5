"""The export pipeline: checkpoint -> calibrated checkpoint -> ONNX graphs -> TensorRT engines -> published files.

Every stage reads and writes files in a work folder beside the output. The results are moved into place at the end, the
manifest last, so that an interrupted export leaves nothing that looks finished. The work folder records which stages are
complete; a resumed export does not repeat them.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import resource
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from qvlm_export.calibrate.checkpoint.calibrated import CalibratedCheckpoint, record_files
from qvlm_export.calibrate.errors import UnfinishedError, UserError
from qvlm_export.checkpoints.origin import describe_origin
from qvlm_export.engines.builder.build import BuildReport
from qvlm_export.engines.check.engine_precision import LinearCheck
from qvlm_export.engines.manifest import (
    Manifest,
    describe,
    describe_file,
    describe_in_background,
    read_manifest,
    write_manifest,
)
from qvlm_export.pipeline.fetch import fetch_weights
from qvlm_export.pipeline.fingerprint import digest, work_fingerprint
from qvlm_export.pipeline.preparation.estimate import total_sizes
from qvlm_export.pipeline.preparation.outputs import (
    ASIDE,
    CALIBRATED,
    FOLDER_ROLES,
    check_outputs,
    check_work_dir_contents,
    file_names,
    find_obsolete,
    manifest_path,
)
from qvlm_export.pipeline.preparation.prepare import PARTS, ExportOptions, PreparedExport, estimate_export, prepare_export
from qvlm_export.pipeline.progress import Reporter
from qvlm_export.pipeline.publish import Move, publish
from qvlm_export.pipeline.stages import (
    ACCURACY,
    build,
    calibrate,
    copy_calibration_set,
    copy_prefix,
    measure_held_out,
    put_prefix,
    stage_key,
    warn_of,
    write_calibration_set,
    write_graphs,
)
from qvlm_export.pipeline.work_folder import FINISHED, WorkFolder, explain_failure, read_finished_export, work_folder
from qvlm_export.report.report import write_report

ESTIMATED_ABOVE_BYTES = 2**30  # of float16 weights; a smaller model is exported before anyone has read an estimate


@dataclass(frozen=True)
class ExportResult:
    """What one export wrote and what it took.

    manifest: the manifest as written. checks: the precision check of every quantized linear in the engines. reports: one
    for each engine build. seconds, processor_seconds: wall time and CPU time by stage. peak_bytes: the largest resident
    memory of the export process and of the engine builds.
    """

    manifest: Manifest
    checks: list[LinearCheck]
    reports: list[BuildReport]
    removed: list[str]
    seconds: dict[str, float] = field(default_factory=dict)
    processor_seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: int = 0


def export(options: ExportOptions, reporter: Reporter) -> ExportResult:
    """Runs the whole export and returns what it wrote and took.

    Raises UserError, with nothing new at the output path, when the input is bad. When the export fails for another reason,
    such as a full disk, it keeps the work folder, and the message says how to resume.
    """
    prepared = prepare_export(options)
    with work_folder(options.out, options.work_dir) as work:
        fingerprint = work_fingerprint(
            prepared.checkpoint,
            prepared.linears,
            [*prepared.samples, *prepared.checked_samples],
            options.effort,
            prepared.device,
            prefix=prepared.prefix,
            strict=prepared.strict,
            written=bool(prepared.calibration_set.drafts),
        )
        key = stage_key(prepared, fingerprint, PARTS[-1], "build")
        finished = read_finished_export(work, key) if options.resume else None
        if finished is None:
            work.begin(fingerprint, options.resume)
        try:
            if finished is not None:
                return _warn(_publish(prepared, work, *finished, reporter), reporter)
            prepared = replace(prepared, checkpoint=fetch_weights(prepared.checkpoint, reporter))
            if total_sizes(prepared.sizes).float16_bytes > ESTIMATED_ABOVE_BYTES:
                reporter.note(estimate_export(prepared).in_words())
            prepared = write_calibration_set(prepared, work, reporter)
            return _warn(_run_stages(prepared, work, fingerprint, reporter), reporter)
        except (Exception, KeyboardInterrupt) as error:
            raise explain_failure(error, prepared.disk_bytes, work) from error


def _warn(result: ExportResult, reporter: Reporter) -> ExportResult:
    """Says of a finished export when its answers differ too much from the float model's; returns the result."""
    if warning := warn_of(result.manifest.calibration):
        reporter.note(warning)
    return result


def _run_stages(
    prepared: PreparedExport, work: WorkFolder, fingerprint: Mapping[str, str], reporter: Reporter
) -> ExportResult:
    get_blocks = functools.cache(functools.partial(put_prefix, prepared))  # one pass serves both
    calibrated, accuracy = calibrate(prepared, work, reporter, get_blocks), dict[str, Any]()
    if calibrated is not None:  # so that transformers loads the folder as it loads any checkpoint
        prepared.processor.save_pretrained(calibrated.folder)
        key = digest([dict(fingerprint), prepared.options.dtype])
        accuracy = measure_held_out(prepared, calibrated, work, key, reporter=reporter, get_blocks=get_blocks)
        copy_prefix(prepared, calibrated, work)
        copy_calibration_set(prepared, calibrated, work)
        prepared = replace(prepared, linears={**prepared.linears, **calibrated.schemes})  # some may have fallen back
    interfaces = write_graphs(prepared, calibrated, work, fingerprint, reporter)
    with describe_in_background(_list_files_before_build(prepared, work, calibrated)) as get_descriptions:
        reports, checks = build(prepared, work, fingerprint, reporter)
        known = get_descriptions()
    if calibrated is not None:
        if prepared.options.work_dir is None:
            calibrated.folder.rename(work.staging / f"{prepared.options.out.stem}.calibrated")
        else:
            record_files(calibrated.folder)
    prepared.processor.save_pretrained(work.staging / f"{prepared.options.out.stem}.processor")
    with reporter.stage("check"):
        manifest = _make_manifest(prepared, work.staging, calibrated, interfaces, checks)
        manifest = replace(manifest, calibration={**manifest.calibration, **({ACCURACY: accuracy} if accuracy else {})})
        manifest = _add_report(
            prepared, work.staging, replace(manifest, files=_describe_files(prepared.options.out, work.staging, known))
        )
        write_manifest(manifest)
        read_manifest(manifest.path)  # what a session would refuse must not be published
    key = stage_key(prepared, fingerprint, PARTS[-1], "build")
    details = {"reports": [asdict(report) for report in reports], "checks": [asdict(check) for check in checks]}
    work.record_stage(FINISHED, key, [manifest.path], **details)
    return _publish(prepared, work, manifest, details, reporter)


def _publish(
    prepared: PreparedExport, work: WorkFolder, manifest: Manifest, record: Mapping[str, Any], reporter: Reporter
) -> ExportResult:
    """Moves the finished files into place and removes the work folder. record: of the stage FINISHED.

    Raises UnfinishedError when something stands there by now that is not ours, or cannot be replaced.
    """
    options = prepared.options
    try:  # once more, as hours may have passed
        check_outputs(options.out, options.overwrite)
        if options.work_dir is not None:
            check_work_dir_contents(options.work_dir, options.out, options.overwrite)
    except UserError as error:
        raise UnfinishedError(str(error)) from error
    reports, checks = [BuildReport(**r) for r in record["reports"]], [LinearCheck(**c) for c in record["checks"]]
    work.close()
    names = {entry["name"] for entry in manifest.files.values()}
    removed = find_obsolete(options.out, names)
    publish(_list_moves(prepared, work, names, removed))
    work.remove()
    peak = max([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, *(r.peak_bytes for r in reports)])
    manifest = replace(manifest, path=manifest_path(options.out))
    return ExportResult(manifest, checks, reports, removed, dict(reporter.seconds), dict(reporter.processor_seconds), peak)


def _list_moves(prepared: PreparedExport, work: WorkFolder, names: Collection[str], removed: Collection[str]) -> list[Move]:
    """Returns the moves that publish an export, the manifest last. names: of its files; removed: of what has to go."""
    out, moves = prepared.options.out, []
    if prepared.options.work_dir is not None and prepared.linears:
        place = prepared.options.work_dir / CALIBRATED
        moves.append(Move(work.calibrated, place, work.own / ASIDE / CALIBRATED))
    for name in (*removed, *sorted(names), manifest_path(out).name):
        source = None if name in removed else work.staging / name
        moves.append(Move(source, out.parent / name, work.scratch / ASIDE / name))
    return moves


def _make_manifest(
    prepared: PreparedExport,
    folder: Path,
    calibrated: CalibratedCheckpoint | None,
    interfaces: dict[str, Any],
    checks: list[LinearCheck],
) -> Manifest:
    return Manifest(
        path=folder / manifest_path(prepared.options.out).name,
        model=describe_origin(prepared.checkpoint),
        config=prepared.checkpoint.config,
        limits=prepared.limits,
        float_type=prepared.options.dtype,
        scheme=prepared.options.scheme if prepared.options.recipe is None else prepared.options.recipe.name,
        linears={n: s.name + (f" g{s.group_size}" if s.group_size else "") for n, s in prepared.linears.items()},
        calibration={} if calibrated is None else calibrated.summary,
        backend={
            "name": prepared.backend.name,
            "version": prepared.backend.version,
            "targets": list(prepared.backend.targets),
        },
        plan_check=tuple(asdict(check) for check in checks),
        interface=interfaces,
        versions=_get_versions(),
        files={},
        generation={"eos_token_ids": list(prepared.checkpoint.end_tokens)},
    )


def _list_files_before_build(
    prepared: PreparedExport, work: WorkFolder, calibrated: CalibratedCheckpoint | None
) -> dict[str, Path]:
    """Returns by role the files that are complete before engines are built, so that they can be hashed meanwhile."""
    if prepared.backend.module is None:  # nothing is built
        return {}
    names = file_names(prepared.options.out)
    paths = {f"{part}_{kind}": work.staging / names[f"{part}_{kind}"] for part in PARTS for kind in ("onnx", "data")}
    return (
        paths if calibrated is None or prepared.options.work_dir is not None else {**paths, "calibrated": calibrated.folder}
    )


def _describe_files(out: Path, folder: Path, known: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Returns the manifest's entries of all files in `folder`, by role; several files are hashed at a time.

    known: entries that were computed before, by role. Their paths may have changed since.
    """
    # A killed run may have left its report there. The report of this run is described once it is written.
    paths = {role: folder / name for role, name in file_names(out).items() if role != "report"}
    paths |= {role: folder / f"{out.stem}.{role}" for role in FOLDER_ROLES}
    existing = {role: path for role, path in paths.items() if path.exists()}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        tasks = {role: pool.submit(describe, path) for role, path in existing.items() if role not in known}
        entries = known | {role: task.result() for role, task in tasks.items()}
    return {role: {**entries[role], "name": path.name} for role, path in existing.items()}


def _add_report(prepared: PreparedExport, folder: Path, manifest: Manifest) -> Manifest:
    """Writes the HTML report of the manifest and returns the manifest with the report among its files."""
    path = folder / file_names(prepared.options.out)["report"]
    write_report(manifest, path)
    return replace(manifest, files={**manifest.files, "report": describe_file(path)})


def _get_versions() -> dict[str, str]:
    packages = ("qvlm-export", "torch", "transformers", "onnx", "onnxscript", "onnx-ir", "numpy")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}
