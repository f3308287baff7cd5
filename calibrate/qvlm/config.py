"""Configuration of Q-VLM (arXiv 2410.08119), as data; loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# Which layers are searched jointly. entropy: those of the paper's rule. layers: every layer is searched on its own.
Partition = Literal["entropy", "layers"]


@dataclass(frozen=True)
class QvlmConfig:
    """How layers are partitioned, and how the visual encoder is optimized before it is quantized.

    vision_epochs: passes over the samples that the visual encoder is optimized on; 0 for no optimization. vision_samples:
    how many samples these are, at most. vision_batch: samples in one step. These three are the paper's. entropy_weight,
    error_weight: its lambda_1 and lambda_2, for terms that are 1 at the start; it gives no values. vision_rate: learning
    rate, relative to the root mean square of each tensor. seed: of the order in which the samples are drawn, and of the
    probes that gradients are measured with.
    """

    partition: Partition = "entropy"
    vision_epochs: int = 10
    vision_samples: int = 64
    vision_batch: int = 8
    entropy_weight: float = 1.0
    error_weight: float = 1.0
    vision_rate: float = 1e-2
    seed: int = 0


QVLM = QvlmConfig()
