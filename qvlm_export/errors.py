"""The errors that callers may catch: `UserError` for bad input, `UnfinishedError` for work that can be resumed."""

from __future__ import annotations

from qvlm_export.calibrate.errors import UnfinishedError, UserError

__all__ = ["UnfinishedError", "UserError"]
