"""The export, stage by stage: checkpoint -> calibrated checkpoint -> ONNX graphs -> engines -> published files.

Every stage reads and writes files in a work folder beside the output; the results are moved into place at the end, the
manifest last, so that an interrupted export leaves nothing that looks finished. What is finished when it is interrupted is
noted there, and not made again.
"""

from __future__ import annotations

import importlib.metadata
import platform
import resource
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from calibrate.absmax import calibrate_absmax
from calibrate.blocks import ModelBlocks, make_blocks
from calibrate.calibrated import CalibratedCheckpoint, CalibratedWriter
from calibrate.cost import Cost, calibration_cost, is_narrow
from calibrate.errors import UnfinishedError, UserError
from calibrate.job import Calibration
from calibrate.safetensors_source import INDEX_FILE
from calibrate.samples import Sample
from calibrate.scheme import LinearScheme
from calibrate.searched import calibrate_full, calibrate_searched
from calibrate.work import Work
from engines.backend import Backend, choose_backend
from engines.build import BuildJob, BuildReport, build_engines, language_profile, vision_profile
from engines.config import Limits, ModelConfig
from engines.graph import FLOAT_TYPES, expected_shapes, fill_weights, language_graph, vision_graph
from engines.insert_qdq import insert_qdq, transpose_float_weights
from engines.manifest import Manifest, describe_file, describe_folder, write_manifest
from engines.plan_check import LinearCheck, check_plan, require_integer
from engines.write_graph import interface, write_graph
from qvlm_export.checkpoint import Checkpoint, open_checkpoint
from qvlm_export.estimate import Estimate, activations_bytes, estimate, largest_bytes, total_sizes
from qvlm_export.fingerprint import METHODS, digest, work_fingerprint
from qvlm_export.machine import measure_machine
from qvlm_export.plan import Recipe, check_engine, choose_recipe, plan_linears
from qvlm_export.preflight import (
    Sizes,
    check_disk,
    check_out,
    check_work_dir,
    disk_needed,
    estimate_sizes,
)
from qvlm_export.progress import Reporter
from qvlm_export.publish import FOLDER_ROLES, file_names, manifest_path, publish
from qvlm_export.report import write_report
from qvlm_export.samples import check_processor, default_calibration, encode_entries, load_processor, read_entries
from qvlm_export.work import FINISHED, WorkFolder, explained, finished_export, work_folder

FLOAT_TYPE = "float16"
PARTS = ("vision", "language")
DEFAULT_MAX_LENGTH = 2048
TEXT_LENGTH = 1024  # beside the largest picture, where pictures are cut into tiles
MAX_SAMPLES = 128  # used when --samples does not say
# What calibration does with the samples: rtn takes absolute maxima and rounds to nearest; fast folds and rounds towards the
# float model's output; full tries several ways on every block and then learns the rounding.
EFFORTS = {"rtn": calibrate_absmax, "fast": calibrate_searched, "full": calibrate_full}
DEFAULT_EFFORT = "rtn"
ESTIMATED_ABOVE_BYTES = 2**30  # of weights: smaller models are done before an estimate is read


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
    resume: bool = False
    memory: float | None = None  # GiB


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
    cost: Cost  # of calibration
    activations_bytes: int  # of what lies between two blocks, that many in memory


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
    disk_bytes = disk_needed(total_sizes(sizes), calibrates=bool(linears), builds=backend.module is not None)
    check_disk(options.out.parent, disk_bytes)
    processor = load_processor(checkpoint.folder)
    check_processor(processor, checkpoint.config, checkpoint.folder)
    samples = _samples(options, checkpoint, processor, limits) if linears else ()
    cost = calibration_cost(blocks, linears, samples, METHODS.get(options.effort)) if linears else Cost()
    kept = activations_bytes(options.memory, options.effort, cost, largest_bytes(checkpoint.config))
    return ExportPlan(
        options, checkpoint, processor, backend, recipe, limits, blocks, linears, sizes, disk_bytes, samples, cost, kept
    )


