"""Preparation of an export: from the command line's options to everything that is decided and checked before any work.

Only headers and small files are read: weights are neither loaded nor written. `--dry-run` stops here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from qvlm_export.calibrate.blockwise.blocks import ModelBlocks, make_blocks
from qvlm_export.calibrate.blockwise.job import find_linear_needing_images
from qvlm_export.calibrate.calibrators.block_cost import Cost
from qvlm_export.calibrate.calibrators.cost import (
    activation_cache_bytes,
    estimate_accuracy_cost,
    estimate_calibration_cost,
    sensitivity_bytes,
)
from qvlm_export.calibrate.calibrators.efforts import DEFAULT_EFFORT, EFFORTS, EffortConfig
from qvlm_export.calibrate.checkpoint.prefix import cut_prefix
from qvlm_export.calibrate.checkpoint.samples import Sample
from qvlm_export.calibrate.checkpoint.scheme import BFLOAT16, FLOAT16, LinearScheme
from qvlm_export.calibrate.errors import UserError
from qvlm_export.calibrate.quantization.activation_range import RANGE_SAMPLES
from qvlm_export.checkpoints.checkpoint import Checkpoint, open_checkpoint
from qvlm_export.checkpoints.files.aliases import TINY
from qvlm_export.checkpoints.files.download import remaining_bytes
from qvlm_export.checkpoints.files.headers import find_downloads
from qvlm_export.engines.backend import Backend, choose_backend
from qvlm_export.engines.config import Limits, ModelConfig
from qvlm_export.engines.graph.float_graphs import expected_shapes
from qvlm_export.engines.graph.weight_sizes import Sizes, estimate_sizes
from qvlm_export.inference.torch_runner import check_device
from qvlm_export.inputs.prefix import AUTO, choose_prefix, parse_prefix
from qvlm_export.inputs.samples import Entry, check_processor, check_saved_processor, encode_entries, load_processor
from qvlm_export.pipeline.preparation.calibration_set import (
    EMPTY,
    CalibrationSet,
    choose_calibration_set,
    hold_out,
    read_calibration_file,
    require_pictures,
)
from qvlm_export.pipeline.preparation.estimate import (
    Estimate,
    activation_memory_bytes,
    build_memory,
    check_gpu_memory,
    check_memory,
    estimate,
    largest_bytes,
    measure_build_rate,
    memory_needed,
    total_sizes,
)
from qvlm_export.pipeline.preparation.machine import measure_machine
from qvlm_export.pipeline.preparation.preflight import check_disk, check_out, check_work_dir, disk_needed
from qvlm_export.pipeline.preparation.recipe import (
    Recipe,
    assign_schemes,
    check_engine_schemes,
    choose_recipe,
    runs_weight_only_int8,
)
from qvlm_export.pipeline.preparation.writing import add_writing, count_writing, installed_memory, writing_memory

PARTS = ("vision", "language")
DEFAULT_MAX_LENGTH = 2048
TEXT_LENGTH = 1024  # tokens that the default length leaves beside the largest image, where images are cut into tiles
DTYPES = (FLOAT16, BFLOAT16)
MAX_MEMORY_GIB, MAX_BATCH = 2**20, 2**16  # beyond any machine


@dataclass(frozen=True)
class ExportOptions:
    """The options of `qvlm-export`, under the names of the command line.

    None stands for a default that depends on the model or on the data. revision: of a model on the Hub. memory: in GiB.
    device: where calibration computes. dtype: float type of the graphs. prefix: how many of the tokens that all prompts
    begin with are computed once, "auto" for all of them. strict: whether linears keep their scheme
    even where 8 bits cannot hold their input. overwrite: whether files that this export did not write may be
    replaced.
    """

    model: str
    out: Path
    revision: str | None = None
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
    memory: float | None = None
    device: str = "cpu"
    dtype: str = FLOAT16
    prefix: str = AUTO
    strict: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class PreparedExport:
    """Everything that is decided and counted before work begins; `--dry-run` shows it.

    processor: the processor of transformers. linears: the quantized linears with their schemes. sizes: of the weights, by
    part. disk_bytes: the most that is on disk at a time, without the Hub's cache. download_bytes: of weights that the cache
    lacks. prefix: the tokens that all prompts begin with, which are not quantized; empty for none. samples: the calibration
    set, behind the prefix; empty when no linear is quantized. range_samples: a few whole ones to run before all else, to see
    whether activations leave float16's range; empty for a checkpoint in float16, and for other graphs. cost: of calibration.
    activations_bytes: how many bytes of a block's inputs, and of its outputs, the activation cache may hold in memory.
    strict: whether all linears keep their schemes, because of `--strict` or of a target that has no W8A16. checked_samples:
    on which the calibrated model is compared with the float model; held out from `samples` where there are enough.
    calibration_set: what the samples are made of; empty when no linear is quantized.
    """

    options: ExportOptions
    checkpoint: Checkpoint
    processor: Any
    backend: Backend
    recipe: Recipe
    limits: Limits
    blocks: ModelBlocks
    linears: Mapping[str, LinearScheme]
    sizes: Mapping[str, Sizes]
    disk_bytes: int
    download_bytes: int
    samples: tuple[Sample, ...]
    cost: Cost
    activations_bytes: int
    device: str
    strict: bool = False
    checked_samples: tuple[Sample, ...] = ()
    prefix: tuple[int, ...] = ()
    range_samples: tuple[Sample, ...] = ()
    calibration_set: CalibrationSet = EMPTY


def prepare_export(options: ExportOptions) -> PreparedExport:
    """Opens the checkpoint's headers, assigns schemes, encodes the calibration set, and checks all that can be checked.

    Writes nothing. Raises UserError when an option, the checkpoint, the calibration set or this machine is unsuitable.
    """
    _check_options(options)
    device = check_device(options.device)
    recipe = choose_recipe(options.scheme, options.recipe, options.backend)
    backend = choose_backend(options.backend, options.targets)
    checkpoint = open_checkpoint(options.model, options.revision)
    limits = _choose_limits(options, checkpoint)
    blocks = make_blocks(checkpoint.hf_config)
    shapes = expected_shapes(checkpoint.config)
    linears = _assign_linears(options, recipe, {name: shapes[f"{name}.weight"] for name in blocks.quantizable()})
    check_engine_schemes(linears, backend, options.dtype)
    sizes = {part: estimate_sizes(select_part(shapes, part), linears) for part in PARTS}
    processor = _load_checked_processor(checkpoint)
    config, builds = EFFORTS[options.effort].config, backend.module is not None
    chosen = _choose_set(options, checkpoint, sizes, limits, device) if linears else EMPTY
    encoded = _encode_set(options, checkpoint, processor, limits, chosen)
    samples = encoded.samples
    require_pictures(options.calib_data, samples, find_linear_needing_images(blocks, linears, searched=config is not None))
    cost = _estimate_cost(blocks, linears, samples, encoded.checked_samples, config)
    disk = disk_needed(
        total_sizes(sizes),
        calibrates=bool(linears),
        builds=builds,
        activations_bytes=activation_cache_bytes(blocks, samples, config),
        sensitivity_bytes=sensitivity_bytes(blocks, samples, config),
        dense_bytes=max(0, 2 * sizes["vision"].float16_bytes - sizes["vision"].quantized_bytes),
    )
    downloads = find_downloads(checkpoint.source)
    download_bytes = remaining_bytes(downloads)
    check_disk(disk, options.out, options.work_dir, checkpoint.folder if downloads else None, download_bytes)
    on_host = cost if device == "cpu" else Cost()
    largest = largest_bytes(checkpoint.config)
    if device == "cuda":
        check_gpu_memory(cost.memory_bytes)
    check_memory(memory_needed(on_host, largest), build_memory(sizes) if builds else 0)
    return PreparedExport(
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
        download_bytes=download_bytes,
        cost=cost,
        activations_bytes=activation_memory_bytes(options.memory, options.effort, on_host, largest),
        device=device,
        strict=options.strict or not all(map(runs_weight_only_int8, backend.targets)),
        calibration_set=chosen,
        **vars(encoded),
    )


def _check_options(options: ExportOptions) -> None:
    """Raises UserError for an option that can be refused without looking at the model."""
    check_out(options.out, options.overwrite)
    if options.work_dir is not None:
        check_work_dir(options.work_dir, options.out, options.overwrite)
    if options.memory is not None and not 0 <= options.memory <= MAX_MEMORY_GIB:
        raise UserError(f"--memory {options.memory:g}: must be a number of GiB that a machine can have")
    if options.max_batch > MAX_BATCH:
        raise UserError(f"--max-batch {options.max_batch}: must be at most {MAX_BATCH}")
    for name, count in (("--max-batch", options.max_batch), ("--samples", options.samples)):
        if count is not None and count < 1:
            raise UserError(f"{name} {count}: must be at least 1")
    parse_prefix(options.prefix)
    if options.dtype not in DTYPES:
        raise UserError(f"--dtype {options.dtype}: unknown; choose one of {', '.join(DTYPES)}")
    if options.effort not in EFFORTS:
        raise UserError(f"--effort {options.effort}: unknown; choose one of {', '.join(EFFORTS)}")


def estimate_export(prepared: PreparedExport) -> Estimate:
    """Returns the expected time and memory of the export, after measuring the speed of this machine for a few seconds."""
    files, download_bytes = prepared.checkpoint.source.files(), prepared.download_bytes
    machine = measure_machine(prepared.options.out.parent, files, prepared.device, download_bytes)
    machine = replace(machine, built_bytes=measure_build_rate(prepared.backend, prepared.sizes))
    builds, largest = prepared.backend.module is not None, largest_bytes(prepared.checkpoint.config)
    found = estimate(prepared.cost, prepared.linears, prepared.sizes, largest, machine, builds=builds)
    drafts, float16 = prepared.calibration_set.drafts, total_sizes(prepared.sizes).float16_bytes
    if not drafts:
        return found
    config, entries = prepared.checkpoint.config, list(prepared.calibration_set.entries)
    samples = encode_entries(entries, prepared.processor, config, prepared.limits.max_length)
    writing = count_writing(prepared.blocks, config, drafts, samples, float16)
    return add_writing(found, writing, machine, writing_memory(config, float16, prepared.device))


def _assign_linears(options: ExportOptions, recipe: Recipe, shapes: dict[str, tuple[int, ...]]) -> dict[str, LinearScheme]:
    schemes = assign_schemes(recipe, shapes)
    return {name: replace(scheme, float_type=options.dtype) for name, scheme in schemes.items()}


def _estimate_cost(
    blocks: ModelBlocks,
    linears: Mapping[str, LinearScheme],
    samples: Sequence[Sample],
    checked: Sequence[Sample],
    config: EffortConfig,
) -> Cost:
    """Returns the cost of calibration and of the comparison with the float model; that of nothing where all stays float."""
    if not linears:
        return Cost()
    return estimate_calibration_cost(blocks, linears, samples, config) + estimate_accuracy_cost(blocks, checked)


def _load_checked_processor(checkpoint: Checkpoint) -> Any:
    processor = load_processor(checkpoint.folder)
    check_processor(processor, checkpoint.config, checkpoint.folder)
    check_saved_processor(processor, checkpoint.config, checkpoint.folder)
    return processor


@dataclass(frozen=True)
class _EncodedSet:
    """What a calibration set becomes: these fields of `PreparedExport`."""

    samples: tuple[Sample, ...]
    checked_samples: tuple[Sample, ...]
    prefix: tuple[int, ...]
    range_samples: tuple[Sample, ...]


def use_entries(prepared: PreparedExport, entries: Sequence[Entry]) -> PreparedExport:
    """Returns the export with these entries as its calibration set, once they are written."""
    chosen = replace(prepared.calibration_set, entries=tuple(entries))
    encoded = _encode_set(prepared.options, prepared.checkpoint, prepared.processor, prepared.limits, chosen)
    return replace(prepared, calibration_set=chosen, **vars(encoded))


def _choose_set(
    options: ExportOptions, checkpoint: Checkpoint, sizes: Mapping[str, Sizes], limits: Limits, device: str
) -> CalibrationSet:
    needed, memory = writing_memory(checkpoint.config, total_sizes(sizes).float16_bytes, device), installed_memory(device)
    if options.memory is not None and device == "cpu":
        memory = min(memory, int(options.memory * 2**30))
    searched = EFFORTS[options.effort].config is not None and options.model != TINY  # which was trained on the scenes
    return choose_calibration_set(
        options.calib_data,
        options.samples,
        searched=searched,
        needed_bytes=needed,
        memory_bytes=memory,
        length=limits.max_length,
        image_tokens=checkpoint.config.most_image_tokens,
    )


def _encode_set(
    options: ExportOptions, checkpoint: Checkpoint, processor: Any, limits: Limits, chosen: CalibrationSet
) -> _EncodedSet:
    """Encodes the entries, and divides them by what they are for."""
    whole = tuple(encode_entries(list(chosen.entries), processor, checkpoint.config, limits.max_length))
    prefix = choose_prefix(options.prefix, processor, checkpoint.config, whole) if whole else ()
    samples, checked = hold_out(cut_prefix(whole, prefix))
    return _EncodedSet(samples, checked, prefix, _select_range_samples(options, checkpoint, whole, processor, limits))


def _select_range_samples(
    options: ExportOptions, checkpoint: Checkpoint, samples: tuple[Sample, ...], processor: Any, limits: Limits
) -> tuple[Sample, ...]:
    """Returns the samples to measure activation ranges on, those with images first; none where nothing can overflow.

    A checkpoint in float16 was trained or tried in it, so that its activations are in range. samples: empty when no linear
    is quantized.
    """
    source = checkpoint.source
    in_float16 = all(source.dtype(name) == np.float16 for name in expected_shapes(checkpoint.config) if name in source)
    if in_float16 or (options.dtype != FLOAT16 and samples):  # calibration refuses what is not finite itself
        return ()
    entries = [] if samples else read_calibration_file(options.calib_data)
    found = samples or encode_entries(entries, processor, checkpoint.config, limits.max_length)
    return tuple(sorted(found, key=lambda sample: len(sample.pixel_values) == 0)[:RANGE_SAMPLES])


def _choose_limits(options: ExportOptions, checkpoint: Checkpoint) -> Limits:
    """Returns the largest inputs that the engines take.

    Raises UserError when `--max-length` leaves no token beside an image, or exceeds the positions of the model.
    """
    longest = checkpoint.config.text.max_position_embeddings
    config = checkpoint.config
    usual = max(DEFAULT_MAX_LENGTH, config.most_image_tokens + TEXT_LENGTH) if config.tiles else DEFAULT_MAX_LENGTH
    max_length = options.max_length or min(usual, longest)
    if not checkpoint.config.vision.tokens_per_image < max_length <= longest:
        raise UserError(
            f"--max-length {max_length}: this model takes {checkpoint.config.vision.tokens_per_image + 1} (one image and a "
            f"token) to {longest} tokens"
        )
    if config.tiles is not None:  # the session runs the vision engine as often as the tiles of all images require
        return Limits(max_length, options.max_batch, config.most_tiles)
    images = max(options.max_batch, (max_length - 1) // checkpoint.config.vision.tokens_per_image)
    return Limits(max_length, options.max_batch, min(images, 4 * options.max_batch))


def float16_bytes(config: ModelConfig) -> dict[str, int]:
    """Returns the bytes of the weights by part if all were float16, which compression is measured against."""
    shapes = expected_shapes(config)
    return {part: estimate_sizes(select_part(shapes, part), {}).float16_bytes for part in PARTS}


def select_part(names: Mapping[str, Any], part: str) -> dict[str, Any]:
    """Returns the entries whose tensor or linear belongs to `part`; the projector belongs to "vision"."""
    return {n: v for n, v in names.items() if n.startswith("language_model.") == (part == "language")}
