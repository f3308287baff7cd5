"""Stepwise accuracy validation: the logits of one model in four forms are compared on the same samples.

float (the checkpoint in torch) -> fake-quant (the calibrated integers in torch) -> graph (Q/DQ on ONNX Runtime) -> engine
(TensorRT). Each form is compared with the float checkpoint and with the form before it, so that a loss of accuracy can be
attributed to the step that caused it. In torch the model streams through memory block by block; logits are computed for one
sample at a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.util import find_spec

import numpy as np
import torch

from qvlm_export.calibrate.blockwise.blocks import ModelBlocks, make_blocks
from qvlm_export.calibrate.blockwise.forward import Step, float_step, load_head, run_decoder_blocks, run_vision_blocks
from qvlm_export.calibrate.checkpoint.calibrated import CalibratedCheckpoint
from qvlm_export.calibrate.checkpoint.prefix import count_shared, cut_prefix
from qvlm_export.calibrate.checkpoint.samples import Sample, place_features
from qvlm_export.calibrate.checkpoint.scheme import FLOAT16
from qvlm_export.calibrate.checkpoint.tensor_source import TensorSource
from qvlm_export.calibrate.errors import UserError
from qvlm_export.calibrate.quantization.fake_quantized import (
    DequantizedSource,
    fake_quantized_step,
    record_outputs,
    round_rotary_tables,
)
from qvlm_export.checkpoints.checkpoint import Checkpoint
from qvlm_export.engines.backend import install_hint
from qvlm_export.engines.check.graph_weights import WrongWeight, run_blocks, wrong_weights
from qvlm_export.engines.check.metrics import Sums, measure, token_sqnr_db
from qvlm_export.engines.check.polygraphy import (
    RunnerPair,
    engine_runners,
    language_feed,
    make_empty_image_embeds,
    vision_feed,
)
from qvlm_export.engines.manifest import Manifest, open_prefix, verify_file
from qvlm_export.engines.runtime.open import choose_runtime, open_session
from qvlm_export.engines.runtime.session import Session, embed_tiles
from qvlm_export.inference.forms import ENGINE, FAKE_QUANT, FLOAT, GRAPH
from qvlm_export.pipeline.progress import Reporter
from qvlm_export.validation.accuracy import TOKEN_KINDS, Comparison, ComparisonChain, LayerScore, ModelRun, token_kind_masks
from qvlm_export.validation.reference import ReferenceInput, ReferenceRun, run_reference


@dataclass(frozen=True)
class ComparisonJob:
    """An export, its float checkpoint and the samples on which they are compared.

    per_layer: whether the outputs of every block of the graph are scored, too.
    """

    manifest: Manifest
    checkpoint: Checkpoint
    inputs: Sequence[ReferenceInput]
    per_layer: bool = False

    @property
    def samples(self) -> list[Sample]:
        """The samples as this package encodes them."""
        return [one.sample for one in self.inputs]


# Block outputs of the traced sample: form -> block -> float32 [tokens, width].
Traces = dict[str, dict[str, np.ndarray]]


def compare_forms(job: ComparisonJob, reporter: Reporter) -> ComparisonChain:
    """Runs every form that can run on this machine, and compares their logits, block outputs and weights.

    Raises UserError when no form but the float checkpoint can run.
    """
    blocks = make_blocks(job.checkpoint.hf_config)
    calibrated, reason = open_calibrated(job.manifest)
    obstacles = [reason, graph_obstacle(job.manifest), engine_obstacle(job.manifest)]
    if all(obstacles):
        raise UserError(f"{job.manifest.path}: nothing can be compared here: {'; '.join(obstacles)}")
    traces: Traces = {FLOAT: {}, FAKE_QUANT: {}, GRAPH: {}}
    with ExitStack() as stack:
        with reporter.stage("reference") as stage:
            reference = run_reference(job.checkpoint, job.inputs, find_traced_sample(job.samples), stage.fraction)
            forward_error = _measure_own_forward(job, blocks, reference)
        traces[FLOAT] |= {b.prefix: reference.blocks[b.prefix] for b in blocks.all() if b.prefix in reference.blocks}
        runs = [ModelRun(FLOAT, reference.logits)]
        if calibrated is None:
            runs.append(ModelRun(FAKE_QUANT, None, reason))
        else:
            with reporter.stage("fake-quant") as stage:
                runs.append(_run_fake_quant(job, blocks, calibrated, traces[FAKE_QUANT], stage.fraction))
        graph, session = _open_graph_run(job.manifest, job.samples, stack)
        runs = [*runs, graph, _open_engine_run(job.manifest, job.samples, stack)]
        with reporter.stage("compare") as stage:
            comparisons = _compare_runs(job, runs, stage.fraction)
        if job.per_layer and session is not None:
            traces[GRAPH] = _run_graph_blocks(job, blocks, session)
    schemes = {} if calibrated is None or session is None else calibrated.schemes
    differences = tuple(_find_wrong_weights(job.manifest, calibrated)) if calibrated is not None and schemes else ()
    largest = max(reference.largest.items(), key=lambda item: item[1]) if job.manifest.float_type == FLOAT16 else None
    layers = tuple(_score_layers(traces))
    return ComparisonChain(tuple(runs), tuple(comparisons), layers, len(schemes), differences, forward_error, largest)


def open_calibrated(manifest: Manifest) -> tuple[CalibratedCheckpoint | None, str]:
    """Opens the calibrated checkpoint beside the export; returns (None, reason) when there is none.

    Raises UserError when its files were changed since the export, as the difference would be attributed to the graph.
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