def estimate_export(plan: ExportPlan) -> Estimate:
    """Seconds and memory, from what is to be done and a short measurement of this machine."""
    machine = measure_machine(plan.options.out.parent, plan.checkpoint.source.files()[0])
    builds, largest = plan.backend.module is not None, largest_bytes(plan.checkpoint.config)
    return estimate(plan.cost, plan.linears, total_sizes(plan.sizes), largest, machine, builds=builds)


def _samples(options: ExportOptions, checkpoint: Checkpoint, processor: Any, limits: Limits) -> tuple[Sample, ...]:
    entries = read_entries(options.calib_data or default_calibration(), options.samples, MAX_SAMPLES)
    return tuple(encode_entries(entries, processor, checkpoint.config, limits.max_length))


def export(options: ExportOptions, reporter: Reporter) -> ExportResult:
    """The whole command. Raises UserError with nothing left at the output path.

    What is unfinished for no fault of the input leaves its work folder, and a line that says how to go on with it.
    """
    plan = plan_export(options)
    if total_sizes(plan.sizes).float16_bytes > ESTIMATED_ABOVE_BYTES:
        reporter.note(estimate_export(plan).in_words())
    with work_folder(options.out, options.work_dir) as work:
        fingerprint = work_fingerprint(plan.checkpoint, plan.linears, plan.samples, options.effort)
        if options.resume and (finished := finished_export(work, _key(plan, fingerprint, PARTS[-1], "build"))):
            return _published(plan, work, finished, reporter)
        work.begin(fingerprint, options.resume)
        try:
            return _run(plan, work, fingerprint, reporter)
        except (Exception, KeyboardInterrupt) as error:
            raise explained(error, plan.disk_bytes, work) from error


def _run(plan: ExportPlan, work: WorkFolder, fingerprint: Mapping[str, str], reporter: Reporter) -> ExportResult:
    calibrated = _calibrate(plan, work, reporter)
    interfaces = _write_graphs(plan, calibrated, work, fingerprint, reporter)
    reports, checks = _build(plan, work, fingerprint, reporter)
    if calibrated is not None and plan.options.work_dir is None:
        calibrated.folder.rename(work.stage / f"{plan.options.out.stem}.calibrated")
    plan.processor.save_pretrained(work.stage / f"{plan.options.out.stem}.processor")
    manifest = _with_report(plan, work.stage, _manifest(plan, work.stage, calibrated, interfaces, checks))
    write_manifest(manifest)
    key = _key(plan, fingerprint, PARTS[-1], "build")
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
    return ExportResult(manifest, checks, reports, dict(reporter.seconds), peak)


def _key(plan: ExportPlan, fingerprint: Mapping[str, str], part: str, stage: str) -> str:
    """Of everything that a graph, or the engine built from it, depends on."""
    backend = asdict(plan.backend) if stage == "build" else None
    return digest([dict(fingerprint), asdict(plan.limits), FLOAT_TYPE, part, backend])


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


def _calibrate(plan: ExportPlan, work: WorkFolder, reporter: Reporter) -> CalibratedCheckpoint | None:
    """None when no linear is planned: then the graphs read the source itself."""
    if not plan.linears:
        return None
    options, checkpoint, folder = plan.options, plan.checkpoint, work.calibrated
    moved = work.stage / f"{options.out.stem}.calibrated"
    if moved.exists() and options.work_dir is None:  # killed while it was taken out of the work folder
        moved.rename(folder)
    if (folder / INDEX_FILE).exists():
        return CalibratedCheckpoint(folder)
    if options.calib_data is None:
        reporter.note(
            "calibrating with the package's own 64 drawn scenes, as --calib-data was not given: activation ranges of your "
            "pictures and prompts may be clipped, which costs accuracy; give 64 or more real examples"
        )
    writer = CalibratedWriter(folder)
    with reporter.stage("calibrate") as stage:
        narrow = is_narrow(plan.blocks, plan.samples, streams=1 if options.effort == "rtn" else 2)
        kept = Work(work.state, narrow=narrow, memory_bytes=plan.activations_bytes)
        job = Calibration(plan.blocks, checkpoint.source, plan.linears, plan.samples, kept)
        if resumed := work.finished_blocks():
            reporter.note(f"going on behind block {resumed} of {plan.blocks.count()}")
        summary = EFFORTS[options.effort](job, writer, lambda done, total, _: stage.fraction(done / total))
        summary |= {"effort": options.effort, "data": "built-in" if options.calib_data is None else options.calib_data.name}
        writer.finish(checkpoint.config_json, summary)
    return CalibratedCheckpoint(folder)


