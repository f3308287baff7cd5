"""What a searching calibrator does, as data: every effort, every row of the benchmark and every ablation is one of these."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

# none; smoothquant: norms only, exponent 0.5, as its paper; smooth-E: wherever factors fold, exponent E; awq: factors from
# mean magnitudes, the exponent by output error; search: from means and peaks, the exponent by output error; expected: a
# factor for each channel, all with the least expected error (`noise.py`).
Folding = Literal["none", "smoothquant", "smooth-0.5", "awq", "search", "expected"]
# absmax: the whole range, to both sides of zero; covering: no more of it than there are values; rounded: that, or fractions
# of it where they leave less output error once rounded by GPTQ; output: the fraction with the least output error when
# rounded to nearest; expected: the least expected error.
Ranges = Literal["absmax", "covering", "rounded", "output"]
InputRanges = Literal["absmax", "output", "expected"]
Rounding = Literal["nearest", "gptq"]
# What an error at a token counts: all alike; or by how much it moves the answers' logits, or their KL divergence; or by the
# mean of that over the tokens of its kind (`influence.py`).
Objective = Literal["plain", "modality", "logits", "kl"]
# What tower and projector are optimised for (Q-VLM, section 3.3): what an error means to the language model, by the same
# objective as the decoder; their own output, all tokens alike; or nothing, rounded to nearest.
VisionTarget = Literal["language", "own", "none"]


@dataclass(frozen=True)
class Variant:
    """One way to quantize the linears that share an input.

    ridge: how strongly weights are held back when they are moved towards the float output; None leaves them where they are.
    sweeps: over all codes and scales after GPTQ (`refine.py`).
    """

    activation_ranges: InputRanges = "output"
    weight_ranges: Ranges = "output"
    rounding: Rounding = "gptq"
    ridge: float | None = 1.0
    sweeps: int = 0


@dataclass(frozen=True)
class Method:
    """One way to search a block.

    foldings: each is tried on the whole block. variants: each is tried on every group of linears, one group after another.
    Where there is a choice, the block's output decides: the least squared error against the float block's.
    objective: what errors at a token count for, in rounding and wherever there is a choice.
    learn_steps: gradient steps on rounding, ranges, gains and biases of the block after that; 0 for none.
    vision: what tower and projector are optimised for.
    questions: how many of the samples' texts are asked about each sample's pictures (`recombine.py`); 1 for its own only.
    seed: of everything drawn at random.
    """

    foldings: tuple[Folding, ...] = ("search",)
    variants: tuple[Variant, ...] = (Variant(),)
    objective: Objective = "plain"
    learn_steps: int = 0
    vision: VisionTarget = "language"
    questions: int = 1
    seed: int = 0

    def for_vision(self) -> Method:
        """The same for a block of tower or projector."""
        if self.vision == "language":
            return self
        if self.vision == "own":
            return replace(self, objective="plain")
        return replace(self, foldings=("none",), variants=(NEAREST,), objective="plain", learn_steps=0)


NEAREST = Variant(activation_ranges="absmax", weight_ranges="absmax", rounding="nearest", ridge=None)
# The ridge is no matter of choice: on the samples it is fitted to, less of it always looks better. Nor is the range of
# activations: those samples hold no value beyond the largest ones seen.
EXPECTED = Variant(activation_ranges="expected", weight_ranges="covering")
FAST = Method(foldings=("expected",), variants=(EXPECTED,), objective="logits")
# With eight times the prompts less has to be held back, and codes and scales can be moved on without fitting the samples.
REFINED = replace(EXPECTED, weight_ranges="rounded", ridge=0.3, sweeps=2)
FULL = Method(foldings=("expected",), variants=(REFINED,), objective="logits", learn_steps=100, questions=8)
