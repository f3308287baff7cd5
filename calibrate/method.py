"""What a searching calibrator does, as data: every effort, every row of the benchmark and every ablation is one of these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# none; smoothquant: norms only, exponent 0.5, as its paper; smooth-E: wherever factors fold, exponent E; awq: factors from
# mean magnitudes, the exponent by output error; search: from means and peaks, the exponent by output error; expected: a
# factor for each channel, all with the least expected error (`noise.py`).
Folding = Literal["none", "smoothquant", "smooth-0.5", "awq", "search", "expected"]
# absmax: the whole range; output: the fraction of it with the least output error; expected: the least expected error.
Ranges = Literal["absmax", "output"]
InputRanges = Literal["absmax", "output", "expected"]
Rounding = Literal["nearest", "gptq"]
# What an error at a token counts: all alike; or by how much it moves the answers' logits, or their KL divergence; or by the
# mean of that over the tokens of its kind (`influence.py`).
Objective = Literal["plain", "modality", "logits", "kl"]


@dataclass(frozen=True)
class Variant:
    """One way to quantize the linears that share an input.

    ridge: how strongly weights are held back when they are moved towards the float output; None leaves them where they are.
    widen: what the searched activation range is multiplied with.
    """

    activation_ranges: InputRanges = "output"
    weight_ranges: Ranges = "output"
    rounding: Rounding = "gptq"
    ridge: float | None = 1.0
    widen: float = 1.0


@dataclass(frozen=True)
class Method:
    """One way to search a block.

    foldings: each is tried on the whole block. variants: each is tried on every group of linears, one group after another.
    Where there is a choice, the block's output decides: the least squared error against the float block's.
    objective: what errors at a token count for, in rounding and wherever there is a choice.
    learn_steps: gradient steps on rounding, ranges, gains and biases of the block after that; 0 for none.
    seed: of the order in which learning draws samples.
    """

    foldings: tuple[Folding, ...] = ("search",)
    variants: tuple[Variant, ...] = (Variant(),)
    objective: Objective = "plain"
    learn_steps: int = 0
    seed: int = 0


NEAREST = Variant(activation_ranges="absmax", weight_ranges="absmax", rounding="nearest", ridge=None)
# The ridge is no matter of choice: on the samples it is fitted to, less of it always looks better. Nor is the range of
# activations: those samples hold no value beyond the largest ones seen.
EXPECTED = Variant(activation_ranges="expected", weight_ranges="absmax")
CHOICE = (EXPECTED, Variant(activation_ranges="expected", weight_ranges="output"))
FAST = Method(foldings=("expected",), variants=(EXPECTED,), objective="logits")
FULL = Method(foldings=("expected", "search", "smooth-0.5"), variants=CHOICE, objective="logits", learn_steps=200)
