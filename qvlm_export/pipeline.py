"""The export, stage by stage: checkpoint -> calibrated checkpoint -> ONNX graphs -> engines -> published files.

Every stage reads and writes files in a work folder beside the output; the results are moved into place at the end, the
manifest last, so that an interrupted export leaves nothing that looks finished.
"""

from __future__ import annotations

import importlib.metadata
import platform
import resource
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
from safetensors import SafetensorError

from calibrate.absmax import calibrate_absmax
from calibrate.blocks import ModelBlocks, make_blocks
from calibrate.calibrated import CalibratedCheckpoint, CalibratedWriter
from calibrate.errors import UserError
from calibrate.job import Calibration
from calibrate.samples import Sample
from calibrate.scheme import LinearScheme
from calibrate.searched import calibrate_full, calibrate_searched
from engines.backend import Backend, choose_backend
from engines.build import BuildJob, BuildReport, build_engines, language_profile, vision_profile
from engines.config import Limits, ModelConfig
from engines.graph import FLOAT_TYPES, expected_shapes, fill_weights, language_graph, vision_graph
from engines.insert_qdq import insert_qdq, transpose_float_weights
from engines.manifest import Manifest, describe_file, describe_folder, write_manifest
from engines.plan_check import LinearCheck, check_plan, require_integer
from engines.write_graph import interface, write_graph
from qvlm_export.checkpoint import Checkpoint, open_checkpoint
from qvlm_export.plan import Recipe, check_engine, choose_recipe, plan_linears
from qvlm_export.preflight import (
    Sizes,
    calibrated_folder,
    check_disk,
    check_out,
    check_work_dir,
    disk_needed,
    estimate_sizes,
)
from qvlm_export.progress import Reporter
from qvlm_export.publish import FOLDER_ROLES, file_names, is_disk_full, manifest_path, publish, scratch_folder
from qvlm_export.report import write_report
from qvlm_export.samples import check_processor, default_calibration, encode_entries, load_processor, read_entries

FLOAT_TYPE = "float16"
PARTS = ("vision", "language")
DEFAULT_MAX_LENGTH = 2048
TEXT_LENGTH = 1024  # beside the largest picture, where pictures are cut into tiles
MAX_SAMPLES = 128  # used when --samples does not say
# What calibration does with the samples: rtn takes absolute maxima and rounds to nearest; fast folds and rounds towards the
# float model's output; full tries several ways on every block and then learns the rounding.
EFFORTS = {"rtn": calibrate_absmax, "fast": calibrate_searched, "full": calibrate_full}
DEFAULT_EFFORT = "rtn"


@dataclass(frozen=True)
class ExportOptions:
    """What the command line says. None: decided from the model."""

    model: str
    out: Path
    scheme: str = "int4"
    recipe: Path | None = None
    calib_data: Path | None = None
    samples: int | None = None
    effort: str = DEFAULT_EFFORT
    backend: str = "auto"
    targets: tuple[str, ...] = ()
    max_length: int | None = None
    max_batch: int = 1
    work_dir: Path | None = None


@dataclass(frozen=True)
class ExportPlan:
    """Everything that is known before work begins; `--dry-run` shows it."""

    options: ExportOptions
    checkpoint: Checkpoint
    processor: Any  # transformers' own
    backend: Backend
    recipe: Recipe
    limits: Limits
    blocks: ModelBlocks
    linears: Mapping[str, LinearScheme]
    sizes: Mapping[str, Sizes]  # by part
    disk_bytes: int
    samples: tuple[Sample, ...]  # none when no linear is planned


@dataclass(frozen=True)
class ExportResult:
    """manifest: as written. reports: of the engine builds. peak_bytes: resident memory of the export and of its builds."""

    manifest: Manifest
    checks: list[LinearCheck]
    reports: list[BuildReport]
    seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: int = 0


