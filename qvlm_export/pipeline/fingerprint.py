"""Fingerprint of an export's inputs: --resume continues unfinished work only with the inputs that it was begun with.

Checkpoint, schemes, calibration set, effort, device and package versions go in; one digest for each comes out. What can only
change the graphs or engines, such as limits and backends, is left out, so that it may change between two runs.
"""

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
from qvlm_export.checkpoints.files.headers import find_downloads
from qvlm_export.checkpoints.files.snapshot import find_blob, find_origin

PACKAGES = ("qvlm-export", "torch", "transformers", "numpy", "safetensors")  # another version may give other bits
WHOLE_BYTES = 16 * 2**20  # files up to this size are hashed whole; of larger ones, SPOTS pieces of SPOT_BYTES each
SPOTS, SPOT_BYTES = 512, 16 * 2**10


def work_fingerprint(
    checkpoint: Checkpoint,
    linears: Mapping[str, LinearScheme],
    samples: Sequence[Sample],
    effort: str,
    device: str,
    *,
    prefix: Sequence[int] = (),
    strict: bool = False,
    written: bool = False,
) -> dict[str, str]:
    """Returns a digest, or plain text, of everything that the result of calibration depends on.

    Weights on the Hub need not be downloaded yet: they are told apart by the hashes that the Hub gives. The keys are the
    words by which an error message names the part that changed. written: whether the model writes its calibration set; the
    samples then stand in for it.
    """
    parts = {}
    blobs = {download.path: download.blob.name for download in find_downloads(checkpoint.source)}
    for path in checkpoint.source.files():  # paths are left out: the same folder can be given in several ways
        owner = "the checkpoint's" if path.parent == checkpoint.folder else "the vision tower's"
        parts[f"{owner} {path.name}"] = blobs.get(path) or find_blob(path) or file_digest(path)
        if origin := find_origin(path.parent):
            parts[f"{owner} commit"] = f"{origin[0]} {origin[1]}"
    parts["the checkpoint's config.json"] = digest(checkpoint.config_json)
    parts["the scheme or recipe"] = digest({name: asdict(scheme) for name, scheme in linears.items()})
    if linears:
        parts |= {"--calib-data": "self"} if written else {}
        parts["the set of samples"] = samples_digest(samples)
        parts["--effort"] = digest([effort, repr(EFFORTS[effort].config)])
        parts["--device"] = device
        parts["--prefix"] = digest(list(prefix))
        parts["--strict"] = str(strict)
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return parts | {f"the version of {name}": v for name, v in {"python": platform.python_version(), **versions}.items()}


def digest(content: Any) -> str:
    """Returns the sha256, in hexadecimal, of data that JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def samples_digest(samples: Sequence[Sample]) -> str:
    """Returns the sha256 of the samples' tokens, pixels and placements, whatever files they came from."""
    sha256 = hashlib.sha256()
    for sample in samples:
        placement = () if sample.placement is None else (sample.placement.rows, sample.placement.weights)
        for array in (sample.input_ids, sample.pixel_values, *placement):
            sha256.update(repr((array.shape, str(array.dtype), sample.answer_start)).encode())
            sha256.update(array.tobytes())
    return sha256.hexdigest()


def file_digest(path: Path) -> str:
    """Returns the sha256 of a weight file's size, modification time and content.

    Of a file larger than WHOLE_BYTES, only SPOTS evenly spread pieces are read, the header among them: reading 26 GB to
    find that nothing changed would cost as much as the work, and writing to a file changes its modification time.
    """
    status = path.stat()
    sha256 = hashlib.sha256(repr((status.st_size, status.st_mtime_ns)).encode())
    with path.open("rb") as file:
        if status.st_size <= WHOLE_BYTES:
            sha256.update(file.read())
        else:
            for spot in range(SPOTS):
                file.seek(spot * (status.st_size - SPOT_BYTES) // (SPOTS - 1))
                sha256.update(file.read(SPOT_BYTES))
    return sha256.hexdigest()
