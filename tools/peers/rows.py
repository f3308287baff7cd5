"""Rows of the methods benchmark for released peers: recipe, line of the summary table, and schemes of each."""

from __future__ import annotations

from dataclasses import dataclass

ALL = ("W8A8", "W4A16", "W3A16", "W4A8", "W6A6", "W4A4")
WEIGHTS_ONLY = ("W4A16", "W3A16")
ACTIVATIONS = ("W8A8", "W4A8", "W6A6", "W4A4")
LOW = ("W4A8", "W6A6", "W4A4")

RELEASED, BY_HAND = "modelopt, best as released", "modelopt, smoothed at W8A8, then bits lowered (by hand)"
COMPRESSOR, ROUND = "llmcompressor, best", "auto-round, 200 steps"


@dataclass(frozen=True)
class PeerRow:
    """One recipe of one peer.

    line: the line of the summary table, which shows the best of its recipes in each column. columns: the schemes that the
    recipe supports. main: the columns that are run by default, in which the recipe was the best or close to it on the first
    calibration seed; llmcompressor's plain GPTQ is run in all columns, because the time of `fast` is compared with it. The
    other columns are run with --extra only.
    """

    peer: str
    recipe: str
    line: str
    columns: tuple[str, ...]
    main: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name of the row, such as "llmcompressor: gptq"."""
        return f"{self.peer}: {self.recipe}"


ROWS = (
    PeerRow("modelopt", "max", RELEASED, ALL),
    PeerRow("modelopt", "mse", RELEASED, ALL),
    PeerRow("modelopt", "gptq", RELEASED, ALL, ("W4A16", "W3A16")),
    PeerRow("modelopt", "smoothquant 0.5", RELEASED, ("W8A8",), ("W8A8",)),
    PeerRow("modelopt", "smoothquant 1.0", RELEASED, ("W8A8",)),
    PeerRow("modelopt", "smoothquant 0.5 + gptq", RELEASED, ("W8A8",), ("W8A8",)),
    PeerRow("modelopt", "awq_lite", RELEASED, ALL, ("W4A16", "W4A8", "W6A6", "W4A4")),
    PeerRow("modelopt", "awq_full", RELEASED, ("W4A16", "W3A16", "W4A8", "W4A4")),
    PeerRow("modelopt", "awq_lite + gptq", RELEASED, ALL, ("W4A8", "W6A6", "W4A4")),
    PeerRow("modelopt", "two-step 0.5, max", BY_HAND, LOW),
    PeerRow("modelopt", "two-step 0.5, mse", BY_HAND, LOW, ("W6A6",)),
    PeerRow("modelopt", "two-step 0.5, gptq", BY_HAND, LOW, LOW),
    PeerRow("modelopt", "two-step 1.0, gptq", BY_HAND, LOW),
    PeerRow("llmcompressor", "rtn", COMPRESSOR, ALL),
    PeerRow("llmcompressor", "gptq", COMPRESSOR, ALL, ALL),
    PeerRow("llmcompressor", "gptq, mse", COMPRESSOR, ALL),
    PeerRow("llmcompressor", "awq", COMPRESSOR, ALL),
    PeerRow("llmcompressor", "awq + gptq", COMPRESSOR, ALL, ALL),
    PeerRow("llmcompressor", "smoothquant", COMPRESSOR, ACTIVATIONS),
    PeerRow("llmcompressor", "smoothquant + gptq", COMPRESSOR, ALL, ALL),
    PeerRow("llmcompressor", "smoothquant + gptq, mse", COMPRESSOR, ALL),
    PeerRow("autoround", "200 steps", ROUND, WEIGHTS_ONLY, WEIGHTS_ONLY),
)
