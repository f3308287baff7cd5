"""The stages of an export: writing a calibration set where there is none, calibration, ONNX graphs, TensorRT engines.

Each stage reads files and writes files. What an interrupted export completed is not made again.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from qvlm_export.calibrate.blockwise.blocks import ModelBlocks, deterministic_threads
from qvlm_export.calibrate.blockwise.forward import compute_prefix
from qvlm_export.calibrate.blockwise.job import CalibrationJob
from qvlm_export.calibrate.blockwise.resume import CalibrationWork
from qvlm_export.calibrate.calibrators.cost import is_narrow
from qvlm_export.calibrate.calibrators.efforts import EFFORTS, run_effort
from qvlm_export.calibrate.checkpoint.calibrated import PREFIX_FILE, CalibratedCheckpoint, CalibratedWriter
from qvlm_export.calibrate.checkpoint.files import clear_leftovers
from qvlm_export.calibrate.checkpoint.safetensors_source import INDEX_FILE
from qvlm_export.calibrate.checkpoint.scheme import FLOAT16, MAX_FLOAT16
from qvlm_export.calibrate.errors import UnfinishedError, UserError
from qvlm_export.calibrate.quantization.activation_range import find_massive, measure_ranges
from qvlm_export.calibrate.quantization.config import SearchConfig
from qvlm_export.calibrate.sensitivity.accuracy import Accuracy, measure_accuracy
from qvlm_export.engines.builder.build import BuildJob, BuildReport, build_engines, language_profile, vision_profile
from qvlm_export.engines.check.engine_precision import LinearCheck, check_engine_precision, require_integer_products
from qvlm_export.engines.check.thresholds import MAX_KL, MIN_AGREEMENT
from qvlm_export.engines.graph.float_graphs import FLOAT_TYPES, fill_weights, language_graph, vision_graph
from qvlm_export.engines.graph.qdq import insert_qdq, transpose_float_weights
from qvlm_export.engines.graph.write import interface, write_graph
from qvlm_export.inference.model import LoadedModel
from qvlm_export.inference.self_calibration import BATCH, join_parts, write_own_set
from qvlm_export.inference.torch_session import choose_batch, open_float_session
from qvlm_export.inputs.prefix import describe_prefix
from qvlm_export.pipeline.fingerprint import digest
from qvlm_export.pipeline.preparation.calibration_set import FOLDER, describe_faults
from qvlm_export.pipeline.preparation.outputs import file_names
from qvlm_export.pipeline.preparation.prepare import PARTS, PreparedExport, select_part, use_entries
from qvlm_export.pipeline.preparation.writing import WRITE
from qvlm_export.pipeline.progress import Reporter
from qvlm_export.pipeline.work_folder import WorkFolder

ACCURACY = "accuracy"  # name of the stage, and key in the record
WORST = 3  # linears that a warning names
GetBlocks = Callable[[], tuple[ModelBlocks, dict[str, Any]]]
PART_CONFIGS = ("text_config", "vision_config")


def stage_key(prepared: PreparedExport, fingerprint: Mapping[str, str], part: str, stage: str) -> str:
    """Returns a digest of everything that a graph (stage "graph"), or the engine built from it ("build"), depends on.

    part: one of PARTS.
    """
    backend = asdict(prepared.backend) if stage == "build" else None
    return digest([dict(fingerprint), asdict(prepared.limits), prepared.options.dtype, part, backend])


def write_calibration_set(prepared: PreparedExport, work: WorkFolder, reporter: Reporter) -> PreparedExport:
    """Returns the export with the calibration set that its float model writes, or unchanged where it was given one.

    The set is written into the work folder, in parts; those of an interrupted run are not written again. Raises UserError
    when the model cannot write one.
    """
    chosen, checkpoint = prepared.calibration_set, prepared.checkpoint
    if not chosen.drafts:
        return prepared
    if chosen.note:
        reporter.note(chosen.note)

    def open_model() -> LoadedModel:
        batch = choose_batch(checkpoint.config, BATCH)
        return LoadedModel(open_float_session(checkpoint, prepared.device, batch), prepared.processor)

    folder, length = work.written, prepared.limits.max_length
    with reporter.stage(WRITE) as stage, deterministic_threads(prepared.blocks):
        try:
            entries = write_own_set(
                open_model, checkpoint.config, chosen.drafts, folder, length=length, progress=stage.fraction
            )
        except UserError as error:
            raise UserError(
                f"the float model cannot write its calibration set: {error}; or add --calib-data built-in"
            ) from error
    for fault in describe_faults(entries):
        reporter.note(fault)
    return use_entries(prepared, entries)


def copy_calibration_set(prepared: PreparedExport, calibrated: CalibratedCheckpoint, work: WorkFolder) -> None:
    """Puts the set that the model wrote, if it did, into the calibrated checkpoint, for `--calib-data` and for people."""
    if prepared.calibration_set.drafts:
        join_parts(work.written, calibrated.folder / FOLDER)


def calibrate(
    prepared: PreparedExport, work: WorkFolder, reporter: Reporter, get_blocks: GetBlocks
) -> CalibratedCheckpoint | None:
    """Writes the calibrated checkpoint, unless it exists, and returns it. get_blocks: gives what `put_prefix` returns.

    Returns None when no linear is quantized; the graphs then take their weights from the source checkpoint.
    Raises UserError when weights or activations are not finite, or beyond the range of the graphs' float type.
    """
    if not prepared.linears:
        measure_activation_ranges(prepared, reporter)
        return None
    options, checkpoint, folder = prepared.options, prepared.checkpoint, work.calibrated
    moved = work.staging / f"{options.out.stem}.calibrated"
    if moved.exists() and options.work_dir is None:  # an earlier run was killed after it had moved the checkpoint there
        moved.rename(folder)
    clear_leftovers(folder)
    if (folder / INDEX_FILE).exists():
        return CalibratedCheckpoint(folder)
    if prepared.calibration_set.note and not prepared.calibration_set.drafts:
        reporter.note(prepared.calibration_set.note)
    ranges = measure_activation_ranges(prepared, reporter)
    writer = CalibratedWriter(folder)
    with reporter.stage("calibrate") as stage:
        narrow = is_narrow(prepared.blocks, prepared.samples, EFFORTS[options.effort].config)
        state = CalibrationWork(work.state, narrow=narrow, memory_bytes=prepared.activations_bytes)
        blocks, massive = get_blocks()
        job = CalibrationJob(
            blocks,
            checkpoint.source,
            prepared.linears,
            prepared.samples,
            work=state,
            device=torch.device(prepared.device),
            strict=prepared.strict,
        )
        if finished := work.count_finished_blocks():
            reporter.note(f"resuming after block {finished} of {prepared.blocks.num_blocks()}")
        summary = run_effort(options.effort, job, writer, lambda done, total, _: stage.fraction(done / total))
        summary |= {"effort": options.effort, "data": prepared.calibration_set.name}
        summary |= {"largest_activations": ranges} if ranges else {}
        if prepared.prefix:
            summary["prefix"] = {**describe_prefix(prepared.processor, prepared.prefix), "massive_activations": massive}
        writer.finish(_name_float_type(checkpoint.config_json, options.dtype), summary)
    return CalibratedCheckpoint(folder)


def put_prefix(prepared: PreparedExport) -> tuple[ModelBlocks, dict[str, Any]]:
    """Returns the model's blocks with the float model's prefix, and the massive activations in the prefix, by layer.

    Without a prefix the blocks are as they are. Reads every decoder layer once. Raises UserError for keys and values that a
    float16 cache cannot hold.
    """
    if not prepared.prefix:
        return prepared.blocks, {}
    massive: dict[str, Any] = {}
    with deterministic_threads(prepared.blocks):
        prefix = compute_prefix(
            prepared.blocks,
            prepared.checkpoint.source,
            prepared.prefix,
            lambda name, x: massive.update({name: find_massive([x])}),
        )
    largest = max(float(np.abs(array).max()) for array in prefix.arrays())
    if prepared.options.dtype == FLOAT16 and not largest <= MAX_FLOAT16:
        raise UserError(
            f"keys or values of the prompt's first tokens reach {largest:.3g}, beyond float16's {MAX_FLOAT16:.0f}; add "
            "--dtype bfloat16"
        )
    found = {name: activation for name, activation in massive.items() if activation is not None}
    return replace(prepared.blocks, prefix=prefix), found


def measure_held_out(
    prepared: PreparedExport,
    calibrated: CalibratedCheckpoint,
    work: WorkFolder,
    key: str,
    *,
    reporter: Reporter,
    get_blocks: GetBlocks,
) -> dict[str, Any]:
    """Returns for the manifest how far the calibrated model is from the float model, see `Accuracy`.

    key: a digest of all that it depends on. get_blocks: gives what `put_prefix` returns.
    """
    recorded = work.completed_stages().get(ACCURACY, {})
    if recorded.get("key") != key:
        samples, source, device = prepared.checked_samples, prepared.checkpoint.source, torch.device(prepared.device)
        with reporter.stage(ACCURACY) as stage, deterministic_threads(prepared.blocks):
            accuracy = measure_accuracy(get_blocks()[0], source, calibrated, samples, device=device, progress=stage.fraction)
        held_out = not any(sample is other for sample in samples for other in prepared.samples)
        worst = find_worst_linears(accuracy, calibrated.summary)
        found = {"samples": len(samples), "held_out": held_out, **asdict(accuracy), "worst": worst}
        work.record_stage(ACCURACY, key, [], **{ACCURACY: found})
    return dict(work.completed_stages()[ACCURACY][ACCURACY])


def warn_of(calibration: Mapping[str, Any]) -> str | None:
    """Returns the warning about an export whose answers differ too much from the float model's, else None.

    calibration: the section of this name in the manifest.
    """
    accuracy = calibration.get(ACCURACY)
    if not accuracy or (accuracy["agreement"] >= MIN_AGREEMENT and accuracy["kl"] <= MAX_KL):
        return None
    searched = isinstance(EFFORTS[calibration["effort"]].config, SearchConfig)
    cure = "take more calibration samples, or" if searched else "add --effort fast, or"
    share, kind = f"{100 * accuracy['agreement']:.0f} %", "held-out " if accuracy["held_out"] else ""
    return (
        f"warning: on {accuracy['samples']} {kind}calibration samples the quantized model has the float model's first "
        f"choice for {share} of {accuracy['tokens']} tokens (KL divergence {accuracy['kl']:.2g} nats); most is lost in "
        f"{', '.join(accuracy['worst'])}; {cure} keep these in float by --recipe"
    )


def find_worst_linears(accuracy: Accuracy, summary: Mapping[str, Any]) -> list[str]:
    """Returns the linears with the lowest SQNR in the blocks that lose most; the blocks where no SQNR is recorded."""
    records = {block.get("name"): block for block in summary.get("blocks", ())}
    worst = []
    for name in accuracy.worst_blocks(WORST):
        layers = records.get(name, {}).get("layers", ())
        sqnr = {n: x["sqnr_db"] for layer in layers for n, x in layer["linears"].items() if x.get("sqnr_db") is not None}
        worst.append(min(sqnr, key=lambda n: sqnr[n]) if sqnr else name)
    return worst


def copy_prefix(prepared: PreparedExport, calibrated: CalibratedCheckpoint, work: WorkFolder) -> None:
    """Puts the prefix of the calibrated checkpoint, if it has one, beside the graphs, for sessions."""
    if prepared.prefix:
        shutil.copyfile(calibrated.folder / PREFIX_FILE, work.staging / file_names(prepared.options.out)["prefix"])


def _name_float_type(config_json: dict[str, Any], float_type: str) -> dict[str, Any]:
    """Returns the calibrated checkpoint's config.json, which transformers loads in bfloat16 where the graphs are."""
    if float_type == FLOAT16:
        return config_json
    kept = {key: value for key, value in config_json.items() if key != "torch_dtype"}
    parts: dict[str, Any] = {key: {**kept[key], "dtype": float_type} for key in PART_CONFIGS if key in kept}
    return {**kept, **parts, "dtype": float_type}