def _write_graphs(
    plan: ExportPlan,
    calibrated: CalibratedCheckpoint | None,
    work: WorkFolder,
    fingerprint: Mapping[str, str],
    reporter: Reporter,
) -> dict[str, Any]:
    """Writes both graphs, unless they are there; returns their inputs and outputs by part."""
    dtype, config, names = FLOAT_TYPES[FLOAT_TYPE], plan.checkpoint.config, file_names(plan.options.out)
    interfaces = {}
    with reporter.stage("graph") as stage:
        for number, part in enumerate(PARTS):
            model = vision_graph(config, dtype) if part == "vision" else language_graph(config, plan.limits, dtype)
            interfaces[part] = interface(model)
            key = _key(plan, fingerprint, part, "graph")
            if work.stages().get(f"{part}_onnx", {}).get("key") == key:
                continue
            _fill(model, plan, calibrated, part, dtype)
            path = work.stage / names[f"{part}_onnx"]
            try:
                write_graph(model, path, lambda done, n=number: stage.fraction((n + done) / len(PARTS)))  # type: ignore[misc]
            except ir.serde.SerdeError as error:  # onnx_ir wraps what reading a tensor raised
                raise _root_cause(error) from error
            work.note_stage(f"{part}_onnx", key, [path, work.stage / names[f"{part}_data"]])
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


def _build(
    plan: ExportPlan, work: WorkFolder, fingerprint: Mapping[str, str], reporter: Reporter
) -> tuple[list[BuildReport], list[LinearCheck]]:
    if plan.backend.module is None:
        return [], []
    names, config = file_names(plan.options.out), plan.checkpoint.config
    profiles = {"vision": vision_profile(config, plan.limits), "language": language_profile(config, plan.limits)}
    paths = {part: work.stage / names[f"{part}_plan"] for part in PARTS}
    keys = {str(path): _key(plan, fingerprint, part, "build") for part, path in paths.items()}
    noted = {path: work.stages().get(Path(path).name, {}) for path in keys}
    found = {path: BuildReport(**n["report"]) for path, n in noted.items() if n.get("key") == keys[path]}
    jobs = [
        BuildJob(str(work.stage / names[f"{part}_onnx"]), str(path), profiles[part])
        for part, path in paths.items()
        if str(path) not in found
    ]

    def finished(report: BuildReport) -> None:
        found[report.plan] = report
        work.note_stage(Path(report.plan).name, keys[report.plan], [Path(report.plan)], report=asdict(report))

    order = [job.plan for job in jobs]
    with reporter.stage("build") as stage:
        try:
            build_engines(
                plan.backend, jobs, lambda path, done: stage.fraction((order.index(path) + done) / len(order)), finished
            )
        except UserError as error:  # the calibrated checkpoint and the graphs are good for another backend or machine
            raise UnfinishedError(str(error)) from error
    checks: list[LinearCheck] = []
    with reporter.stage("check"):
        for part, path in paths.items():
            linears = _of_part(plan.linears, part)
            of_part = check_plan(path, linears) if linears else []
            require_integer(path, of_part)
            checks += of_part
    return [found[str(path)] for path in paths.values()], checks


def _manifest(
    plan: ExportPlan,
    folder: Path,
    calibrated: CalibratedCheckpoint | None,
    interfaces: dict[str, Any],
    checks: list[LinearCheck],
) -> Manifest:
    # A killed run may have left its report; this one's is described when it is written.
    roles = {role: folder / name for role, name in file_names(plan.options.out).items() if role != "report"}
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
