"""Default thresholds of a validation: shares of tokens, KL divergences in nats per token, relative errors."""

from __future__ import annotations

# Thresholds on answer tokens against the float checkpoint, unless the command line says otherwise.
MIN_AGREEMENT, MAX_KL = 0.8, 0.5
# What a graph may differ from the form it was made from, and an engine from its graph: they are the same model, up to values
# that are rounded to the neighbouring code. On all tokens.
SAME_AGREEMENT, SAME_KL = 0.95, 0.05
SAME_FORWARD = 1e-3  # relative L2 error of two forward passes in float32
