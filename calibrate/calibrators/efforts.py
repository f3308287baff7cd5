"""The efforts of `--effort`, a row each: the one table of what a user can choose and what is then done.

The table loads no torch, so that the command's help can be made of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qvlm_export.calibrate.quantization.config import FAST, FULL, SearchConfig

if TYPE_CHECKING:
    from qvlm_export.calibrate.blockwise.job import CalibrationJob, Progress
    from qvlm_export.calibrate.checkpoint.calibrated import CalibratedWriter


@dataclass(frozen=True)
class Effort:
    """One value of `--effort`. summary: text for the help. config: of the block-wise search; None for round-to-nearest."""

    name: str
    summary: str
    config: SearchConfig | None = None


EFFORTS = {
    effort.name: effort
    for effort in (
        Effort("rtn", "absmax ranges, round to nearest"),
        Effort("fast", "equalization, GPTQ towards the float model's output", FAST),
        Effort("full", "more prompts, Kronecker-factored rounding weighted by gradients, learned rounding", FULL),
    )
}
DEFAULT_EFFORT = "rtn"


def run_effort(name: str, job: CalibrationJob, writer: CalibratedWriter, progress: Progress) -> dict[str, Any]:
    """Calibrates into `writer`'s folder with the effort of this name; returns the summary for the record.

    Raises UserError naming tensor or layer when weights or activations are not finite.
    """
    from qvlm_export.calibrate.calibrators.rtn import calibrate_rtn
    from qvlm_export.calibrate.calibrators.search import calibrate_search

    config = EFFORTS[name].config
    return calibrate_rtn(job, writer, progress) if config is None else calibrate_search(job, writer, progress, config)
