"""The manifest of an export, X.json: what was built, from what, and the sha256 of every file.

It lies beside the exported files, carries a hash of itself, and is what a session is opened from. Files are described when
an export writes them, and verified against the manifest when they are opened.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

from qvlm_export.calibrate.checkpoint.files import read_json, write_json
from qvlm_export.calibrate.checkpoint.prefix import PrefixCache, read_prefix
from qvlm_export.calibrate.checkpoint.regular_file import check_regular_file
from qvlm_export.calibrate.checkpoint.schema import check_schema
from qvlm_export.calibrate.errors import UserError
from qvlm_export.engines.config import Limits, ModelConfig
from qvlm_export.engines.manifest_schema import CONFIG, CONTENT, LIMITS, check_config

FORMAT, VERSION = "qvlm-export", 3
READABLE = (1, 2, 3)  # versions; 1 has neither tiles nor several feature layers, 2 no prefix
VERIFY_AT_OPEN_BYTES = 256 * 2**20
_PIECE_BYTES = 2**20


@dataclass(frozen=True)
class Manifest:
    """The content of X.json.

    path: of the manifest itself. linears: linear -> name of its scheme. plan_check: results of the engine precision check,
    one of each linear. interface: part -> inputs and outputs of its graph. files: role (language_onnx, vision_plan, ...) ->
    name, bytes and sha256 of a file; for a folder (processor, calibrated) its name and `files`, path inside -> bytes and
    sha256. Exports made before folders were recorded have only the folder's name; such a folder is not verified.
    generation: eos_token_ids, the tokens that end an answer; empty in older exports, whose tokenizer names one.
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
    generation: Mapping[str, Any] = field(default_factory=dict)

    def file(self, role: str) -> Path:
        """Returns the path of a file or folder. Raises UserError when it is not exported, is missing or has another size."""
        if role not in self.files:
            raise UserError(f"{self.path}: this export has no {role}; export again with the backend that writes it")
        path = self.path.parent / self.files[role]["name"]
        for part in dict.fromkeys((path, *self.recorded_files(role))):
            if not part.exists():
                raise UserError(f"{part}: is missing; it belongs to {self.path.name}, keep the files of an export together")
            if not part.is_dir():
                check_regular_file(part, "a file of an export")
        for part, record in self.recorded_files(role).items():
            expected, size = record.get("bytes"), part.stat().st_size
            if expected is not None and size != expected:
                raise UserError(
                    f"{part}: has {size} bytes, the manifest says {expected}; it was changed or is incomplete, export again"
                )
        return path

    def recorded_files(self, role: str) -> dict[Path, Mapping[str, Any]]:
        """Returns path -> record (bytes and sha256) of a role: one for a file, all files inside for a folder."""
        entry = self.files[role]
        path = self.path.parent / entry["name"]
        if "files" in entry:
            return {path / name: record for name, record in entry["files"].items()}
        return {path: entry} if "bytes" in entry or "sha256" in entry else {}


def write_manifest(manifest: Manifest) -> None:
    """Writes the manifest to its path through a temporary file, sealed with its hash."""
    content = {"format": FORMAT, "version": VERSION, **asdict(manifest)}
    del content["path"]
    content = json.loads(json.dumps(content))  # as it will be read back: tuples become lists, which the hash depends on
    write_json(manifest.path, seal(content))


