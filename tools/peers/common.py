"""Code shared by the peers' programs: reads samples, defines the schemes, measures cost, writes the result of a cell.

It runs in the virtual environment of each peer, so it imports numpy, torch and transformers only, nothing of this project.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlavaForConditionalGeneration

EVALUATION_BATCH = 32
LOGITS, HIDDEN = "logits", "hidden"  # what a cell stores


@dataclass(frozen=True)
class Scheme:
    """A symmetric quantization scheme.

    Weights have a scale per `group_size` inputs, or per output channel if it is None; activations have one static scale per
    tensor, or stay float if `activation_bits` is None.
    """

    weight_bits: int
    activation_bits: int | None
    group_size: int | None


SCHEMES = {
    "W8A8": Scheme(8, 8, None),
    "W4A16": Scheme(4, None, 64),
    "W3A16": Scheme(3, None, 64),
    "W4A8": Scheme(4, 8, 64),
    "W6A6": Scheme(6, 6, None),
    "W4A4": Scheme(4, 4, 64),
}


@dataclass(frozen=True)
class Job:
    """One cell of the benchmark.

    out: the `.npy` file of logits or hidden states, as `states` says; the record is written to `.json` beside it.
    """

    model: Path
    calibration: Path
    evaluation: Path
    column: str
    row: str
    out: Path
    states: str = LOGITS

    @property
    def scheme(self) -> Scheme:
        """The scheme of the cell's column."""
        return SCHEMES[self.column]


@dataclass
class Measured:
    """Cost of the code in a `with measured()` block, set when it ends.

    seconds: processor seconds; other work on the same core lengthens them. settings: of the method, for the record.
    """

    seconds: float = 0.0
    wall_seconds: float = 0.0
    peak_bytes: int = 0
    settings: dict[str, Any] = field(default_factory=dict)


def parse_job(description: str) -> Job:
    """The job that the command line describes."""
    parser = argparse.ArgumentParser(description=description)
    for name in ("model", "calibration", "evaluation", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--column", choices=SCHEMES, required=True)
    parser.add_argument("--row", required=True)
    parser.add_argument("--states", choices=(LOGITS, HIDDEN), default=LOGITS, help="what is stored of every sample")
    return Job(**vars(parser.parse_args()))


def load_model(folder: Path) -> LlavaForConditionalGeneration:
    """The checkpoint in float32."""
    return LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)


def quantizable(model: LlavaForConditionalGeneration) -> list[str]:
    """Names of the linears to quantize: all that the model uses, without lm_head."""
    vision = model.config.vision_config
    used_layers = model.config.vision_feature_layer % (vision.num_hidden_layers + 1)
    names = []
    for name, module in model.named_modules():
        layer = re.search(r"vision_tower.*\.layers\.(\d+)\.", name)
        unused = layer is not None and int(layer[1]) >= used_layers
        if isinstance(module, torch.nn.Linear) and not unused and not name.endswith("lm_head"):
            names.append(name)
    return names


def inputs_of(path: Path) -> list[dict[str, torch.Tensor]]:
    """Keyword arguments of the model's forward for each sample: batch 1, without padding."""
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    ids, offsets = torch.from_numpy(arrays["input_ids"]), arrays["offsets"]
    pixels = torch.from_numpy(arrays["pixel_values"])
    has_image = arrays.get("has_image", np.ones(len(offsets) - 1, bool))  # only files with texts alone have this array
    return [
        {
            "input_ids": ids[first:last][None],
            "attention_mask": torch.ones(1, last - first, dtype=torch.long),
            **({"pixel_values": pixels[end - 1 : end]} if image else {}),
        }
        for (first, last), image, end in zip(itertools.pairwise(offsets), has_image, np.cumsum(has_image), strict=True)
    ]


def batches_of(path: Path) -> list[dict[str, torch.Tensor]]:
    """Keyword arguments of the model's forward for batches of samples of equal length, without padding."""
    inputs = inputs_of(path)
    batches = equal_lengths([i["input_ids"].shape[1] for i in inputs])
    return [_join([inputs[n] for n in numbers]) for numbers in batches]


