"""The input of every calibrator (model blocks, schemes, calibration set) and the checks on activations and weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from qvlm_export.calibrate.blockwise.block_loader import CPU
from qvlm_export.calibrate.blockwise.blocks import Block, ModelBlocks
from qvlm_export.calibrate.blockwise.resume import CalibrationWork
from qvlm_export.calibrate.checkpoint.samples import Sample
from qvlm_export.calibrate.checkpoint.scheme import FLOAT16, MAX_FLOAT16, LinearScheme
from qvlm_export.calibrate.checkpoint.tensor_source import TensorSource
from qvlm_export.calibrate.errors import UserError

# Called with (blocks done, blocks in all, name of the block).
Progress = Callable[[int, int, str], None]
MAX_INPUT = 1e15  # magnitude whose square float32 can still sum over a hundred million tokens


@dataclass(frozen=True)
class CalibrationJob:
    """What to calibrate.

    source: the model's tensors. schemes: of each linear that is quantized, by canonical name. samples: the calibration set.
    work: the work folder, from which an interrupted run continues; None for a run that does not resume. device: where blocks
    compute; activations between blocks are in host memory. strict: whether all linears keep their schemes, even W8A8 where 8
    bits cannot hold the input. numbers: of the samples in the whole calibration set, for errors; None where they are all.
    """

    blocks: ModelBlocks
    source: TensorSource
    schemes: Mapping[str, LinearScheme]
    samples: Sequence[Sample]
    work: CalibrationWork | None = None
    device: torch.device = CPU
    strict: bool = False
    numbers: Sequence[int] | None = None

    @property
    def float_type(self) -> str:
        """The float type of the graph that the schemes are for."""
        return next((scheme.float_type for scheme in self.schemes.values()), FLOAT16)

    def sample_numbers(self, block: Block) -> list[int]:
        """The sample number of each input of a block: all in the decoder, those with images in tower and projector."""
        all_samples = block in self.blocks.text_layers
        return [number for number, sample in enumerate(self.samples) if all_samples or len(sample.pixel_values)]

    def numbers_in_set(self, numbers: Iterable[int]) -> list[int]:
        """The numbers that samples of this job have in the whole calibration set."""
        return [number if self.numbers is None else self.numbers[number] for number in numbers]

    def block_schemes(self, block: Block) -> dict[str, LinearScheme]:
        """The schemes of one block's linears, by their names inside it."""
        start = f"{block.prefix}."
        return {name.removeprefix(start): s for name, s in self.schemes.items() if name.startswith(start)}


def find_linear_needing_images(blocks: ModelBlocks, schemes: Mapping[str, LinearScheme], *, searched: bool) -> str | None:
    """The name of a linear of tower or projector whose quantization depends on samples; None when there is none.

    searched: whether quantized weights depend on samples, too, and not only activation ranges.
    """
    for block in blocks.vision():
        for name, scheme in schemes.items():
            if name.startswith(f"{block.prefix}.") and (searched or scheme.activation_bits is not None):
                return name
    return None


def check_images(job: CalibrationJob) -> None:
    """Raises UserError where images are missing; called before anything is measured, as measuring takes long."""
    name = find_linear_needing_images(job.blocks, job.schemes, searched=True)
    if name is not None and not any(len(sample.pixel_values) for sample in job.samples):
        raise UserError(
            f"{name}: no calibration sample has a picture, so no input of it can be observed; add samples with pictures"
        )


def check_outputs(block: Block, outputs: Iterable[torch.Tensor], samples: Sequence[int]) -> None:
    """Raises UserError naming block and sample when an output is not finite. samples: as in `BlockWriter.store_outputs`."""
    for number, output in enumerate(outputs):
        check_output(block, samples[number % len(samples)], output)


def check_output(block: Block, sample: int, output: torch.Tensor) -> None:
    """Raises UserError naming the block and the sample with this number when the output is not finite."""
    if not is_finite(output):
        raise non_finite_error(block.prefix, sample)


def check_rows(
    linear: str, rows: torch.Tensor, inputs: Sequence[torch.Tensor], sample_numbers: Sequence[torch.Tensor] | None
) -> None:
    """Raises UserError naming the linear and the sample where a value of `rows`, or the sum of its squares, is not finite.

    rows: the linear's input, float32 [tokens of all inputs, in]. inputs: of the block, batches [B, tokens, width].
    sample_numbers: int64 [B] of every batch, the number of the sample that each input belongs to; None where every input is
    a sample of its own.
    """
    if not rows.numel() or all(abs(float(bound)) <= MAX_INPUT for bound in rows.aminmax()):
        return
    counts = torch.tensor([x.shape[1] for x in inputs for _ in x])  # rows of every input
    row = int((~(rows.abs() <= MAX_INPUT)).any(1).nonzero()[0])
    number = int(torch.searchsorted(counts.cumsum(0), row, right=True))
    sample = number if sample_numbers is None else int(torch.cat(list(sample_numbers))[number])
    largest = float(rows[row].abs().max())
    raise non_finite_error(linear, sample, largest if math.isfinite(largest) else None)


def is_finite(values: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    return not values.numel() or all(math.isfinite(bound) for bound in values.aminmax())  # both NaN if any value is


def non_finite_error(layer: str, sample: int, largest: float | None = None) -> UserError:
    """The error for activations of the sample with this number that are not finite.

    largest: their largest magnitude, if they are finite but too large for sums of their squares; else None.
    """
    problem = "are not finite" if largest is None else f"reach {largest:.0e}, which is too large to calibrate on"
    return UserError(
        f"{layer}: activations of sample {sample + 1} {problem}; look at its picture and its text, or leave it out"
    )


def check_weight(name: str, weight: torch.Tensor, scheme: LinearScheme) -> None:
    """Raises UserError naming the linear when a value of its weight is beyond the range of the graph, or of a stored scale.

    Scales of groups are stored in float16 for bfloat16 graphs, too.
    """
    largest = max(abs(float(bound)) for bound in weight.aminmax())
    if scheme.float_type == FLOAT16 and largest > MAX_FLOAT16:
        raise UserError(
            f"{name}.weight: holds values beyond float16's 65504, so it cannot be in a float16 engine; add --dtype bfloat16"
        )
    if scheme.group_size is not None and largest > MAX_FLOAT16 * scheme.qmax:
        raise UserError(
            f"{name}.weight: holds values up to {largest:.3g}, beyond what {scheme.name} can hold; use --scheme int8, or a "
            "recipe that leaves it out"
        )