def measure_activation_ranges(prepared: PreparedExport, reporter: Reporter) -> dict[str, dict[str, float]]:
    """Returns the largest activations of the float model by block and place; nothing where `range_samples` is empty.

    Raises UserError, naming the place, when they are beyond float16's range.
    """
    if not prepared.range_samples:
        return {}
    with reporter.stage("ranges") as stage:
        return measure_ranges(
            prepared.blocks,
            prepared.checkpoint.source,
            prepared.range_samples,
            epsilon=prepared.checkpoint.config.text.rms_norm_eps,
            float_type=prepared.options.dtype,
            device=torch.device(prepared.device),
            progress=stage.fraction,
        )


def write_graphs(
    prepared: PreparedExport,
    calibrated: CalibratedCheckpoint | None,
    work: WorkFolder,
    fingerprint: Mapping[str, str],
    reporter: Reporter,
) -> dict[str, Any]:
    """Writes both ONNX graphs, unless they exist; returns a description of their inputs and outputs by part.

    calibrated: None for graphs in float, which take their weights from the source checkpoint.
    Raises UserError when a weight cannot be read or is not finite.
    """
    dtype, config, names = FLOAT_TYPES[prepared.options.dtype], prepared.checkpoint.config, file_names(prepared.options.out)
    interfaces = {}
    with reporter.stage("graph") as stage:
        for number, part in enumerate(PARTS):
            model = vision_graph(config, dtype) if part == "vision" else language_graph(config, prepared.limits, dtype)
            interfaces[part] = interface(model)
            key = stage_key(prepared, fingerprint, part, "graph")
            if work.completed_stages().get(f"{part}_onnx", {}).get("key") == key:
                continue
            _insert_weights(model, prepared, calibrated, part, dtype)
            path = work.staging / names[f"{part}_onnx"]
            try:
                write_graph(model, path, lambda done, n=number: stage.fraction((n + done) / len(PARTS)))  # type: ignore[misc]
            except ir.serde.SerdeError as error:  # onnx_ir wraps the error that reading a tensor raised
                raise _get_root_cause(error) from error
            work.record_stage(f"{part}_onnx", key, [path, work.staging / names[f"{part}_data"]])
    return interfaces


