"""What every calibrator is given, and how it writes what it found, block by block. torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from qvlm_export.calibrate.blockwise.blocks import Block, ModelBlocks
from qvlm_export.calibrate.blockwise.offload import CPU
from qvlm_export.calibrate.blockwise.resume import CalibrationWork
from qvlm_export.calibrate.checkpoint.samples import Sample
from qvlm_export.calibrate.checkpoint.scheme import MAX_FLOAT16, LinearScheme
from qvlm_export.calibrate.checkpoint.tensor_source import TensorSource
from qvlm_export.calibrate.errors import UserError

# (blocks done, blocks in all, name of the block)
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class CalibrationJob:
    """What to calibrate: the model's blocks, its tensors, the scheme of each planned linear, the samples.

    work: where finished blocks are noted, and found again; None for a calibration that starts and ends in one go. device:
    where blocks compute; what lies between them is in the memory of the host.
    """

    blocks: ModelBlocks
    source: TensorSource
    schemes: Mapping[str, LinearScheme]
    samples: Sequence[Sample]
    work: CalibrationWork | None = None
    device: torch.device = CPU

    def sample_numbers(self, block: Block) -> list[int]:
        """The number of the sample that each input of a block is of: tower and projector see only those with pictures."""
        everyone = block in self.blocks.text_layers
        return [number for number, sample in enumerate(self.samples) if everyone or len(sample.pixel_values)]

    def block_schemes(self, block: Block) -> dict[str, LinearScheme]:
        """The planned linears of one block, by their names inside it."""
        start = f"{block.prefix}."
        return {name.removeprefix(start): s for name, s in self.schemes.items() if name.startswith(start)}


def find_linear_needing_images(blocks: ModelBlocks, plan: Mapping[str, LinearScheme], *, searched: bool) -> str | None:
    """A planned linear of tower or projector whose quantization depends on samples; None when there is none.

    searched: whether weights do, too, and not only ranges of activations.
    """
    for block in blocks.vision():
        for name, scheme in plan.items():
            if name.startswith(f"{block.prefix}.") and (searched or scheme.activation_bits is not None):
                return name
    return None


def check_outputs(block: Block, outputs: Iterable[torch.Tensor], samples: Sequence[int]) -> None:
    """Raises UserError naming block and sample when an activation is not finite. samples: as of `BlockWriter.keep`."""
    for number, output in enumerate(outputs):
        _check_output(block, samples[number % len(samples)], output)


def _check_output(block: Block, sample: int, output: torch.Tensor) -> None:
    if not is_finite(output):
        raise non_finite_error(block.prefix, sample)


def is_finite(values: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    return not values.numel() or all(math.isfinite(bound) for bound in values.aminmax())  # both NaN if any value is


def non_finite_error(layer: str, sample: int, largest: float | None = None) -> UserError:
    """What to say of activations of the sample with this number. largest: where they are, but too large to be squared."""
    wrong = "are not finite" if largest is None else f"reach {largest:.0e}, which is too large to calibrate on"
    return UserError(
        f"{layer}: activations of sample {sample + 1} {wrong}; look at its picture and its text, or leave it out"
    )


def check_weight(name: str, weight: torch.Tensor) -> None:
    """Raises UserError naming the linear when a weight does not fit into a float16 engine."""
    if max(abs(float(bound)) for bound in weight.aminmax()) > MAX_FLOAT16:
        raise UserError(f"{name}.weight: holds values beyond float16's 65504, so it cannot be in a float16 engine")
