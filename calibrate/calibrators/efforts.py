"""The efforts of `--effort`, a row each: the one table of what a user can choose and what is then done.

The table loads no torch, so that the command's help can be made of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qvlm_export.calibrate.quantization.config import FAST, FULL, SearchConfig
from qvlm_export.calibrate.qvlm.config import QVLM, QvlmConfig

if TYPE_CHECKING:
    from qvlm_export.calibrate.blockwise.job import CalibrationJob, Progress
    from qvlm_export.calibrate.checkpoint.calibrated import CalibratedWriter

# How linears are quantized: by the block-wise search, by Q-VLM, or by round-to-nearest (None).
EffortConfig = SearchConfig | QvlmConfig | None


@dataclass(frozen=True)
class Effort:
    """One value of `--effort`. summary: text for the help. config: what is done; its type says by which calibrator."""

    name: str
    summary: str
    config: EffortConfig = None


EFFORTS = {
    effort.name: effort
    for effort in (
        Effort("rtn", "absmax ranges, round to nearest"),
        Effort("fast", "equalization, GPTQ towards the float model's output", FAST),
        Effort(
            "full",
            "fast, with rounding by the effect on the predicted tokens (Kronecker-factored), measured by gradients",
            FULL,
        ),
        Effort("qvlm", "the Q-VLM paper's method, as a baseline; W8A8 everywhere, as with --strict", QVLM),
    )
}
DEFAULT_EFFORT = "rtn"


def run_effort(name: str, job: CalibrationJob, writer: CalibratedWriter, progress: Progress) -> dict[str, Any]:
    """Calibrates into `writer`'s folder with the effort of this name; returns the summary for the record.

    Raises UserError naming tensor or layer when weights or activations are not finite.
    """
    from qvlm_export.calibrate.calibrators.rtn import calibrate_rtn
    from qvlm_export.calibrate.calibrators.search import calibrate_search
    from qvlm_export.calibrate.qvlm.calibrator import calibrate_qvlm

    match EFFORTS[name].config:
        case None:
            return calibrate_rtn(job, writer, progress)
        case QvlmConfig() as config:
            return calibrate_qvlm(job, writer, progress, config)
        case config:
            return calibrate_search(job, writer, progress, config)
