"""X.json, the manifest beside the plan: what was built, from what, and the hash of every file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event
from typing import Any

from qvlm_export.calibrate.checkpoint.calibrated import write_json
from qvlm_export.calibrate.errors import UserError
from qvlm_export.engines.config import Limits, ModelConfig, ProjectorConfig, TextConfig, TileConfig, VisionConfig

FORMAT, VERSION = "qvlm-export", 2
READABLE = (1, 2)  # 1 knew neither tiles nor several feature layers
VERIFY_AT_OPEN_BYTES = 256 * 2**20
_PIECE_BYTES = 2**20


@dataclass(frozen=True)
class Manifest:
    """path: of the manifest itself. files: by role (language_onnx, vision_plan, …) name, bytes and sha256; folders
    (processor, calibrated) have a name and `files`, bytes and sha256 by the path inside. Exports made before folders were
    recorded have a name alone; what is not recorded is not verified, and said to be so.
    """

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
        for part in dict.fromkeys((path, *self.recorded(role))):
            if not part.exists():
                raise UserError(f"{part}: is missing; it belongs to {self.path.name}, keep the files of an export together")
        for part, facts in self.recorded(role).items():
            wanted, found = facts.get("bytes"), part.stat().st_size
            if wanted is not None and found != wanted:
                raise UserError(
                    f"{part}: has {found} bytes, the manifest says {wanted}; it was changed or is incomplete, export again"
                )
        return path

    def recorded(self, role: str) -> dict[Path, Mapping[str, Any]]:
        """The files of a role with what the manifest says of each: one for a file, those inside for a folder."""
        entry = self.files[role]
        path = self.path.parent / entry["name"]
        if "files" in entry:
            return {path / name: facts for name, facts in entry["files"].items()}
        return {path: entry} if "bytes" in entry or "sha256" in entry else {}


def write_manifest(manifest: Manifest) -> None:
    """Writes the manifest to its path, through a temporary file."""
    content = {"format": FORMAT, "version": VERSION, **asdict(manifest)}
    del content["path"]
    content = json.loads(json.dumps(content))  # as it will be read, tuples turned to lists
    write_json(manifest.path, seal(content))


def seal(content: Mapping[str, Any]) -> dict[str, Any]:
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
    if content.get("version") not in READABLE:
        raise UserError(
            f"{path}: manifest version {content.get('version')}, this program reads {VERSION}; update qvlm-export"
        )
    if content.get("sha256") != seal(content)["sha256"]:
        raise UserError(f"{path}: was changed since the export wrote it, or copied in part; export again")
    try:
        return Manifest(
            path=path,
            model=content["model"],
            config=_model_config(content["config"]),
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


def _model_config(content: Mapping[str, Any]) -> ModelConfig:
    """Of version 1 too, where a tower had one feature layer, and `o` a bias if q, k and v had."""
    vision, text, tiles = content["vision"], content["text"], content.get("tiles")
    features = vision.get("feature_layers", [vision["num_layers"]])
    text = {"output_bias": text["attention_bias"], **text}
    return ModelConfig(
        vision=VisionConfig(**{**vision, "feature_layers": tuple(features)}),
        projector=ProjectorConfig(**content["projector"]),
        text=TextConfig(**text),
        image_token_id=content["image_token_id"],
        tiles=None if tiles is None else TileConfig(**{**tiles, "pinpoints": tuple(map(tuple, tiles["pinpoints"]))}),
    )


def describe_file(path: Path, stop: Event | None = None) -> dict[str, Any]:
    """Name, size and sha256 of a file, read once in pieces. stop: set by another thread, ends it with CancelledError."""
    digest, piece = hashlib.sha256(), memoryview(bytearray(_PIECE_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(piece):
            if stop is not None and stop.is_set():
                raise CancelledError
            digest.update(piece[:count])
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def describe_folder(path: Path, stop: Event | None = None) -> dict[str, Any]:
    """Name of a folder, and size and sha256 of every file in it, by its path inside with slashes."""
    described = {name: describe_file(path / name, stop) for name in _names_inside(path)}
    return {"name": path.name, "files": {name: {k: d[k] for k in ("bytes", "sha256")} for name, d in described.items()}}


def describe(path: Path, stop: Event | None = None) -> dict[str, Any]:
    """Either of the two."""
    return describe_folder(path, stop) if path.is_dir() else describe_file(path, stop)


@contextmanager
def describe_in_background(paths: Mapping[str, Path]) -> Iterator[Callable[[], dict[str, dict[str, Any]]]]:
    """Describes finished files on a thread of its own; what is yielded waits for that and gives it by the same names.

    Hashing gigabytes takes a core that a build, which has its own process, does not use. Leaving ends it.
    """
    stop = Event()
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(lambda: {name: describe(path, stop) for name, path in paths.items()})
        try:
            yield found.result
        finally:
            stop.set()


def _names_inside(folder: Path) -> list[str]:
    """Hidden files, such as those of desktops and download tools, do not count: nothing reads them."""
    names = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(name.as_posix() for name in names if not any(part.startswith(".") for part in name.parts))


def verify_file(manifest: Manifest, role: str) -> Path:
    """The path of a file or folder about to be opened, every sha256 compared first unless of more than VERIFY_AT_OPEN_BYTES.

    Raises UserError when it was changed. Hashing gigabytes at every start would cost seconds; `qvlm-inspect --verify` does.
    """
    path = manifest.file(role)
    _check_strangers(manifest, role)
    for part, facts in manifest.recorded(role).items():
        if "sha256" in facts and facts["bytes"] <= VERIFY_AT_OPEN_BYTES:
            _check_hash(part, facts)
    return path


def verify_files(manifest: Manifest, progress: Callable[[float], None] = lambda _: None) -> list[Path]:
    """Reads every file that has a sha256; returns them, all as they were written. progress(fraction of files read).

    Raises UserError naming the first file that is missing, has another size or another content, or lies in a folder of the
    export without being part of it, and when none has a hash.
    """
    hashed: dict[Path, Mapping[str, Any]] = {}
    for role in manifest.files:
        found = {path: facts for path, facts in manifest.recorded(role).items() if "sha256" in facts}
        if found:
            manifest.file(role)
            _check_strangers(manifest, role)
        hashed |= found
    if not hashed:
        raise UserError(f"{manifest.path}: lists no sha256, so nothing can be verified; export again")
    for number, (path, facts) in enumerate(hashed.items()):
        _check_hash(path, facts)
        progress((number + 1) / len(hashed))
    return list(hashed)


def _check_strangers(manifest: Manifest, role: str) -> None:
    """A file more in a folder can change what a processor does as much as another content."""
    entry = manifest.files[role]
    folder = manifest.path.parent / entry["name"]
    if "files" in entry and (added := set(_names_inside(folder)) - set(entry["files"])):
        raise UserError(f"{folder / min(added)}: is not part of this export; take it away, or export again")


def _check_hash(path: Path, entry: Mapping[str, Any]) -> None:
    try:
        found = describe_file(path)["sha256"]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}), so it cannot be verified") from error
    if found != entry["sha256"]:
        raise UserError(
            f"{path}: its sha256 is {found[:12]}…, the manifest says {entry['sha256'][:12]}…; it was changed, export again"
        )
