"""What an export will do, decided and checked before any work: `--dry-run` stops here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qvlm_export.calibrate.blockwise.blocks import ModelBlocks, make_blocks
from qvlm_export.calibrate.blockwise.job import find_linear_needing_images
from qvlm_export.calibrate.calibrators.cost import Cost, activation_cache_bytes, estimate_calibration_cost, sensitivity_bytes
from qvlm_export.calibrate.calibrators.efforts import DEFAULT_EFFORT, EFFORTS
from qvlm_export.calibrate.checkpoint.samples import Sample
from qvlm_export.calibrate.checkpoint.scheme import LinearScheme
from qvlm_export.calibrate.errors import UserError
from qvlm_export.checkpoints.checkpoint import Checkpoint, open_checkpoint
from qvlm_export.engines.backend import Backend, choose_backend
from qvlm_export.engines.config import Limits, ModelConfig
from qvlm_export.engines.graph.float_graphs import expected_shapes
from qvlm_export.engines.graph.weight_sizes import Sizes, estimate_sizes
from qvlm_export.inference.torch_runner import check_device
from qvlm_export.inputs.samples import check_processor, default_calibration, encode_entries, load_processor, read_entries
from qvlm_export.pipeline.planning.estimate import (
    Estimate,
    activations_bytes,
    build_bytes,
    build_memory,
    check_gpu_memory,
    check_memory,
    estimate,
    largest_bytes,
    memory_needed,
    total_sizes,
)
from qvlm_export.pipeline.planning.machine import measure_machine
from qvlm_export.pipeline.planning.preflight import check_disk, check_out, check_work_dir, disk_needed
from qvlm_export.pipeline.planning.recipe import Recipe, check_engine_schemes, choose_recipe, plan_linears

PARTS = ("vision", "language")
DEFAULT_MAX_LENGTH = 2048
TEXT_LENGTH = 1024  # beside the largest picture, where pictures are cut into tiles
MAX_SAMPLES = 128  # used when --samples does not say


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
    device: str = "cpu"  # that calibration computes on


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
    device: str


def plan_export(options: ExportOptions) -> ExportPlan:
    """The preflight: opens headers, decides schemes, checks everything that can be checked. Writes nothing."""
    _check_options(options)
    device = check_device(options.device)
    recipe = choose_recipe(options.scheme, options.recipe, options.backend)
    backend = choose_backend(options.backend, options.targets)
    checkpoint = open_checkpoint(options.model)
    limits = _limits(options, checkpoint)
    blocks = make_blocks(checkpoint.hf_config)
    shapes = expected_shapes(checkpoint.config)
    linears = plan_linears(recipe, {name: shapes[f"{name}.weight"] for name in blocks.quantizable()})
    check_engine_schemes(linears, backend)
    sizes = {part: estimate_sizes(of_part(shapes, part), linears) for part in PARTS}
    processor = load_processor(checkpoint.folder)
    check_processor(processor, checkpoint.config, checkpoint.folder)
    samples = _samples(options, checkpoint, processor, limits) if linears else ()
    method, builds = EFFORTS[options.effort].config, backend.module is not None
    if samples and not any(len(sample.pixel_values) for sample in samples):
        _check_text_only(options, find_linear_needing_images(blocks, linears, searched=method is not None))
    cost = estimate_calibration_cost(blocks, linears, samples, method) if linears else Cost()
    disk = disk_needed(
        total_sizes(sizes),
        calibrates=bool(linears),
        builds=builds,
        kept_bytes=activation_cache_bytes(blocks, samples, method),
        measured_bytes=sensitivity_bytes(blocks, samples, method),
    )
    check_disk(disk, options.out, options.work_dir)
    on_host = cost if device == "cpu" else Cost()
    largest = largest_bytes(checkpoint.config)
    if device == "cuda":
        check_gpu_memory(cost.memory_bytes)
    check_memory(memory_needed(on_host, largest), build_memory(sizes) if builds else 0)
    return ExportPlan(
        options=options,
        checkpoint=checkpoint,
        processor=processor,
        backend=backend,
        recipe=recipe,
        limits=limits,
        blocks=blocks,
        linears=linears,
        sizes=sizes,
        disk_bytes=disk.bytes,
        samples=samples,
        cost=cost,
        activations_bytes=activations_bytes(options.memory, options.effort, on_host, largest),
        device=device,
    )


def _check_options(options: ExportOptions) -> None:
    """What needs no model."""
    check_out(options.out)
    if options.work_dir is not None:
        check_work_dir(options.work_dir)
    for name, count in (("--max-batch", options.max_batch), ("--samples", options.samples)):
        if count is not None and count < 1:
            raise UserError(f"{name} {count}: must be at least 1")
    if options.effort not in EFFORTS:
        raise UserError(f"--effort {options.effort}: unknown; choose one of {', '.join(EFFORTS)}")


def estimate_export(plan: ExportPlan) -> Estimate:
    """Seconds and memory, from what is to be done and a short measurement of this machine."""
    machine = measure_machine(plan.options.out.parent, plan.checkpoint.source.files(), plan.device)
    machine = replace(machine, built_bytes=build_bytes(plan.backend, plan.sizes))
    builds, largest = plan.backend.module is not None, largest_bytes(plan.checkpoint.config)
    return estimate(plan.cost, plan.linears, plan.sizes, largest, machine, builds=builds)


def _samples(options: ExportOptions, checkpoint: Checkpoint, processor: Any, limits: Limits) -> tuple[Sample, ...]:
    entries = read_entries(options.calib_data or default_calibration(), options.samples, MAX_SAMPLES)
    return tuple(encode_entries(entries, processor, checkpoint.config, limits.max_length))


def _check_text_only(options: ExportOptions, asking: str | None) -> None:
    """asking: a linear that samples without pictures cannot calibrate."""
    if asking is not None:
        raise UserError(
            f"--calib-data {options.calib_data}: no sample has a picture, and how {asking} is quantized depends on them; "
            "add samples with pictures, or leave tower and projector float by --recipe"
        )


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
    return {part: estimate_sizes(of_part(shapes, part), {}).float16_bytes for part in PARTS}


def of_part(names: Mapping[str, Any], part: str) -> dict[str, Any]:
    return {n: v for n, v in names.items() if n.startswith("language_model.") == (part == "language")}