def seal(content: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the content with the entry `sha256` set to the hash of all other entries."""
    body = {key: value for key, value in content.items() if key != "sha256"}
    return {**body, "sha256": hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()}


def read_manifest(path: Path) -> Manifest:
    """Returns the manifest read from X.json.

    Raises UserError when it is missing, damaged, changed since it was written, or of a newer version.
    """
    try:
        content = read_json(path, "a readable manifest", "export again")
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such manifest; an export writes it beside the plan") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path}: is no manifest of qvlm-export")
    version = content.get("version")
    if isinstance(version, bool) or version not in READABLE:
        raise UserError(f"{path}: manifest version {version}, this program reads {VERSION}; update qvlm-export")
    if content.get("sha256") != seal(content)["sha256"]:
        raise UserError(f"{path}: was changed since the export wrote it, or copied in part; export again")
    return _check_content(path, content)


def _check_content(path: Path, content: Mapping[str, Any]) -> Manifest:
    """Returns the manifest. Raises UserError for a value of another type or range than an export writes."""
    what, remedy = "the manifest", "export again"
    try:
        json.dumps(content, allow_nan=False)
    except ValueError as error:
        raise UserError(f"{path}: {what} is damaged (it holds a number that is not finite); {remedy}") from error
    checked = check_schema(CONTENT, content, path, what, remedy)
    config = check_schema(CONFIG, _fill_older_config(content.get("config")), path, what, remedy, inside="config")
    limits = check_schema(LIMITS, content.get("limits"), path, what, remedy, inside="limits")
    try:
        check_config(config)
    except UserError as error:
        raise UserError(f"{path}: {what} is damaged ({error}); {remedy}") from error
    files = {role: {k: v for k, v in asdict(entry).items() if v is not None} for role, entry in checked.files.items()}
    return Manifest(
        path=path,
        model=content["model"],
        config=config,
        limits=limits,
        float_type=checked.float_type,
        scheme=checked.scheme,
        linears=checked.linears,
        calibration=checked.calibration,
        backend=content["backend"],
        plan_check=tuple(content["plan_check"]),
        interface=content["interface"],
        versions=checked.versions,
        files=files,
        generation=content.get("generation", {}),
    )


def _fill_older_config(content: Any) -> Any:
    """Returns the configuration of a manifest with what version 1 left out, and without what is no longer read.

    There, a tower had one feature layer, and o a bias if q, k and v had one. rope_theta was there before 0.10. What is no
    configuration is returned as it is, for the schema to refuse.
    """
    if not isinstance(content, dict) or not all(isinstance(content.get(part), dict) for part in ("vision", "text")):
        return content
    vision = {"feature_layers": [content["vision"].get("num_layers")], **content["vision"]}
    text = {"output_bias": content["text"].get("attention_bias"), **content["text"]}
    text.pop("rope_theta", None)
    return {**content, "vision": vision, "text": text}


def describe_file(path: Path, stop: Event | None = None) -> dict[str, Any]:
    """Returns name, bytes and sha256 of a file, which is read once, in pieces.

    stop: when another thread sets it, CancelledError is raised.
    """
    digest, piece = hashlib.sha256(), memoryview(bytearray(_PIECE_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(piece):
            if stop is not None and stop.is_set():
                raise CancelledError
            digest.update(piece[:count])
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def describe_folder(path: Path, stop: Event | None = None) -> dict[str, Any]:
    """Returns the name of a folder and `files`, path inside (with slashes) -> bytes and sha256."""
    described = {name: describe_file(path / name, stop) for name in _list_files(path)}
    return {
        "name": path.name,
        "files": {name: {k: d[k] for k in ("bytes", "sha256")} for name, d in described.items()},
    }


def describe(path: Path, stop: Event | None = None) -> dict[str, Any]:
    """Returns the description of a file or of a folder, see `describe_file` and `describe_folder`."""
    return describe_folder(path, stop) if path.is_dir() else describe_file(path, stop)


@contextmanager
def describe_in_background(paths: Mapping[str, Path]) -> Iterator[Callable[[], dict[str, dict[str, Any]]]]:
    """Describes finished files on another thread; yields a function that waits and returns name -> description.

    Hashing gigabytes takes a core that a build, which runs in another process, leaves idle. Leaving the context stops it.
    """
    stop = Event()
    with ThreadPoolExecutor(1) as pool:
        descriptions = pool.submit(lambda: {name: describe(path, stop) for name, path in paths.items()})
        try:
            yield descriptions.result
        finally:
            stop.set()


def _list_files(folder: Path) -> list[str]:
    """Returns the paths of all files inside, sorted; hidden files and links to folders are among them."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(path.as_posix() for path in paths)


def verify_file(manifest: Manifest, role: str) -> Path:
    """Returns the path of a file or folder that is about to be opened, after verifying it.

    Files of more than VERIFY_AT_OPEN_BYTES are checked for their size only, because hashing gigabytes at every start would
    take seconds; `qvlm-inspect --verify` hashes them too. Raises UserError when anything was changed.
    """
    path = manifest.file(role)
    _check_unlisted_files(manifest, role, hidden=False)
    for part, record in manifest.recorded_files(role).items():
        if "sha256" in record and record["bytes"] <= VERIFY_AT_OPEN_BYTES:
            _check_hash(part, record)
    return path


def open_prefix(manifest: Manifest) -> PrefixCache | None:
    """Returns the prefix cache of an export, None where it has none. Raises UserError when it is missing or was changed."""
    if "prefix" not in manifest.files:
        return None
    text = manifest.config.text
    return read_prefix(verify_file(manifest, "prefix"), (text.num_layers, text.num_kv_heads, text.head_dim))


def check_intact(manifest: Manifest, role: str) -> None:
    """Raises UserError unless a file or folder is as it was written: in names and sizes, and if it is small, in hashes."""
    records = manifest.recorded_files(role)
    if not records and "files" not in manifest.files[role]:
        raise UserError(f"{manifest.files[role]['name']}: its content was not recorded by that export; export again")
    manifest.file(role)
    _check_unlisted_files(manifest, role, hidden=True)
    if sum(record["bytes"] for record in records.values()) <= VERIFY_AT_OPEN_BYTES:
        for part, record in records.items():
            if "sha256" in record:
                _check_hash(part, record)


def verify_files(manifest: Manifest, progress: Callable[[float], None] = lambda _: None) -> list[Path]:
    """Verifies every file that has a sha256 and returns their paths. progress: called with the fraction of files read.

    Raises UserError naming the first file that is missing, has another size or another content, or lies in a folder of the
    export without being part of it; also when no file has a hash.
    """
    hashed: dict[Path, Mapping[str, Any]] = {}
    for role in manifest.files:
        records = {path: record for path, record in manifest.recorded_files(role).items() if "sha256" in record}
        if records:
            manifest.file(role)
            _check_unlisted_files(manifest, role, hidden=True)
        hashed |= records
    if not hashed:
        raise UserError(f"{manifest.path}: lists no sha256, so nothing can be verified; export again")
    for index, (path, record) in enumerate(hashed.items()):
        _check_hash(path, record)
        progress((index + 1) / len(hashed))
    return list(hashed)


def _check_unlisted_files(manifest: Manifest, role: str, *, hidden: bool) -> None:
    """Raises UserError for a file that the manifest does not list: one more file can change what a processor does.

    hidden: whether hidden files count. Desktops and download tools leave them and no session opens them, so it minds none;
    but a verified folder holds nothing that the export did not write.
    """
    entry = manifest.files[role]
    folder = manifest.path.parent / entry["name"]
    if "files" not in entry:
        return
    unlisted = set(_list_files(folder)) - set(entry["files"])
    if not hidden:
        unlisted = {name for name in unlisted if not any(part.startswith(".") for part in name.split("/"))}
    if unlisted:
        raise UserError(f"{folder / min(unlisted)}: is not part of this export; take it away, or export again")


def _check_hash(path: Path, entry: Mapping[str, Any]) -> None:
    try:
        actual = describe_file(path)["sha256"]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}), so it cannot be verified") from error
    if actual != entry["sha256"]:
        raise UserError(
            f"{path}: its sha256 is {actual[:12]}…, the manifest says {entry['sha256'][:12]}…; it was changed, export again"
        )