def _measure_own_forward(job: ComparisonJob, blocks: ModelBlocks, reference: ReferenceRun) -> float:
    """Returns the relative L2 error of the logits of this package's forward pass in float, on the longest sample.

    Calibration and the fake-quantized form rely on that forward pass, so it must be that of the model.
    """
    number = max(range(len(job.samples)), key=lambda n: len(job.samples[n].input_ids))
    source, expected = job.checkpoint.source, reference.logits(number)
    logits = _run_in_torch(job, [job.samples[number]], (blocks, source, float_step(source)))(0)
    return float(np.linalg.norm(logits - expected) / max(float(np.linalg.norm(expected)), 1e-30))


def _run_fake_quant(
    job: ComparisonJob,
    blocks: ModelBlocks,
    calibrated: CalibratedCheckpoint,
    outputs: dict[str, np.ndarray],
    progress: Callable[[float], None],
) -> ModelRun:
    """Runs the calibrated checkpoint; writes the outputs of all blocks on the traced sample to `outputs`.

    Logits and outputs in the decoder are those behind the prefix, as far as all samples share it.
    """
    text = job.manifest.config.text
    prefix = calibrated.read_prefix((text.num_layers, text.num_kv_heads, text.head_dim))
    shared = 0 if prefix is None else min(count_shared(prefix.token_ids, sample.input_ids) for sample in job.samples)
    prefix = None if prefix is None or not shared else prefix.first(shared)
    samples = job.samples if prefix is None else cut_prefix(job.samples, prefix.token_ids)
    traced, done = find_traced_sample(job.samples), itertools.count(1)

    def record(block: str, batches: Sequence[torch.Tensor]) -> None:
        progress(next(done) / blocks.num_blocks())
        if block.startswith("language_model."):
            outputs[block] = batches[traced].flatten(0, -2).numpy()
        elif batches:  # empty when no sample has an image; otherwise the traced sample has the first images
            outputs[block] = batches[0][: len(job.samples[traced].pixel_values)].flatten(0, -2).numpy()

    float_type = job.manifest.float_type
    dequantized = DequantizedSource(calibrated, float_type)
    step = record_outputs(fake_quantized_step(calibrated, dequantized), record)
    rounded = replace(round_rotary_tables(blocks, float_type), prefix=prefix)
    return ModelRun(FAKE_QUANT, _run_in_torch(job, samples, (rounded, dequantized, step)))


def find_traced_sample(samples: Sequence[Sample]) -> int:
    """Returns the index of the sample whose block outputs are recorded: the first that has an image, else 0."""
    return next((number for number, sample in enumerate(samples) if len(sample.pixel_values)), 0)


def _run_in_torch(
    job: ComparisonJob, samples: Sequence[Sample], model: tuple[ModelBlocks, TensorSource, Step]
) -> Callable[[int], np.ndarray]:
    """Runs samples through the model's blocks; returns a function: index of a sample -> logits, float32 [S, vocab]."""
    blocks, source, step = model
    features = run_vision_blocks(blocks, source, samples, step)
    hidden = run_decoder_blocks(blocks, source, samples, features, step)
    head = load_head(source, job.checkpoint.config.text.rms_norm_eps)
    return lambda number: head.logits(hidden[number][0]).numpy()


def graph_obstacle(manifest: Manifest) -> str:
    """Returns why the graphs cannot run on this machine; an empty string when they can."""
    if find_spec("onnxruntime") is None:
        return f"ONNX Runtime is not installed; run: {install_hint('cpu')}"
    try:
        for role in ("vision_onnx", "vision_data", "language_onnx", "language_data"):
            manifest.file(role)
    except UserError as error:
        return str(error)
    return ""


def engine_obstacle(manifest: Manifest) -> str:
    """Returns why the engines cannot run on this machine; an empty string when they can."""
    runtime, reason = choose_runtime(manifest, "auto")
    return reason if runtime == "onnxruntime" else ""


