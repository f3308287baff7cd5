"""calibrate/calibrators/efforts.py"""

from __future__ import annotations

from qvlm_export.calibrate.quantization.config import FAST, FULL

METHODS = {"fast": FAST, "full": FULL}
