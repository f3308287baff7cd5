"""The accuracy ladder: one model in four forms, compared rung by rung on the same samples.

checkpoint (torch, float) -> fake-quant (torch, the calibrated integers) -> graph (ONNX Runtime) -> engine (TensorRT). Each
rung is compared with the checkpoint and with the rung below it, so a loss has the name of the step that caused it. The
torch rungs stream through memory block by block; logits exist for one sample at a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import torch

from qvlm_export.calibrate.blockwise.blocks import ModelBlocks, make_blocks
from qvlm_export.calibrate.blockwise.forward import Step, float_step, load_head, run_decoder_blocks, run_vision_blocks
from qvlm_export.calibrate.checkpoint.calibrated import CalibratedCheckpoint
from qvlm_export.calibrate.checkpoint.samples import Sample, place_features
from qvlm_export.calibrate.checkpoint.tensor_source import TensorSource
from qvlm_export.calibrate.errors import UserError
from qvlm_export.calibrate.quantization.fake_quantized import (
    DequantizedSource,
    fake_quantized_step,
    record_outputs,
    round_rotary_tables,
)
from qvlm_export.checkpoints.checkpoint import Checkpoint
from qvlm_export.engines.check.graph_weights import WrongWeight, run_blocks, wrong_weights
from qvlm_export.engines.check.metrics import Sums, measure, sqnr_db
from qvlm_export.engines.check.polygraphy import RunnerPair, engine_runners, language_feed, no_image, vision_feed
from qvlm_export.engines.manifest import Manifest, verify_file
from qvlm_export.engines.runtime.open import choose_runtime, open_session
from qvlm_export.engines.runtime.session import Session, embed_tiles
from qvlm_export.pipeline.progress import Reporter
from qvlm_export.validation.accuracy import (
    ENGINE,
    FAKE_QUANT,
    FLOAT,
    GRAPH,
    GROUPS,
    Comparison,
    ComparisonChain,
    LayerScore,
    ModelRun,
    token_groups,
)


@dataclass(frozen=True)
class ComparisonJob:
    """What is compared, on what. per_layer: also look at every block of the graph."""

    manifest: Manifest
    checkpoint: Checkpoint
    samples: Sequence[Sample]
    per_layer: bool = False


# Block outputs of the probed sample by rung and block: float32 [tokens, width].
Traces = dict[str, dict[str, np.ndarray]]


def compare_forms(job: ComparisonJob, reporter: Reporter) -> ComparisonChain:
    """Runs every rung that can run here. Raises UserError when none but the checkpoint can."""
    blocks = make_blocks(job.checkpoint.hf_config)
    calibrated, reason = open_calibrated(job.manifest)
    obstacles = [reason, graph_obstacle(job.manifest), engine_obstacle(job.manifest)]
    if all(obstacles):
        raise UserError(f"{job.manifest.path}: nothing can be compared here: {'; '.join(obstacles)}")
    traces: Traces = {FLOAT: {}, FAKE_QUANT: {}, GRAPH: {}}
    with ExitStack() as stack:
        with reporter.stage("torch") as stage:
            rungs = [*_torch_rungs(job, blocks, calibrated, traces, stage.fraction)]
            if calibrated is None:
                rungs.append(ModelRun(FAKE_QUANT, None, reason))
        graph, session = _graph_rung(job.manifest, job.samples, stack)
        rungs = [*rungs, graph, _engine_rung(job.manifest, job.samples, stack)]
        with reporter.stage("compare") as stage:
            comparisons = _compare(job, rungs, stage.fraction)
        if job.per_layer and session is not None:
            traces[GRAPH] = _graph_blocks(job, blocks, session)
    checked = {} if calibrated is None or session is None else calibrated.schemes
    wrong = tuple(_wrong_weights(job.manifest, calibrated)) if calibrated is not None and checked else ()
    return ComparisonChain(tuple(rungs), tuple(comparisons), tuple(_layer_scores(traces)), len(checked), wrong)


def open_calibrated(manifest: Manifest) -> tuple[CalibratedCheckpoint | None, str]:
    """The calibrated checkpoint beside the export, or why there is none.

    Raises UserError when it was changed: the graph made of it would be blamed for the difference.
    """
    if not manifest.linears:
        return None, "the export quantizes no linear"
    if "calibrated" not in manifest.files:
        return None, "the export has no calibrated checkpoint beside it; export without --work-dir"
    try:
        calibrated = CalibratedCheckpoint(manifest.file("calibrated"))
    except UserError as error:
        return None, str(error)
    verify_file(manifest, "calibrated")
    return calibrated, ""


def _torch_rungs(
    job: ComparisonJob,
    blocks: ModelBlocks,
    calibrated: CalibratedCheckpoint | None,
    traces: Traces,
    progress: Callable[[float], None],
) -> Iterator[ModelRun]:
    source, number = job.checkpoint.source, record_traces(job.samples)
    total, done = blocks.num_blocks() * (1 if calibrated is None else 2), itertools.count(1)

    def watch(step: Step, outputs: dict[str, np.ndarray]) -> Step:
        def record(prefix: str, batches: Sequence[torch.Tensor]) -> None:
            progress(next(done) / total)
            if prefix.startswith("language_model."):
                outputs[prefix] = batches[number].flatten(0, -2).numpy()
            elif batches:  # none without pictures; the probed sample has the first ones
                outputs[prefix] = batches[0][: len(job.samples[number].pixel_values)].flatten(0, -2).numpy()

        return record_outputs(step, record)

    yield ModelRun(FLOAT, _walk(job, blocks, source, watch(float_step(source), traces[FLOAT])))
    if calibrated is not None:
        float_type = job.manifest.float_type
        rounded = DequantizedSource(calibrated, float_type)
        step = watch(fake_quantized_step(calibrated, rounded), traces[FAKE_QUANT])
        yield ModelRun(FAKE_QUANT, _walk(job, round_rotary_tables(blocks, float_type), rounded, step))


def record_traces(samples: Sequence[Sample]) -> int:
    """The number of the sample whose block outputs are looked at: the first with a picture."""
    return next((number for number, sample in enumerate(samples) if len(sample.pixel_values)), 0)


def _walk(job: ComparisonJob, blocks: ModelBlocks, source: TensorSource, step: Step) -> Callable[[int], np.ndarray]:
    features = run_vision_blocks(blocks, source, job.samples, step)
    hidden = run_decoder_blocks(blocks, source, job.samples, features, step)
    head = load_head(source, job.checkpoint.config.text.rms_norm_eps)
    return lambda number: head.logits(hidden[number][0]).numpy()


def graph_obstacle(manifest: Manifest) -> str:
    """Why the graphs cannot run here; empty when they can."""
    if find_spec("onnxruntime") is None:
        return "ONNX Runtime is not installed; run: pip install 'qvlm-export[cpu]'"
    try:
        for role in ("vision_onnx", "vision_data", "language_onnx", "language_data"):
            manifest.file(role)
    except UserError as error:
        return str(error)
    return ""


def engine_obstacle(manifest: Manifest) -> str:
    """Why the engines cannot run here; empty when they can."""
    runtime, reason = choose_runtime(manifest, "auto")
    return reason if runtime == "onnxruntime" else ""


def _graph_rung(manifest: Manifest, samples: Sequence[Sample], stack: ExitStack) -> tuple[ModelRun, Session | None]:
    if reason := graph_obstacle(manifest):
        return ModelRun(GRAPH, None, reason), None
    session = stack.enter_context(open_session(manifest, "onnxruntime:cpu"))

    def logits(number: int) -> np.ndarray:
        sample = samples[number]
        pixels = sample.pixel_values if len(sample.pixel_values) else None
        found: np.ndarray = session.logits(sample.input_ids[None], pixels, sample.placement)[0]
        return found

    return ModelRun(GRAPH, logits), session


def _engine_rung(manifest: Manifest, samples: Sequence[Sample], stack: ExitStack) -> ModelRun:
    if reason := engine_obstacle(manifest):
        return ModelRun(ENGINE, None, reason)
    for role in sorted({"vision_plan", "language_plan"} & set(manifest.files)):
        verify_file(manifest, role)  # a changed plan is refused; what else keeps it from running is a reason
    try:
        pair = stack.enter_context(RunnerPair(manifest, engine_runners(manifest)))
    except UserError as error:  # built for other GPUs, or for another version
        return ModelRun(ENGINE, None, str(error))
    return ModelRun(ENGINE, lambda number: pair.logits(samples[number]))


def _compare(job: ComparisonJob, rungs: Sequence[ModelRun], progress: Callable[[float], None]) -> list[Comparison]:
    """Every rung that runs against the checkpoint and against the rung below it, sample by sample."""
    sums: dict[tuple[str, str], dict[str, Sums]] = {}
    for number, sample in enumerate(job.samples):
        groups = token_groups(sample, job.manifest.config.image_token_id)
        seen: list[tuple[str, np.ndarray]] = []
        for rung in rungs:
            if rung.logits is None:
                continue
            logits = rung.logits(number)
            for name, lower in dict([*seen[:1], *seen[-1:]]).items():
                group_sums = sums.setdefault((rung.name, name), dict.fromkeys(GROUPS, Sums()))
                for group, mask in groups.items():
                    group_sums[group] += measure(lower[mask], logits[mask])
            seen = [*seen[:1], (rung.name, logits)]
        progress((number + 1) / len(job.samples))
    return [Comparison(rung, against, groups) for (rung, against), groups in sums.items()]


def _wrong_weights(manifest: Manifest, calibrated: CalibratedCheckpoint) -> Iterator[WrongWeight]:
    language = [name for name in calibrated.schemes if name.startswith("language_model.")]
    vision = [name for name in calibrated.schemes if not name.startswith("language_model.")]
    yield from wrong_weights(manifest.file("vision_onnx"), calibrated, vision)
    yield from wrong_weights(manifest.file("language_onnx"), calibrated, language)


def _graph_blocks(job: ComparisonJob, blocks: ModelBlocks, session: Session) -> dict[str, np.ndarray]:
    sample, embeds = job.samples[record_traces(job.samples)], no_image(job.manifest)
    feeds = {}
    if len(sample.pixel_values):
        feeds["vision"] = vision_feed(sample)
        embeds = embed_tiles(session.runner, job.manifest, sample.pixel_values)
    feeds["language"] = {
        **language_feed(job.manifest, sample, embeds),
        "image_embeds": place_features(embeds, sample.placement),
    }
    last = {b.prefix: b.linear_names()[-1] for b in blocks.all()}
    outputs = run_blocks(job.manifest, last, feeds)
    return {block: output.reshape(-1, output.shape[-1]) for block, output in outputs.items()}


def _layer_scores(traces: Traces) -> Iterator[LayerScore]:
    for block, fake in traces[FAKE_QUANT].items():
        graph = traces[GRAPH].get(block)
        yield LayerScore(block, sqnr_db(traces[FLOAT][block], fake), None if graph is None else sqnr_db(fake, graph))
