"""What a piece of work was begun with, so that --resume goes on with nothing else."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qvlm_export.calibrate.calibrators.efforts import EFFORTS
from qvlm_export.calibrate.checkpoint.samples import Sample
from qvlm_export.calibrate.checkpoint.scheme import LinearScheme
from qvlm_export.checkpoints.checkpoint import Checkpoint

PACKAGES = ("qvlm-export", "torch", "transformers", "numpy", "safetensors")  # whose versions may change a bit
WHOLE_BYTES = 16 * 2**20  # of a file that is read whole; of a larger one SPOTS pieces are
SPOTS, SPOT_BYTES = 512, 16 * 2**10


def work_fingerprint(
    checkpoint: Checkpoint, linears: Mapping[str, LinearScheme], samples: Sequence[Sample], effort: str, device: str
) -> dict[str, str]:
    """By the words that name it in a refusal: a digest of everything that decides what calibration finds."""
    parts = {f"the checkpoint's {path.name} ({path.parent})": file_digest(path) for path in checkpoint.source.files()}
    parts["the checkpoint's config.json"] = digest(checkpoint.config_json)
    parts["the scheme or recipe"] = digest({name: asdict(scheme) for name, scheme in linears.items()})
    if linears:
        parts["the set of samples"] = samples_digest(samples)
        parts["--effort"] = digest([effort, repr(EFFORTS[effort].config)])
        parts["--device"] = device
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return parts | {f"the version of {name}": v for name, v in {"python": platform.python_version(), **versions}.items()}


def digest(content: Any) -> str:
    """sha256 of plain data."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def samples_digest(samples: Sequence[Sample]) -> str:
    """Of tokens, pixels and placements, whatever files they came from."""
    found = hashlib.sha256()
    for sample in samples:
        placed = () if sample.placement is None else (sample.placement.rows, sample.placement.weights)
        for array in (sample.input_ids, sample.pixel_values, *placed):
            found.update(repr((array.shape, str(array.dtype), sample.answer_start)).encode())
            found.update(array.tobytes())
    return found.hexdigest()


def file_digest(path: Path) -> str:
    """Of a weight file: its size, when it was changed, and its content at SPOTS places spread over it, the header first.

    Reading 26 GB to say that nothing happened would cost as much as the work; a file that was written to has another time.
    """
    facts = path.stat()
    found = hashlib.sha256(repr((facts.st_size, facts.st_mtime_ns)).encode())
    with path.open("rb") as file:
        if facts.st_size <= WHOLE_BYTES:
            found.update(file.read())
        else:
            for spot in range(SPOTS):
                file.seek(spot * (facts.st_size - SPOT_BYTES) // (SPOTS - 1))
                found.update(file.read(SPOT_BYTES))
    return found.hexdigest()
