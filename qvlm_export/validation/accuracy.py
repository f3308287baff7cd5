"""Results of comparing a model's forms: KL divergence, top-1 agreement, SQNR of block outputs, and thresholds on them.

Plain data and pure functions. `compare.py` fills in a `ComparisonChain`; from it follow the step of the export at which
accuracy is lost, the layers behind that, and whether the thresholds of the command line are met. The forms of the model
(float, fake-quant, graph, engine) are named in `inference/forms.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qvlm_export.calibrate.checkpoint.samples import Sample
from qvlm_export.calibrate.checkpoint.scheme import MAX_FLOAT16
from qvlm_export.engines.check.graph_weights import WrongWeight
from qvlm_export.engines.check.metrics import Sums
from qvlm_export.engines.check.thresholds import SAME_AGREEMENT, SAME_FORWARD, SAME_KL
from qvlm_export.inference.forms import ENGINE, FAKE_QUANT, FLOAT, GRAPH

OWN_FORWARD = "float, block by block"  # this package's own forward pass, on which calibration relies
TOKEN_KINDS = ("image", "prompt", "answer")
NEGLIGIBLE_KL = 1e-6  # nats per token; float32 rounding alone stays below it
MAX_NAMED_LAYERS = 3


@dataclass(frozen=True)
class ModelRun:
    """One form of the model, ready to compute logits.

    name: one of `MODEL_FORMS`. logits: maps the index of a sample to its logits, float32 [S, vocab]; None when this form
    cannot run here, and then `reason` says why.
    """

    name: str
    logits: Callable[[int], np.ndarray] | None
    reason: str = ""


@dataclass(frozen=True)
class Comparison:
    """How far the logits of `form` are from those of an earlier form, `against`, summed by kind of token (`TOKEN_KINDS`)."""

    form: str
    against: str
    by_kind: Mapping[str, Sums]

    @property
    def total(self) -> Sums:
        """The sums over all kinds of tokens."""
        return sum(self.by_kind.values(), Sums())


@dataclass(frozen=True)
class LayerScore:
    """SQNR in dB of a block's output on one sample.

    sqnr_db: fake-quant against float. graph_sqnr_db: graph against fake-quant; None when the graph's blocks were not run.
    """

    block: str
    sqnr_db: float
    graph_sqnr_db: float | None


@dataclass(frozen=True)
class AccuracyLoss:
    """Where accuracy is lost.

    form: the form that loses most. kl: its KL divergence from the form before it, in nats per token. layers: the blocks or
    linears that contribute most to it, worst first; empty when they are not known.
    """

    form: str
    kl: float
    layers: tuple[str, ...]


@dataclass(frozen=True)
class ComparisonChain:
    """The forms of a model in the order of the export, and all comparisons between them.

    runs: every form, including those that cannot run here. layers: scores of blocks that were recorded on one sample.
    checked_linears: the number of quantized linears whose weights in the graph were compared with the calibrated ones.
    wrong_weights: the differences that this found. forward_error: relative L2 error of the logits that this package's own
    forward pass computes in float, on one sample. largest_activation: place and magnitude in the float model; None for a
    graph whose range is that of float32.
    """

    runs: tuple[ModelRun, ...]
    comparisons: tuple[Comparison, ...]
    layers: tuple[LayerScore, ...]
    checked_linears: int
    wrong_weights: tuple[WrongWeight, ...]
    forward_error: float = 0.0
    largest_activation: tuple[str, float] | None = None

    def against_float(self) -> list[Comparison]:
        """The comparison of every form that ran with the float checkpoint."""
        return [c for c in self.comparisons if c.against == FLOAT]

    def steps(self) -> list[Comparison]:
        """The comparison of every form that ran with the form that ran before it."""
        forms = [run.name for run in self.runs if run.logits is not None]
        previous = dict(zip(forms[1:], forms, strict=False))
        return [c for c in self.comparisons if previous.get(c.form) == c.against]


@dataclass(frozen=True)
class Check:
    """A threshold that one form has to meet.

    metric: "agreement" (share of tokens), "kl" (nats per token), "relative error" of logits, or "largest activation".
    wanted: the threshold. got: the value of the metric. against: the form that it was compared with.
    """

    form: str
    metric: str
    wanted: float
    got: float
    passed: bool
    against: str = FLOAT


def token_kind_masks(sample: Sample, image_token_id: int) -> dict[str, np.ndarray]:
    """Returns a mask, bool [S], for each of `TOKEN_KINDS`: the positions whose logits predict a token of that kind.

    Position t predicts token t + 1. In a sample without an answer the last position predicts the first token of the answer;
    in a sample with one it predicts nothing that is known, so it is in none of the masks.
    """
    length = len(sample.input_ids)
    predicted = np.arange(1, length + 1)
    is_image = np.append(sample.input_ids[1:] == image_token_id, False)
    is_answer = (predicted >= sample.answer_start) & ((predicted < length) | (sample.answer_start == length))
    return {"image": is_image, "prompt": ~is_image & (predicted < sample.answer_start), "answer": ~is_image & is_answer}


def find_accuracy_loss(chain: ComparisonChain) -> AccuracyLoss | None:
    """Finds the form with the largest KL divergence from the form before it; None when every step is negligible.

    A graph whose weights differ from the calibrated ones is named whatever that costs on these samples, with the linears
    that differ. A form with logits that are not finite has an infinite cost.
    """
    costs = {c.form: math.inf if c.total.not_finite else c.total.mean_kl for c in chain.steps()}
    if chain.wrong_weights:
        return AccuracyLoss(GRAPH, costs.get(GRAPH, math.nan), tuple(dict.fromkeys(w.linear for w in chain.wrong_weights)))
    form = max(costs, key=lambda name: costs[name])
    if costs[form] < NEGLIGIBLE_KL:
        return None
    scores = {
        FAKE_QUANT: [(s.block, s.sqnr_db) for s in chain.layers],
        GRAPH: [(s.block, s.graph_sqnr_db) for s in chain.layers if s.graph_sqnr_db is not None],
    }
    return AccuracyLoss(form, costs[form], worst_layers(scores.get(form, [])))


def worst_layers(scores: Sequence[tuple[str, float]]) -> tuple[str, ...]:
    """Returns up to three blocks whose outputs add the most quantization noise to that of their inputs, worst first.

    scores: (block, SQNR of its output in dB), in the order in which the blocks run. Noise propagates from block to block,
    so the block with the lowest SQNR is seldom the one that caused it.
    """
    noise = [10 ** (-sqnr / 10) for _, sqnr in scores]
    added = [(after - before, block) for (block, _), after, before in zip(scores, noise, [0.0, *noise], strict=False)]
    return tuple(block for increase, block in sorted(added, reverse=True)[:MAX_NAMED_LAYERS] if increase > 0)


def check_same_model(chain: ComparisonChain) -> list[Check]:
    """Checks that no form is another model than the one before it, whatever quantization costs.

    These checks have no option: an export that fails them is faulty, and not merely inaccurate.
    """
    error = chain.forward_error
    checks = [Check(OWN_FORWARD, "relative error", SAME_FORWARD, error, error <= SAME_FORWARD)]
    if chain.largest_activation is not None:
        magnitude = chain.largest_activation[1]
        checks.append(Check(FLOAT, "largest activation", MAX_FLOAT16, magnitude, magnitude <= MAX_FLOAT16))
    for comparison in chain.steps():
        if comparison.form in (GRAPH, ENGINE):
            total, against = comparison.total, comparison.against
            agrees, close = total.agreement >= SAME_AGREEMENT, not total.not_finite and total.mean_kl <= SAME_KL
            checks.append(Check(comparison.form, "agreement", SAME_AGREEMENT, total.agreement, agrees, against))
            checks.append(Check(comparison.form, "kl", SAME_KL, total.mean_kl, close, against))
    return checks


def check_thresholds(chain: ComparisonChain, min_agreement: float | None, max_kl: float | None) -> list[Check]:
    """Checks the thresholds for every form that ran, against the float checkpoint; a threshold of None is not checked.

    Only answer tokens count, as they are what a user of the model reads. min_agreement: share of tokens with the same
    top-1. max_kl: mean KL divergence in nats per token; logits that are not finite fail it.
    """
    checks = []
    for comparison in chain.against_float():
        answer = comparison.by_kind["answer"]
        if min_agreement is not None:
            passed = answer.agreement >= min_agreement
            checks.append(Check(comparison.form, "agreement", min_agreement, answer.agreement, passed))
        if max_kl is not None:
            passed = answer.not_finite == 0 and answer.mean_kl <= max_kl
            checks.append(Check(comparison.form, "kl", max_kl, answer.mean_kl, passed))
    return checks