def _open_graph_run(manifest: Manifest, samples: Sequence[Sample], stack: ExitStack) -> tuple[ModelRun, Session | None]:
    """Opens the graphs on ONNX Runtime until `stack` is closed; the session is None when they cannot run."""
    if reason := graph_obstacle(manifest):
        return ModelRun(GRAPH, None, reason), None
    session = stack.enter_context(open_session(manifest, "onnxruntime:cpu"))

    def logits(number: int) -> np.ndarray:
        sample = samples[number]
        pixels = sample.pixel_values if len(sample.pixel_values) else None
        outputs: np.ndarray = session.logits(sample.input_ids[None], pixels, sample.placement, require_finite=False)[0]
        return outputs

    return ModelRun(GRAPH, logits), session


def _open_engine_run(manifest: Manifest, samples: Sequence[Sample], stack: ExitStack) -> ModelRun:
    """Opens the engines until `stack` is closed. Raises UserError when an engine file was changed since the export."""
    if reason := engine_obstacle(manifest):
        return ModelRun(ENGINE, None, reason)
    for role in sorted({"vision_plan", "language_plan"} & set(manifest.files)):
        verify_file(manifest, role)  # only a changed plan is an error; any other obstacle is reported as a reason
    try:
        pair = stack.enter_context(RunnerPair(manifest, engine_runners(manifest)))
    except UserError as error:  # the engine was built for another GPU or another version of TensorRT
        return ModelRun(ENGINE, None, str(error))
    return ModelRun(ENGINE, lambda number: pair.logits(samples[number]))


def _compare_runs(job: ComparisonJob, runs: Sequence[ModelRun], progress: Callable[[float], None]) -> list[Comparison]:
    """Compares every form that runs with the float checkpoint and with the form before it, sample by sample.

    Tokens of the export's prefix are left out: their logits are not computed in use, as their keys and values are known.
    """
    prefix = open_prefix(job.manifest)
    start = 0 if prefix is None else min(count_shared(prefix.token_ids, sample.input_ids) for sample in job.samples)
    sums: dict[tuple[str, str], dict[str, Sums]] = {}
    for number, sample in enumerate(job.samples):
        by_kind = {kind: m[start:] for kind, m in token_kind_masks(sample, job.manifest.config.image_token_id).items()}
        references: list[tuple[str, np.ndarray]] = []  # the first form and the previous one, with their logits
        for run in runs:
            if run.logits is None:
                continue
            logits = run.logits(number)[start - len(sample.input_ids) :]  # some forms give those of the prefix, too
            for name, reference in dict([*references[:1], *references[-1:]]).items():
                kind_sums = sums.setdefault((run.name, name), dict.fromkeys(TOKEN_KINDS, Sums()))
                for kind, mask in by_kind.items():
                    kind_sums[kind] += measure(reference[mask], logits[mask])
            references = [*references[:1], (run.name, logits)]
        progress((number + 1) / len(job.samples))
    return [Comparison(form, against, by_kind) for (form, against), by_kind in sums.items()]


def _find_wrong_weights(manifest: Manifest, calibrated: CalibratedCheckpoint) -> Iterator[WrongWeight]:
    language = [name for name in calibrated.schemes if name.startswith("language_model.")]
    vision = [name for name in calibrated.schemes if not name.startswith("language_model.")]
    yield from wrong_weights(manifest.file("vision_onnx"), calibrated, vision)
    yield from wrong_weights(manifest.file("language_onnx"), calibrated, language)


def _run_graph_blocks(job: ComparisonJob, blocks: ModelBlocks, session: Session) -> dict[str, np.ndarray]:
    """Returns the output of every block of the graph on the traced sample: block -> float32 [tokens, width]."""
    sample, embeds = job.samples[find_traced_sample(job.samples)], make_empty_image_embeds(job.manifest)
    feeds = {}
    if len(sample.pixel_values):
        feeds["vision"] = vision_feed(sample)
        embeds = embed_tiles(session.runner, job.manifest, sample.pixel_values)
    feeds["language"] = {
        **language_feed(job.manifest, sample, embeds),
        "image_embeds": place_features(embeds, sample.placement),
    }
    last_linears = {b.prefix: b.linear_names()[-1] for b in blocks.all()}
    outputs = run_blocks(job.manifest, last_linears, feeds)
    return {block: output.reshape(-1, output.shape[-1]) for block, output in outputs.items()}


def _score_layers(traces: Traces) -> Iterator[LayerScore]:
    for block, fake_quant in traces[FAKE_QUANT].items():
        graph = traces[GRAPH].get(block)
        graph_sqnr_db = None if graph is None else token_sqnr_db(fake_quant, graph)
        behind_prefix = traces[FLOAT][block][-len(fake_quant) :]
        yield LayerScore(block, token_sqnr_db(behind_prefix, fake_quant), graph_sqnr_db)
