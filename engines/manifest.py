"""X.json, the manifest beside the plan: what was built, from what, and the hash of every file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from calibrate.calibrated import write_json
from calibrate.errors import UserError
from engines.config import Limits, ModelConfig, ProjectorConfig, TextConfig, VisionConfig

FORMAT, VERSION = "qvlm-export", 1
VERIFY_AT_OPEN_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Manifest:
    """path: of the manifest itself; `files` maps a role (language_onnx, vision_plan, …) to name, bytes and sha256."""

    path: Path
    model: Mapping[str, Any]
    config: ModelConfig
    limits: Limits
    float_type: str
    scheme: str
    linears: Mapping[str, str]
    calibration: Mapping[str, Any]
    backend: Mapping[str, Any]
    plan_check: tuple[Mapping[str, Any], ...]
    interface: Mapping[str, Any]
    versions: Mapping[str, str]
    files: Mapping[str, Mapping[str, Any]]

    def file(self, role: str) -> Path:
        """The path of a file or folder. Raises UserError when it was not exported, is gone, or has another size."""
        if role not in self.files:
            raise UserError(f"{self.path}: this export has no {role}; export again with the backend that writes it")
        path = self.path.parent / self.files[role]["name"]
        if not path.exists():
            raise UserError(f"{path}: is missing; it belongs to {self.path.name}, keep the files of an export together")
        wanted, found = self.files[role].get("bytes"), path.stat().st_size
        if wanted is not None and found != wanted:
            raise UserError(
                f"{path}: has {found} bytes, the manifest says {wanted}; it was changed or is incomplete, export again"
            )
        return path


def write_manifest(manifest: Manifest) -> None:
    """Writes the manifest to its path, through a temporary file."""
    content = {"format": FORMAT, "version": VERSION, **asdict(manifest)}
    del content["path"]
    content = json.loads(json.dumps(content))  # as it will be read, tuples turned to lists
    write_json(manifest.path, sealed(content))


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest's content with the sha256 of everything else in it."""
    rest = {key: value for key, value in content.items() if key != "sha256"}
    return {**rest, "sha256": hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()}


def read_manifest(path: Path) -> Manifest:
    """Reads X.json. Raises UserError when it is missing, damaged, changed by hand, or newer than this program."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such manifest; an export writes it beside the plan") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a readable manifest ({error}); export again") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path}: is no manifest of qvlm-export")
    if content.get("version") != VERSION:
        raise UserError(
            f"{path}: manifest version {content.get('version')}, this program reads {VERSION}; update qvlm-export"
        )
    if content.get("sha256") != sealed(content)["sha256"]:
        raise UserError(f"{path}: was changed since the export wrote it, or copied in part; export again")
    try:
        config = content["config"]
        return Manifest(
            path=path,
            model=content["model"],
            config=ModelConfig(
                vision=VisionConfig(**config["vision"]),
                projector=ProjectorConfig(**config["projector"]),
                text=TextConfig(**config["text"]),
                image_token_id=config["image_token_id"],
            ),
            limits=Limits(**content["limits"]),
            float_type=content["float_type"],
            scheme=content["scheme"],
            linears=content["linears"],
            calibration=content["calibration"],
            backend=content["backend"],
            plan_check=tuple(content["plan_check"]),
            interface=content["interface"],
            versions=content["versions"],
            files=content["files"],
        )
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: the manifest is damaged ({error!r}); export again") from error


def describe_file(path: Path) -> dict[str, Any]:
    """Name, size and sha256 of a file, read once in pieces."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": digest}


def verified_file(manifest: Manifest, role: str) -> Path:
    """The path of a file about to be opened, its sha256 compared first unless it is larger than VERIFY_AT_OPEN_BYTES.

    Raises UserError when it was changed. Hashing gigabytes at every start would cost seconds; `qvlm-inspect --verify` does.
    """
    path, entry = manifest.file(role), manifest.files[role]
    if "sha256" in entry and entry["bytes"] <= VERIFY_AT_OPEN_BYTES:
        _check_hash(path, entry)
    return path


def verify_files(manifest: Manifest, progress: Callable[[float], None] = lambda _: None) -> list[str]:
    """Reads every file that has a sha256; returns the names, all as they were written. progress(fraction of files read).

    Raises UserError naming the first file that is missing, has another size or another content, and when none has a hash.
    """
    hashed = {role: entry for role, entry in manifest.files.items() if "sha256" in entry}
    if not hashed:
        raise UserError(f"{manifest.path}: lists no sha256, so nothing can be verified; export again")
    for number, (role, entry) in enumerate(hashed.items()):
        _check_hash(manifest.file(role), entry)
        progress((number + 1) / len(hashed))
    return [entry["name"] for entry in hashed.values()]


def _check_hash(path: Path, entry: Mapping[str, Any]) -> None:
    try:
        found = describe_file(path)["sha256"]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}), so it cannot be verified") from error
    if found != entry["sha256"]:
        raise UserError(
            f"{path}: its sha256 is {found[:12]}…, the manifest says {entry['sha256'][:12]}…; it was changed, export again"
        )