def _insert_weights(
    model: ir.Model, prepared: PreparedExport, calibrated: CalibratedCheckpoint | None, part: str, dtype: ir.DataType
) -> None:
    """Gives the graph its weights in place: with Q/DQ nodes from the calibrated checkpoint, or in float from the source."""
    if calibrated is None:
        fill_weights(model, prepared.checkpoint.source)
    else:
        schemes = select_part(prepared.linears, part)
        rewritten = insert_qdq(model, schemes, calibrated, dtype)
        if set(rewritten) != set(schemes):
            raise RuntimeError(f"{part}: rewrote {len(rewritten)} linears of {len(schemes)} that are quantized")
        fill_weights(model, calibrated.floats)
    transpose_float_weights(model)


def _get_root_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def build(
    prepared: PreparedExport, work: WorkFolder, fingerprint: Mapping[str, str], reporter: Reporter
) -> tuple[list[BuildReport], list[LinearCheck]]:
    """Builds the engines that do not exist yet, and checks the precision of every quantized linear in all of them.

    Returns the build reports, in the order of PARTS, and the checks; both are empty for a backend that builds no engines.
    Raises UnfinishedError when a build fails: calibrated checkpoint and graphs serve another backend or machine. Raises
    UserError when a quantized linear does not run on integers.
    """
    if prepared.backend.module is None:
        return [], []
    names, config = file_names(prepared.options.out), prepared.checkpoint.config
    profiles = {"vision": vision_profile(config, prepared.limits), "language": language_profile(config, prepared.limits)}
    paths = {part: work.staging / names[f"{part}_plan"] for part in PARTS}
    keys = {str(path): stage_key(prepared, fingerprint, part, "build") for part, path in paths.items()}
    records = {path: work.completed_stages().get(Path(path).name, {}) for path in keys}
    reports = {path: BuildReport(**r["report"]) for path, r in records.items() if r.get("key") == keys[path]}
    jobs = [
        BuildJob(str(work.staging / names[f"{part}_onnx"]), str(path), profiles[part])
        for part, path in paths.items()
        if str(path) not in reports
    ]

    def record_build(report: BuildReport) -> None:
        reports[report.plan] = report
        work.record_stage(Path(report.plan).name, keys[report.plan], [Path(report.plan)], report=asdict(report))

    order = [job.plan for job in jobs]
    with reporter.stage("build") as stage:
        try:
            build_engines(
                prepared.backend,
                jobs,
                lambda path, done: stage.fraction((order.index(path) + done) / len(order)),
                record_build,
            )
        except UserError as error:  # keeps the work: the graphs can still be built by another backend or machine
            raise UnfinishedError(str(error)) from error
    checks: list[LinearCheck] = []
    with reporter.stage("check"):
        for part, path in paths.items():
            schemes = select_part(prepared.linears, part)
            part_checks = check_engine_precision(path, schemes) if schemes else []
            require_integer_products(path, part_checks)
            checks += part_checks
    return [reports[str(path)] for path in paths.values()], checks
