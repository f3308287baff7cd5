"""What the accuracy ladder finds, as data: comparisons, layers, where accuracy is lost, and whether thresholds hold.

The rungs: float (the checkpoint in torch), fake-quant (the calibrated checkpoint in torch), onnx graph (the Q/DQ graph on
ONNX Runtime), engine (TensorRT).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qvlm_export.calibrate.checkpoint.samples import Sample
from qvlm_export.engines.check.graph_weights import WrongWeight
from qvlm_export.engines.check.metrics import Sums

GROUPS = ("image", "prompt", "answer")
FLOAT, FAKE_QUANT, GRAPH, ENGINE = "float", "fake-quant", "onnx graph", "engine"
NOTHING_LOST = 1e-6  # nats a token; what float32 rounding costs stays below
NAMED_LAYERS = 3


@dataclass(frozen=True)
class ModelRun:
    """One form of the model. logits: number of a sample -> float32 [S, vocab]; None where it cannot run, for `reason`."""

    name: str
    logits: Callable[[int], np.ndarray] | None
    reason: str = ""


@dataclass(frozen=True)
class Comparison:
    """A rung against a lower one, by group of tokens."""

    rung: str
    against: str
    groups: Mapping[str, Sums]

    @property
    def total(self) -> Sums:
        return sum(self.groups.values(), Sums())


@dataclass(frozen=True)
class LayerScore:
    """SQNR of a block's output on one sample: fake-quant against float, and the graph against fake-quant where asked for."""

    block: str
    sqnr_db: float
    graph_sqnr_db: float | None


@dataclass(frozen=True)
class Loss:
    """Where accuracy is lost: the rung, in nats a token against the rung below it, and the layers that lose most."""

    rung: str
    kl: float
    layers: tuple[str, ...]


@dataclass(frozen=True)
class ComparisonChain:
    """All findings. wrong: what in the graph is not as calibrated, of `linears` quantized linears looked at."""

    rungs: tuple[ModelRun, ...]
    comparisons: tuple[Comparison, ...]
    layers: tuple[LayerScore, ...]
    linears: int
    wrong: tuple[WrongWeight, ...]

    def against_float(self) -> list[Comparison]:
        """Every rung that ran against the checkpoint."""
        return [c for c in self.comparisons if c.against == FLOAT]

    def steps(self) -> list[Comparison]:
        """Every rung that ran against the one below it."""
        ran = [rung.name for rung in self.rungs if rung.logits is not None]
        below = dict(zip(ran[1:], ran, strict=False))
        return [c for c in self.comparisons if below.get(c.rung) == c.against]


@dataclass(frozen=True)
class Check:
    """A threshold of the command line on one rung's answer tokens."""

    rung: str
    metric: str
    wanted: float
    got: float
    passed: bool


def token_groups(sample: Sample, image_token_id: int) -> dict[str, np.ndarray]:
    """Masks bool [S] over predictions, by the group of the token that each predicts: position t predicts token t + 1.

    The last position of a sample without an answer predicts the answer's first token. Behind the end of an answer there is
    nothing to predict, and that position is in no group.
    """
    length = len(sample.input_ids)
    following = np.arange(1, length + 1)
    is_image = np.append(sample.input_ids[1:] == image_token_id, False)
    is_answer = (following >= sample.answer_start) & ((following < length) | (sample.answer_start == length))
    return {"image": is_image, "prompt": ~is_image & (following < sample.answer_start), "answer": ~is_image & is_answer}


def find_loss(ladder: ComparisonChain) -> Loss | None:
    """The step that costs most, with the layers known to be behind it; None when no step costs anything.

    A graph whose weights are not the calibrated ones is at fault, whatever it costs on these samples.
    """
    costs = {c.rung: math.inf if c.total.not_finite else c.total.mean_kl for c in ladder.steps()}
    if ladder.wrong:
        return Loss(GRAPH, costs.get(GRAPH, math.nan), tuple(dict.fromkeys(w.linear for w in ladder.wrong)))
    rung = max(costs, key=lambda name: costs[name])
    if costs[rung] < NOTHING_LOST:
        return None
    scores = {
        FAKE_QUANT: [(s.block, s.sqnr_db) for s in ladder.layers],
        GRAPH: [(s.block, s.graph_sqnr_db) for s in ladder.layers if s.graph_sqnr_db is not None],
    }
    return Loss(rung, costs[rung], worst_layers(scores.get(rung, [])))


def worst_layers(scores: Sequence[tuple[str, float]]) -> tuple[str, ...]:
    """The blocks that add most noise, worst first. scores: blocks in the order they run, SQNR in dB of their outputs.

    Noise is carried on from block to block, so the lowest SQNR is seldom where it came from.
    """
    noise = [10 ** (-sqnr / 10) for _, sqnr in scores]
    added = [(now - before, block) for (block, _), now, before in zip(scores, noise, [0.0, *noise], strict=False)]
    return tuple(block for more, block in sorted(added, reverse=True)[:NAMED_LAYERS] if more > 0)


def check_thresholds(ladder: ComparisonChain, min_agreement: float | None, max_kl: float | None) -> list[Check]:
    """Every rung that ran against the checkpoint, on answer tokens: what a user of the model reads."""
    checks = []
    for comparison in ladder.against_float():
        answer = comparison.groups["answer"]
        if min_agreement is not None:
            held = answer.agreement >= min_agreement
            checks.append(Check(comparison.rung, "agreement", min_agreement, answer.agreement, held))
        if max_kl is not None:
            held = answer.not_finite == 0 and answer.mean_kl <= max_kl
            checks.append(Check(comparison.rung, "kl", max_kl, answer.mean_kl, held))
    return checks