def plan_export(options: ExportOptions) -> ExportPlan:
    """The preflight: opens headers, decides schemes, checks everything that can be checked. Writes nothing."""
    check_out(options.out)
    if options.work_dir is not None:
        check_work_dir(options.work_dir)
    for name, count in (("--max-batch", options.max_batch), ("--samples", options.samples)):
        if count is not None and count < 1:
            raise UserError(f"{name} {count}: must be at least 1")
    if options.effort not in EFFORTS:
        raise UserError(f"--effort {options.effort}: unknown; choose one of {', '.join(EFFORTS)}")
    recipe = choose_recipe(options.scheme, options.recipe, options.backend)
    backend = choose_backend(options.backend, options.targets)
    checkpoint = open_checkpoint(options.model)
    limits = _limits(options, checkpoint)
    blocks = make_blocks(checkpoint.hf_config)
    shapes = expected_shapes(checkpoint.config)
    linears = plan_linears(recipe, {name: shapes[f"{name}.weight"] for name in blocks.quantizable()})
    check_engine(linears, backend)
    sizes = {part: estimate_sizes(_of_part(shapes, part), linears) for part in PARTS}
    total = Sizes(*(sum(getattr(s, f) for s in sizes.values()) for f in ("float16_bytes", "planned_bytes")))
    disk_bytes = disk_needed(total, calibrates=bool(linears), builds=backend.module is not None)
    check_disk(options.out.parent, disk_bytes)
    processor = load_processor(checkpoint.folder)
    check_processor(processor, checkpoint.config, checkpoint.folder)
    samples = _samples(options, checkpoint, processor, limits) if linears else ()
    return ExportPlan(options, checkpoint, processor, backend, recipe, limits, blocks, linears, sizes, disk_bytes, samples)


def _samples(options: ExportOptions, checkpoint: Checkpoint, processor: Any, limits: Limits) -> tuple[Sample, ...]:
    entries = read_entries(options.calib_data or default_calibration(), options.samples, MAX_SAMPLES)
    return tuple(encode_entries(entries, processor, checkpoint.config, limits.max_length))


def export(options: ExportOptions, reporter: Reporter) -> ExportResult:
    """The whole command. Raises UserError with nothing left at the output path."""
    plan = plan_export(options)
    with scratch_folder(options.out) as scratch:
        try:
            return _run(plan, scratch, reporter)
        except (OSError, SafetensorError, UserError) as error:
            if is_disk_full(error, scratch):
                raise UserError(
                    f"{options.out.parent}: the disk is full; {plan.disk_bytes / 2**20:.0f} MiB are needed; free some"
                ) from error
            raise


def _run(plan: ExportPlan, scratch: Path, reporter: Reporter) -> ExportResult:
    stage_dir = scratch / "out"
    stage_dir.mkdir()
    calibrated = _calibrate(plan, calibrated_folder(plan.options.work_dir or scratch), reporter)
    interfaces = _write_graphs(plan, calibrated, stage_dir, reporter)
    reports, checks = _build(plan, stage_dir, reporter)
    if calibrated is not None and plan.options.work_dir is None:
        calibrated.folder.rename(stage_dir / f"{plan.options.out.stem}.calibrated")
    plan.processor.save_pretrained(stage_dir / f"{plan.options.out.stem}.processor")
    manifest = _with_report(plan, stage_dir, _manifest(plan, stage_dir, calibrated, interfaces, checks))
    write_manifest(manifest)
    publish(stage_dir, plan.options.out)
    peak = max([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, *(r.peak_bytes for r in reports)])
    manifest = replace(manifest, path=manifest_path(plan.options.out))
    return ExportResult(manifest, checks, reports, dict(reporter.seconds), peak)