def _join(inputs: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """One batch of samples of equal length; those without an image add nothing to pixel_values."""
    keys = {key: None for one in inputs for key in one}
    return {key: torch.cat([one[key] for one in inputs if key in one]) for key in keys}


def with_picture(inputs: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The first inputs that have pictures, which therefore reach every linear."""
    return next(one for one in inputs if "pixel_values" in one)


def run_all(model: torch.nn.Module, inputs: list[dict[str, torch.Tensor]]) -> None:
    """Forward passes over all inputs without gradients, as most peers calibrate."""
    with torch.no_grad():
        for batch in inputs:
            model(**batch, use_cache=False)


def answer_logits(model: torch.nn.Module, path: Path) -> np.ndarray:
    """Logits that predict the answers and their end tokens, question after question, float32 [tokens, vocab].

    Questions of equal length form a batch, without padding.
    """
    inputs = inputs_of(path)
    with np.load(path, allow_pickle=False) as file:
        starts = file["answer_start"]
    by_question: dict[int, np.ndarray] = {}
    for numbers in equal_lengths([i["input_ids"].shape[1] for i in inputs]):
        batch = _join([inputs[n] for n in numbers])
        with torch.no_grad():
            logits = model(**batch, use_cache=False).logits.float()
        for row, number in enumerate(numbers):
            by_question[number] = logits[row, starts[number] - 1 : -1].numpy().copy()
    return np.concatenate([by_question[number] for number in range(len(inputs))])


def hidden_states(model: Any, path: Path) -> np.ndarray:
    """The input of lm_head for all tokens, sample after sample, float32 [tokens of all samples, hidden].

    lm_head is not run. Samples of equal length form a batch, without padding.
    """
    inputs = inputs_of(path)
    by_sample: dict[int, np.ndarray] = {}
    for numbers in equal_lengths([i["input_ids"].shape[1] for i in inputs]):
        with torch.no_grad():
            states = model.model(**_join([inputs[n] for n in numbers]), use_cache=False).last_hidden_state.float()
        by_sample.update((number, row.numpy().copy()) for number, row in zip(numbers, states, strict=True))
    return np.concatenate([by_sample[number] for number in range(len(inputs))])


def equal_lengths(lengths: list[int]) -> Iterator[list[int]]:
    """Yields the numbers of samples of equal length, at most EVALUATION_BATCH at a time, shorter ones first."""
    for length in sorted(set(lengths)):
        numbers = [n for n, other in enumerate(lengths) if other == length]
        for start in range(0, len(numbers), EVALUATION_BATCH):
            yield numbers[start : start + EVALUATION_BATCH]


@contextmanager
def measured() -> Iterator[Measured]:
    """Measures seconds and peak resident memory of the code in the `with` block."""
    result = Measured()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak (VmHWM) to what is resident now
    began, wall_began = time.process_time(), time.perf_counter()
    yield result
    result.seconds, result.wall_seconds = time.process_time() - began, time.perf_counter() - wall_began
    result.peak_bytes = peak_resident_bytes()


def peak_resident_bytes() -> int:
    """Peak resident memory of this process since the last reset."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


def weight_levels(weight: torch.Tensor, scheme: Scheme) -> int:
    """Largest number of distinct values in any group (or row, without groups) of a fake-quantized weight."""
    rows = weight.reshape(-1, scheme.group_size or weight.shape[1])
    return max(len(row.unique()) for row in rows)


def check_levels(weights: dict[str, torch.Tensor], inputs: dict[str, torch.Tensor], scheme: Scheme) -> None:
    """Raises ValueError if a fake-quantized weight or input has more distinct values than its bits allow."""
    for name, weight in weights.items():
        if weight_levels(weight, scheme) > 2**scheme.weight_bits:
            raise ValueError(
                f"{name}: {weight_levels(weight, scheme)} levels in a group of {scheme.weight_bits}-bit weights"
            )
    for name, x in inputs.items():
        if scheme.activation_bits and len(x.unique()) > 2**scheme.activation_bits:
            raise ValueError(f"{name}: {len(x.unique())} levels in an input of {scheme.activation_bits} bits")


def run_cell(calibrate: Callable[[Job, Any], tuple[Any, Measured]], packages: list[str]) -> None:
    """Runs the cell of the command line: loads the model, quantizes it with `calibrate`, evaluates it, writes the result.

    calibrate: quantizes a model and measures itself; its docstring describes the program. packages: whose versions are
    recorded.
    """
    job = parse_job(calibrate.__doc__ or "")
    torch.manual_seed(0)
    model, result = calibrate(job, load_model(job.model))
    evaluate = hidden_states if job.states == HIDDEN else answer_logits
    np.save(job.out, evaluate(model, job.evaluation))
    versions = {p: importlib.metadata.version(p) for p in (*packages, "torch", "transformers", "numpy")}
    record = {
        "seconds": result.seconds,
        "wall_seconds": result.wall_seconds,
        "peak_bytes": result.peak_bytes,
        "versions": versions,
        "settings": result.settings,
        "threads": torch.get_num_threads(),
    }
    job.out.with_suffix(".json").write_text(json.dumps(record) + "\n")
