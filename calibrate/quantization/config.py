"""Configuration of the searching calibrator, as data.

Every effort, every row of the benchmark and every ablation is a `SearchConfig`. The `Literal` types list the methods.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

# How outlier channels of activations are moved into weights (`equalize.py`).
# none: not at all. smoothquant: at norms only, exponent 0.5, as in its paper. awq: factors from mean magnitudes, the
# exponent by output error. search: factors from mean and largest magnitudes, the exponent by output error. expected: a
# factor for each channel, all together with the least expected error (`expected_error.py`).
Equalization = Literal["none", "smoothquant", "awq", "search", "expected"]
# The clipping range of each group or output channel of a weight.
# absmax: the largest magnitude, on both sides of zero. covering: the smallest range that clips nothing. residual: of 3- and
# 4-bit groups, the fraction of that with the least error that GPTQ cannot compensate. output: the fraction of absmax with
# the least output error after round-to-nearest.
WeightRange = Literal["absmax", "covering", "residual", "output"]
# The clipping range of a shared input: the largest magnitude, the fraction of it with the least output error, or the range
# with the least expected error (`expected_error.py`).
InputRange = Literal["absmax", "output", "expected"]
# nearest: round-to-nearest (RTN). gptq: by the input Hessian, that is by the error of the linear's output. kronecker: by
# input and output Hessian (Kronecker-factored), that is by the error of the model's output (`kronecker_rounding.py`).
Rounding = Literal["nearest", "gptq", "kronecker"]
# The weight of a token's error. plain: equal weights. output: one over the mean square of the block's output at the token,
# which is what the next norm divides by, so that the error counts as a share of what it is added to. The others are measured
# by gradients (`sensitivity/measure.py`). logits, kl, kl+logits: by how much the
# error moves the logits of the answer tokens, their KL divergence, or both. modality: the mean of "logits" over the tokens
# of its kind.
TokenWeighting = Literal["plain", "output", "modality", "logits", "kl", "kl+logits"]
# The tokens whose prediction gradients are measured by: those of the answers, or all text behind the last image token, where
# samples have few answer tokens.
ProbedTokens = Literal["answers", "text"]
# The objective for vision tower and projector (Q-VLM, section 3.3). language: as for the decoder, the error of the language
# model's output. own: the error of their own output, with equal token weights. none: they are rounded to nearest.
VisionTarget = Literal["language", "own", "none"]


@dataclass(frozen=True)
class LinearConfig:
    """How the linears that share an input are quantized.

    ridge: of output matching, relative to the mean diagonal of the input Hessian; None for no output matching.
    match_residual: whether output matching also makes up for the error that the residual stream has where a linear's output
    is added to it.
    by_output: whether equalization and activation ranges weight the error of each output by the diagonal of the output
    Hessian. It needs Kronecker-factored rounding ("kronecker"), without which there are no output Hessians.
    refit_scales: whether scales are fitted to the codes that rounding has chosen (`scale_refit.py`).
    damping: of GPTQ, relative to the mean diagonal of the input Hessian. output_damping: the same of the output Hessian.
    """

    activation_ranges: InputRange = "output"
    weight_ranges: WeightRange = "output"
    rounding: Rounding = "gptq"
    ridge: float | None = 1.0
    match_residual: bool = False
    by_output: bool = True
    refit_scales: bool = False
    damping: float = 0.01
    output_damping: float = 0.1


@dataclass(frozen=True)
class SearchConfig:
    """How blocks are searched, and with which prompts.

    equalization: how outlier channels are moved into weights. linear: how the linears of every shared input are quantized.
    token_weighting: how the errors of tokens are weighted. probed_tokens: whose logits gradients are taken of.
    vision_target: the objective for vision tower and projector.
    leverage: whether the output Hessian weights a token's gradient by the leverage of its input.
    temper_gradients: whether tokens count in the output Hessian by the norms of their gradients, not by the squared norms.
    questions_per_image: how many prompts are paired with each sample's images (`cross_questions.py`); 1 for its own.
    random_word_prompts: how many prompts with randomly replaced words run with each sample's images (`random_words.py`); 0
    for none.
    seed: of everything that is drawn at random.
    large: what is done instead for decoders that are too large for many more prompts; None for the same.
    """

    equalization: Equalization = "search"
    linear: LinearConfig = LinearConfig()
    token_weighting: TokenWeighting = "plain"
    probed_tokens: ProbedTokens = "answers"
    vision_target: VisionTarget = "language"
    leverage: bool = True
    temper_gradients: bool = False
    questions_per_image: int = 1
    random_word_prompts: int = 0
    seed: int = 0
    large: SearchConfig | None = None

    def needs_output_hessians(self) -> bool:
        """Whether rounding uses the output Hessians of linears (Kronecker-factored rounding)."""
        return self.linear.rounding == "kronecker"

    def needs_gradients(self) -> bool:
        """Whether the weights of tokens, or rounding, need a backward pass through the float model."""
        return self.token_weighting not in ("plain", "output") or self.needs_output_hessians()

    def by_output(self) -> bool:
        """Whether equalization and activation ranges weight each output by the diagonal of its output Hessian."""
        return self.needs_output_hessians() and self.linear.by_output

    def num_backward_passes(self) -> int:
        """The number of backward passes through the float model."""
        return 2 if self.needs_output_hessians() and self.leverage else 1

    def for_vision(self) -> SearchConfig:
        """This configuration for a block of vision tower or projector, changed as `vision_target` says."""
        if self.vision_target == "language":
            return self
        if self.vision_target == "own":
            own = replace(self.linear, rounding="gptq") if self.needs_output_hessians() else self.linear
            return replace(self, token_weighting="plain", linear=own)
        return replace(self, equalization="none", linear=RTN_LINEAR, token_weighting="plain")


RTN_LINEAR = LinearConfig(activation_ranges="absmax", weight_ranges="absmax", rounding="nearest", ridge=None)
# Neither the ridge nor the activation range is searched on the calibration set. A smaller ridge always looks better on the
# samples it is fitted to, and those samples hold no value beyond their own largest one.
EXPECTED_ERROR_LINEAR = LinearConfig(activation_ranges="expected", weight_ranges="covering")
# A Hessian of few calibration tokens is far from that of deployment, so more damping than in the paper is better. A token
# counts by the size of the block's output there, so that no massive activation decides for all others.
FAST_LINEAR = replace(EXPECTED_ERROR_LINEAR, weight_ranges="residual", match_residual=True, refit_scales=True, damping=0.1)
FAST = SearchConfig("expected", FAST_LINEAR, "output")
# `full` of all but the smallest decoders. It rounds by the effect on the predictions of all text, as gradients of the few
# answer tokens of a calibration set say too little about so many directions, and so do the few tokens with large gradients.
LARGE_KRONECKER_LINEAR = replace(FAST_LINEAR, rounding="kronecker", by_output=False, output_damping=0.3)
FULL_LARGE = replace(FAST, linear=LARGE_KRONECKER_LINEAR, probed_tokens="text", leverage=False, temper_gradients=True)
# With many times the prompts, which only small decoders can afford (`augmentation/prompts.py`), a smaller ridge is enough.
# "kl" weights the tokens that decide uncertain answers; as these are little data for so many directions, "logits" is added.
KRONECKER_LINEAR = replace(EXPECTED_ERROR_LINEAR, match_residual=True, rounding="kronecker", ridge=0.3)
FULL = SearchConfig(
    "expected",
    KRONECKER_LINEAR,
    "kl+logits",
    questions_per_image=8,
    random_word_prompts=16,
    large=FULL_LARGE,
)