def _limits(options: ExportOptions, checkpoint: Checkpoint) -> Limits:
    longest = checkpoint.config.text.max_position_embeddings
    config = checkpoint.config
    usual = max(DEFAULT_MAX_LENGTH, config.most_image_tokens + TEXT_LENGTH) if config.tiles else DEFAULT_MAX_LENGTH
    max_length = options.max_length or min(usual, longest)
    if not checkpoint.config.vision.tokens_per_image < max_length <= longest:
        raise UserError(
            f"--max-length {max_length}: this model takes {checkpoint.config.vision.tokens_per_image + 1} (one image and a "
            f"token) to {longest} tokens"
        )
    if config.tiles is not None:  # the session runs the vision engine as often as pictures need it
        return Limits(max_length, options.max_batch, config.most_tiles)
    images = max(options.max_batch, (max_length - 1) // checkpoint.config.vision.tokens_per_image)
    return Limits(max_length, options.max_batch, min(images, 4 * options.max_batch))


def float16_bytes(config: ModelConfig) -> dict[str, int]:
    """Bytes of each part's weights if all were float16: what compression is measured against."""
    shapes = expected_shapes(config)
    return {part: estimate_sizes(_of_part(shapes, part), {}).float16_bytes for part in PARTS}


def _of_part(names: Mapping[str, Any], part: str) -> dict[str, Any]:
    return {n: v for n, v in names.items() if n.startswith("language_model.") == (part == "language")}


def _calibrate(plan: ExportPlan, folder: Path, reporter: Reporter) -> CalibratedCheckpoint | None:
    """None when no linear is planned: then the graphs read the source itself."""
    if not plan.linears:
        return None
    options, checkpoint = plan.options, plan.checkpoint
    if options.calib_data is None:
        reporter.note(
            "calibrating with the package's own 64 drawn scenes, as --calib-data was not given: activation ranges of your "
            "pictures and prompts may be clipped, which costs accuracy; give 64 or more real examples"
        )
    shutil.rmtree(folder, ignore_errors=True)
    writer = CalibratedWriter(folder)
    with reporter.stage("calibrate") as stage:
        job = Calibration(plan.blocks, checkpoint.source, plan.linears, plan.samples)
        summary = EFFORTS[options.effort](job, writer, lambda done, total, _: stage.fraction(done / total))
        summary |= {"effort": options.effort, "data": "built-in" if options.calib_data is None else options.calib_data.name}
        writer.finish(checkpoint.config_json, summary)
    return CalibratedCheckpoint(folder)


def _write_graphs(
    plan: ExportPlan, calibrated: CalibratedCheckpoint | None, folder: Path, reporter: Reporter
) -> dict[str, Any]:
    """Writes both graphs; returns their inputs and outputs by part."""
    dtype, config = FLOAT_TYPES[FLOAT_TYPE], plan.checkpoint.config
    interfaces = {}
    with reporter.stage("graph") as stage:
        for number, part in enumerate(PARTS):
            model = vision_graph(config, dtype) if part == "vision" else language_graph(config, plan.limits, dtype)
            _fill(model, plan, calibrated, part, dtype)
            path = folder / file_names(plan.options.out)[f"{part}_onnx"]
            try:
                write_graph(model, path, lambda done, n=number: stage.fraction((n + done) / len(PARTS)))  # type: ignore[misc]
            except ir.serde.SerdeError as error:  # onnx_ir wraps what reading a tensor raised
                raise _root_cause(error) from error
            interfaces[part] = interface(model)
    return interfaces


def _root_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _fill(model: ir.Model, plan: ExportPlan, calibrated: CalibratedCheckpoint | None, part: str, dtype: ir.DataType) -> None:
    if calibrated is None:
        fill_weights(model, plan.checkpoint.source)
    else:
        planned = _of_part(plan.linears, part)
        rewritten = insert_qdq(model, planned, calibrated, dtype)
        if set(rewritten) != set(planned):
            raise RuntimeError(f"{part}: rewrote {len(rewritten)} linears of {len(planned)} planned")
        fill_weights(model, calibrated.floats)
    transpose_float_weights(model)


def _build(plan: ExportPlan, folder: Path, reporter: Reporter) -> tuple[list[BuildReport], list[LinearCheck]]:
    if plan.backend.module is None:
        return [], []
    names, config = file_names(plan.options.out), plan.checkpoint.config
    profiles = {"vision": vision_profile(config, plan.limits), "language": language_profile(config, plan.limits)}
    jobs = [
        BuildJob(str(folder / names[f"{part}_onnx"]), str(folder / names[f"{part}_plan"]), profiles[part]) for part in PARTS
    ]
    order = [job.plan for job in jobs]
    with reporter.stage("build") as stage:
        reports = build_engines(
            plan.backend, jobs, lambda path, done: stage.fraction((order.index(path) + done) / len(order))
        )
    checks: list[LinearCheck] = []
    with reporter.stage("check"):
        for part in PARTS:
            path = folder / names[f"{part}_plan"]
            found = check_plan(path, _of_part(plan.linears, part)) if _of_part(plan.linears, part) else []
            require_integer(path, found)
            checks += found
    return reports, checks


def _manifest(
    plan: ExportPlan,
    folder: Path,
    calibrated: CalibratedCheckpoint | None,
    interfaces: dict[str, Any],
    checks: list[LinearCheck],
) -> Manifest:
    roles = {role: folder / name for role, name in file_names(plan.options.out).items()}
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
        files={role: describe_file(path) for role, path in roles.items() if path.exists()}
        | {
            role: describe_folder(folder / f"{plan.options.out.stem}.{role}")
            for role in FOLDER_ROLES
            if (folder / f"{plan.options.out.stem}.{role}").exists()
        },
    )


def _with_report(plan: ExportPlan, folder: Path, manifest: Manifest) -> Manifest:
    """Writes the report of a manifest; returns the manifest with the report among its files."""
    path = folder / file_names(plan.options.out)["report"]
    write_report(manifest, path)
    return replace(manifest, files={**manifest.files, "report": describe_file(path)})


def _versions() -> dict[str, str]:
    packages = ("qvlm-export", "torch", "transformers", "onnx", "onnxscript", "onnx-ir", "numpy")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}
