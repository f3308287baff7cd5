"""What a searching calibrator does, as data: every effort, every row of the benchmark and every ablation is one of these."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

# none; smoothquant: norms only, exponent 0.5, as its paper; awq: factors from mean magnitudes, the exponent by output error;
# search: from means and peaks, the exponent by output error; expected: a factor for each channel, all with the least
# expected error (`expected_error.py`).
Equalization = Literal["none", "smoothquant", "awq", "search", "expected"]
# absmax: the whole range, to both sides of zero; covering: no more of it than there are values; rounded: that, or fractions
# of it where they leave less output error once rounded by GPTQ; output: the fraction with the least output error when
# rounded to nearest; expected: the least expected error.
WeightRange = Literal["absmax", "covering", "rounded", "output"]
InputRange = Literal["absmax", "output", "expected"]
# nearest; gptq: by what an error does to the linear's output; two-sided: by what that does to the answers
# (`kronecker_rounding.py`).
Rounding = Literal["nearest", "gptq", "two-sided"]
# What an error at a token counts: all alike; or by how much it moves the answers' logits, or their KL divergence, or both;
# or by the mean of the logits' over the tokens of its kind (`measure.py`).
TokenWeighting = Literal["plain", "modality", "logits", "kl", "kl+logits"]
# What tower and projector are optimised for (Q-VLM, section 3.3): what an error means to the language model, by the same
# objective as the decoder; their own output, all tokens alike; or nothing, rounded to nearest.
VisionTarget = Literal["language", "own", "none"]


@dataclass(frozen=True)
class LinearConfig:
    """One way to quantize the linears that share an input.

    ridge: how strongly weights are held back when they are moved towards the float output; None leaves them where they are.
    by_output: whether folding factors and the range of activations, too, count an error of each output by its gradients.
    Only where rounding is two-sided, as nothing else knows them.
    """

    activation_ranges: InputRange = "output"
    weight_ranges: WeightRange = "output"
    rounding: Rounding = "gptq"
    ridge: float | None = 1.0
    by_output: bool = True


@dataclass(frozen=True)
class SearchConfig:
    """One way to search a block.

    folding: how outlier channels are moved into weights. variant: how every group of linears is ranged and rounded.
    objective: what errors at a token count for.
    learn_steps: gradient steps on rounding, ranges, gains and biases of the block after that; 0 for none.
    vision: what tower and projector are optimised for.
    leverage: whether two-sided rounding counts a token's gradient by the leverage of its input.
    questions: how many of the samples' texts are asked about each sample's pictures (`cross_questions.py`); 1 for its own
    only.
    undecided: how many are also asked about mixtures of its pictures with others (`mixup.py`); 0 for none.
    scrambled: how many texts with words drawn anew are run about each sample's pictures (`random_words.py`); 0 for none.
    seed: of everything drawn at random.
    """

    equalization: Equalization = "search"
    linear: LinearConfig = LinearConfig()
    token_weighting: TokenWeighting = "plain"
    learn_steps: int = 0
    vision: VisionTarget = "language"
    leverage: bool = True
    questions: int = 1
    mixup_prompts: int = 0
    random_word_prompts: int = 0
    seed: int = 0

    def needs_output_hessians(self) -> bool:
        """Whether rounding needs to know in which directions outputs matter."""
        return self.linear.rounding == "two-sided"

    def by_output(self) -> bool:
        """Whether folding factors count errors of outputs by their gradients."""
        return self.needs_output_hessians() and self.linear.by_output

    def num_backward_passes(self) -> int:
        """How often gradients are taken through the float model."""
        return 2 if self.needs_output_hessians() and self.leverage else 1

    def for_vision(self) -> SearchConfig:
        """The same for a block of tower or projector."""
        if self.vision == "language":
            return self
        if self.vision == "own":
            own = replace(self.linear, rounding="gptq") if self.needs_output_hessians() else self.linear
            return replace(self, token_weighting="plain", linear=own)
        return replace(self, equalization="none", linear=RTN_LINEAR, token_weighting="plain", learn_steps=0)


RTN_LINEAR = LinearConfig(activation_ranges="absmax", weight_ranges="absmax", rounding="nearest", ridge=None)
# The ridge is no matter of choice: on the samples it is fitted to, less of it always looks better. Nor is the range of
# activations: those samples hold no value beyond the largest ones seen.
EXPECTED_ERROR_LINEAR = LinearConfig(activation_ranges="expected", weight_ranges="covering")
FAST = SearchConfig("expected", EXPECTED_ERROR_LINEAR)
# With many times the prompts less has to be held back. What counts is where the answers are undecided and, as that is little
# data for so many directions, the logits.
KRONECKER_LINEAR = replace(EXPECTED_ERROR_LINEAR, rounding="two-sided", ridge=0.3)
FULL = SearchConfig(
    "expected", KRONECKER_LINEAR, "kl+logits", learn_steps=24, questions=8, mixup_prompts=4, random_word_prompts=16
)
