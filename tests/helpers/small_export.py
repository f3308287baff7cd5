"""The stages of an export on a small checkpoint as separate functions, for the tests of single modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from torch import nn
from transformers import LlavaForConditionalGeneration

from qvlm_export.calibrate.blockwise.blocks import make_blocks
from qvlm_export.calibrate.blockwise.job import CalibrationJob, Progress
from qvlm_export.calibrate.calibrators.rtn import calibrate_rtn
from qvlm_export.calibrate.calibrators.search import calibrate_search
from qvlm_export.calibrate.checkpoint.calibrated import CalibratedCheckpoint, CalibratedWriter
from qvlm_export.calibrate.checkpoint.samples import Sample
from qvlm_export.calibrate.checkpoint.scheme import LinearScheme
from qvlm_export.calibrate.quantization.config import FULL
from qvlm_export.checkpoints.checkpoint import Checkpoint, open_checkpoint
from qvlm_export.engines.config import Limits
from qvlm_export.engines.graph.float_graphs import expected_shapes, fill_weights, language_graph, vision_graph
from qvlm_export.engines.graph.qdq import insert_qdq, transpose_float_weights
from qvlm_export.engines.graph.write import write_graph
from qvlm_export.pipeline.preparation.recipe import assign_schemes, recipe_of_preset

LIMITS = Limits(max_length=128, max_batch=2, max_images=2)
PARTS = ("vision", "language")
Calibrator = Callable[[CalibrationJob, CalibratedWriter, Progress], dict[str, Any]]


def make_sample(checkpoint: Checkpoint, *, words: int, images: int, seed: int) -> Sample:
    """A sample of random text and images: `words` text tokens, with the tokens of all images after the first of them."""
    rng = np.random.default_rng(seed)
    config = checkpoint.config
    text = rng.integers(5, config.text.vocab_size, words)
    image_tokens = np.full(images * config.vision.tokens_per_image, config.image_token_id)
    ids = np.concatenate([text[:1], image_tokens, text[1:]]).astype(np.int64)
    side = config.vision.image_size if images else 1
    return Sample(ids, rng.standard_normal((images, 3, side, side)).astype(np.float32), len(ids))


def mixed_samples(checkpoint: Checkpoint) -> list[Sample]:
    """Samples of different lengths with no, one and two images."""
    return [
        make_sample(checkpoint, words=words, images=images, seed=seed)
        for seed, (words, images) in enumerate([(9, 1), (5, 0), (17, 2), (12, 1)])
    ]


def schemes_of(checkpoint: Checkpoint, preset: str) -> dict[str, LinearScheme]:
    """The scheme of each linear under `--scheme preset`."""
    shapes = expected_shapes(checkpoint.config)
    names = make_blocks(checkpoint.hf_config).quantizable()
    return assign_schemes(recipe_of_preset(preset), {name: shapes[f"{name}.weight"] for name in names})


def briefly_full(job: CalibrationJob, writer: CalibratedWriter, progress: Progress) -> dict[str, Any]:
    """Calibrates with every step of `--effort full`, but with fewer prompts and iterations."""
    brief = replace(FULL, questions_per_image=2, random_word_prompts=1)
    return calibrate_search(job, writer, progress, brief)


def calibrate(
    checkpoint: Checkpoint,
    schemes: Mapping[str, LinearScheme],
    folder: Path,
    samples: Sequence[Sample] | None = None,
    calibrator: Calibrator = calibrate_rtn,
) -> CalibratedCheckpoint:
    """Runs the calibrator on `samples`, by default on `mixed_samples`; returns the calibrated checkpoint in `folder`."""
    writer = CalibratedWriter(folder)
    calibration_set = mixed_samples(checkpoint) if samples is None else samples
    job = CalibrationJob(make_blocks(checkpoint.hf_config), checkpoint.source, schemes, calibration_set, strict=True)
    writer.finish(checkpoint.config_json, calibrator(job, writer, lambda *_: None))
    return CalibratedCheckpoint(folder)


def module_of(model: LlavaForConditionalGeneration, name: str) -> nn.Module:
    """The module with a canonical name, which the installed transformers may name otherwise."""
    inner = name.replace("language_model.model.", "language_model.").replace("vision_tower.vision_model.", "vision_tower.")
    return model.model.get_submodule(inner)


def of_part(schemes: Mapping[str, LinearScheme], part: str) -> dict[str, LinearScheme]:
    """The schemes of the linears in the graph `part`."""
    return {name: scheme for name, scheme in schemes.items() if name.startswith("language_model.") == (part == "language")}


def make_graph(checkpoint: Checkpoint, part: str, dtype: ir.DataType) -> ir.Model:
    """The float graph of `part` without weights."""
    if part == "vision":
        return vision_graph(checkpoint.config, dtype)
    return language_graph(checkpoint.config, LIMITS, dtype)


def quantized_graph(checkpoint: Checkpoint, calibrated: CalibratedCheckpoint, part: str, dtype: ir.DataType) -> ir.Model:
    """The graph of `part` with Q/DQ and weights, as an export writes it."""
    model = make_graph(checkpoint, part, dtype)
    insert_qdq(model, of_part(calibrated.schemes, part), calibrated, dtype)
    fill_weights(model, calibrated.floats)
    transpose_float_weights(model)
    return model


def write_quantized(
    checkpoint: Checkpoint, calibrated: CalibratedCheckpoint, part: str, dtype: ir.DataType, folder: Path
) -> Path:
    """Writes the quantized graph of `part` and its data; returns the ONNX file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{part}.onnx"
    write_graph(quantized_graph(checkpoint, calibrated, part, dtype), path, lambda _: None)
    return path


def open_small(folder: Path) -> Checkpoint:
    """Opens a checkpoint in a folder, such as one of the `llava` fixture."""
    return open_checkpoint(str(folder))


def own_prompts(job: CalibrationJob) -> list[list[Sample]]:
    """Prompts in which every sample has its own question only."""
    return [[sample] for sample in job.samples]
