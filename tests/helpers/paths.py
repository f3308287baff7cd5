"""Paths of the repository and of the tiny model."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "qvlm_export" / "tiny"
