"""The stages of an export, each file in, file out: calibrated checkpoint, ONNX graphs, engines.

What a killed export finished is not made again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from qvlm_export.calibrate.blockwise.job import CalibrationJob
from qvlm_export.calibrate.blockwise.resume import CalibrationWork
from qvlm_export.calibrate.calibrators.cost import is_narrow
from qvlm_export.calibrate.calibrators.efforts import EFFORTS, run_effort
from qvlm_export.calibrate.checkpoint.calibrated import CalibratedCheckpoint, CalibratedWriter
from qvlm_export.calibrate.checkpoint.safetensors_source import INDEX_FILE
from qvlm_export.calibrate.errors import UnfinishedError, UserError
from qvlm_export.engines.builder.build import BuildJob, BuildReport, build_engines, language_profile, vision_profile
from qvlm_export.engines.check.engine_precision import LinearCheck, check_engine_precision, require_integer_products
from qvlm_export.engines.graph.float_graphs import FLOAT_TYPES, fill_weights, language_graph, vision_graph
from qvlm_export.engines.graph.qdq import insert_qdq, transpose_float_weights
from qvlm_export.engines.graph.write import interface, write_graph
from qvlm_export.pipeline.fingerprint import digest
from qvlm_export.pipeline.planning.export_plan import PARTS, ExportPlan, of_part
from qvlm_export.pipeline.progress import Reporter
from qvlm_export.pipeline.publish import file_names
from qvlm_export.pipeline.work_folder import WorkFolder

FLOAT_TYPE = "float16"


def stage_key(plan: ExportPlan, fingerprint: Mapping[str, str], part: str, stage: str) -> str:
    """Of everything that a graph, or the engine built from it, depends on."""
    backend = asdict(plan.backend) if stage == "build" else None
    return digest([dict(fingerprint), asdict(plan.limits), FLOAT_TYPE, part, backend])


def calibrate(plan: ExportPlan, work: WorkFolder, reporter: Reporter) -> CalibratedCheckpoint | None:
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
            f"calibrating with {len(plan.samples)} of the package's own drawn scenes, as --calib-data was not given: "
            "activation ranges of your pictures and prompts may be clipped, which costs accuracy; give 64 or more real ones"
        )
    writer = CalibratedWriter(folder)
    with reporter.stage("calibrate") as stage:
        narrow = is_narrow(plan.blocks, plan.samples, EFFORTS[options.effort].config)
        kept = CalibrationWork(work.state, narrow=narrow, memory_bytes=plan.activations_bytes)
        job = CalibrationJob(plan.blocks, checkpoint.source, plan.linears, plan.samples, kept, torch.device(plan.device))
        if resumed := work.finished_blocks():
            reporter.note(f"going on behind block {resumed} of {plan.blocks.num_blocks()}")
        summary = run_effort(options.effort, job, writer, lambda done, total, _: stage.fraction(done / total))
        summary |= {"effort": options.effort, "data": "built-in" if options.calib_data is None else options.calib_data.name}
        writer.finish(checkpoint.config_json, summary)
    return CalibratedCheckpoint(folder)


def write_graphs(
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
            key = stage_key(plan, fingerprint, part, "graph")
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


def _fill(model: ir.Model, plan: ExportPlan, calibrated: CalibratedCheckpoint | None, part: str, dtype: ir.DataType) -> None:
    if calibrated is None:
        fill_weights(model, plan.checkpoint.source)
    else:
        planned = of_part(plan.linears, part)
        rewritten = insert_qdq(model, planned, calibrated, dtype)
        if set(rewritten) != set(planned):
            raise RuntimeError(f"{part}: rewrote {len(rewritten)} linears of {len(planned)} planned")
        fill_weights(model, calibrated.floats)
    transpose_float_weights(model)


def _root_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def build(
    plan: ExportPlan, work: WorkFolder, fingerprint: Mapping[str, str], reporter: Reporter
) -> tuple[list[BuildReport], list[LinearCheck]]:
    """Builds the engines that are not there yet and reads them all back; none where the backend writes graphs alone."""
    if plan.backend.module is None:
        return [], []
    names, config = file_names(plan.options.out), plan.checkpoint.config
    profiles = {"vision": vision_profile(config, plan.limits), "language": language_profile(config, plan.limits)}
    paths = {part: work.stage / names[f"{part}_plan"] for part in PARTS}
    keys = {str(path): stage_key(plan, fingerprint, part, "build") for part, path in paths.items()}
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
            linears = of_part(plan.linears, part)
            found_in_plan = check_engine_precision(path, linears) if linears else []
            require_integer_products(path, found_in_plan)
            checks += found_in_plan
    return [found[str(path)] for path in paths.values()], checks
