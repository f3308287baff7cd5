"""Checkpoint/restart of an export: the locked work folder that an interrupted export is resumed from.

The work folder is `.X.work` beside the output X.plan. With `--work-dir`, calibration works in `.export` there, and `.X.work`
holds only what must lie on the same disk as the output. In each of them, the folder `.export` holds the lock and the state:
the fingerprint of the inputs (`begun.json`), the calibrated blocks, and which graphs and plans are complete (`stages.json`).
Nobody else writes into these folders, so whatever is not recorded there is left over from a killed run, and is cleared.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from safetensors import SafetensorError

from qvlm_export.calibrate.blockwise.resume import count_finished_blocks, holds_work
from qvlm_export.calibrate.checkpoint.files import clear_leftovers, read_json, write_json
from qvlm_export.calibrate.checkpoint.safetensors_source import INDEX_FILE
from qvlm_export.calibrate.checkpoint.schema import Bytes, FileName, check_schema, schema_of
from qvlm_export.calibrate.errors import UnfinishedError, UserError
from qvlm_export.engines.manifest import Manifest, read_manifest
from qvlm_export.pipeline.lock import hold_lock
from qvlm_export.pipeline.preparation.outputs import (
    ASIDE,
    BEGUN,
    BLOCKS,
    CALIBRATED,
    LOCK,
    STAGES,
    STAGING,
    WRITTEN,
    scratch_folder,
    state_folder,
)
from qvlm_export.pipeline.publish import remove
from qvlm_export.pipeline.refusals import FULL_DISK, OUT_OF_MEMORY, is_disk_full, refusal_in_words

FINISHED = "finished"
LESS_MEMORY = "--memory lowers what activations take, fewer --samples and --effort rtn lower all of it"


@dataclass(frozen=True)
class _Stage:
    """A record of stages.json, without the details, which the stages know."""

    key: str
    files: Mapping[FileName, Bytes]


_STAGE: Any = schema_of(_Stage, extra="ignore")
_STAGES_SCHEMA: TypeAdapter[Any] = TypeAdapter(dict[str, _STAGE])
_BEGUN_SCHEMA = TypeAdapter(dict[str, str])


@dataclass(frozen=True)
class WorkFolder:
    """The folders that one export works in.

    scratch: `.X.work` beside the output. work_dir: where calibration works; the folder of `--work-dir`, or `scratch` without
    that option.
    """

    scratch: Path
    work_dir: Path

    @property
    def staging(self) -> Path:
        """The folder of the finished files, until they are moved into place."""
        return self.scratch / STAGING

    @property
    def state(self) -> Path:
        """The folder with the fingerprint and the state of calibration."""
        return state_folder(self.work_dir)

    @property
    def written(self) -> Path:
        """The folder of the calibration set that the model writes."""
        return self.state / WRITTEN

    @property
    def own(self) -> Path:
        """The folder in `work_dir` that nobody else writes into: `.export` in that of the user, all of `scratch`."""
        return self.scratch if self.work_dir == self.scratch else self.state

    @property
    def calibrated(self) -> Path:
        """The folder of the calibrated checkpoint, until it is moved into place."""
        return self.own / CALIBRATED

    def count_finished_blocks(self) -> int:
        """Returns how many blocks are calibrated."""
        return count_finished_blocks(self.state)

    def has_unfinished_work(self) -> bool:
        """Returns whether an interrupted export left results that a new one would have to compute again."""
        begun = (self.state / BEGUN).exists()
        return any(stage["files"] for stage in self.completed_stages().values()) or (
            begun
            and (holds_work(self.state) or any(self.written.glob("*.jsonl")) or (self.calibrated / INDEX_FILE).exists())
        )

    def completed_stages(self) -> dict[str, Any]:
        """Returns the records of the stages whose files are complete, by the name of the stage.

        A record is {"key": digest of all that the stage depends on, "files": sizes in bytes by file name, and the details
        given to `record_stage`}.
        """
        return {
            name: stage
            for name, stage in self._read_stages().items()
            if all(_get_size(self.staging / file) == size for file, size in stage["files"].items())
        }

    def _read_stages(self) -> dict[str, Any]:
        return _read_json(state_folder(self.scratch) / STAGES, _STAGES_SCHEMA)

    def record_stage(self, name: str, key: str, files: list[Path], **details: Any) -> None:
        """Records that a stage is complete, once its `files` in the staging folder are synced to disk."""
        for path in files:
            with path.open("rb") as file:
                os.fsync(file.fileno())
        sizes = {path.name: path.stat().st_size for path in files}
        stages = {**self._read_stages(), name: {"key": key, "files": sizes, **details}}
        write_json(state_folder(self.scratch) / STAGES, stages)

    def begin(self, fingerprint: Mapping[str, str], resume: bool) -> None:
        """Prepares the folders for a run: keeps unfinished work when `resume` is set, and clears away useless remains.

        Raises UserError when there is unfinished work but `resume` is not set, or when the work was begun with other inputs
        than `fingerprint` describes.
        """
        if not self.has_unfinished_work():
            self._clear()
        elif not resume:
            raise UserError(
                f"{self.work_dir}: holds the unfinished work of an earlier export ({self.count_finished_blocks()} blocks "
                "are calibrated); add --resume to continue with it, or delete the folder to start over"
            )
        else:
            self._check_fingerprint(fingerprint)
        self._clear_leftovers()
        write_json(self.state / BEGUN, dict(fingerprint))

    def _check_fingerprint(self, fingerprint: Mapping[str, str]) -> None:
        """Raises UserError naming the first input that is not what the work was begun with."""
        begun = _read_json(self.state / BEGUN, _BEGUN_SCHEMA)
        changed = [name for name in dict.fromkeys((*begun, *fingerprint)) if begun.get(name) != fingerprint.get(name)]
        if changed:
            raise UserError(
                f"--resume: {changed[0]} changed since the work in {self.work_dir} was begun; "
                "run the command as it was, or delete the folder to start over"
            )

    def _clear_leftovers(self) -> None:
        """Removes what killed runs were writing: all that is not recorded as complete."""
        self.staging.mkdir(parents=True, exist_ok=True)
        complete = {file for stage in self.completed_stages().values() for file in stage["files"]}
        for path in self.staging.iterdir():
            if path.name not in complete and path.suffix != f".{CALIBRATED}":  # the moved checkpoint has its own index
                remove(path)
        for folder in {self.state, self.written, state_folder(self.scratch)}:
            clear_leftovers(folder)

    def _clear(self) -> None:
        """Removes everything that an earlier export left, except the locks."""
        for path in (self.staging, self.calibrated, self.state / BLOCKS, self.written, self.state / BEGUN):
            remove(path)
        for path in (self.scratch / ASIDE, self.own / ASIDE, state_folder(self.scratch) / STAGES):
            remove(path)

    def close(self) -> None:
        """Ends the work before the results are moved into place: from now on, nothing would have to be computed again."""
        remove(self.state / BLOCKS)
        remove(self.written)

    def remove(self) -> None:
        """Removes everything of the export, the locks last: what a kill leaves behind can then be told from other files."""
        for folder in dict.fromkeys((self.own, self.scratch)):
            for path in (folder / STAGING, folder / ASIDE, folder / CALIBRATED):
                remove(path)
        for path in (self.state, self.scratch):
            remove(path)


@contextmanager
def work_folder(out: Path, work_dir: Path | None) -> Iterator[WorkFolder]:
    """Makes and locks the work folder of `--out out`; afterwards removes the folders that it made, if they are empty.

    Raises UserError when another export holds the lock.
    """
    scratch = scratch_folder(out)
    work = WorkFolder(scratch, work_dir or scratch)
    missing = [folder for base in (scratch, work.work_dir) for folder in (base, *base.parents) if not folder.exists()]
    try:
        with ExitStack() as locks:
            for folder in dict.fromkeys((scratch, work.work_dir)):
                lock, busy = state_folder(folder) / LOCK, f"{folder}: another export is at work here"
                locks.enter_context(hold_lock(lock, busy, "wait for it, or choose another --out and --work-dir"))
            yield work
    finally:
        for folder in missing:
            with suppress(OSError):  # a folder that is not empty holds the export, or unfinished work, and stays
                folder.rmdir()


def read_finished_export(work: WorkFolder, key: str) -> tuple[Manifest, dict[str, Any]] | None:
    """Returns manifest and record of an export that was interrupted when only moving the files into place was left to do.

    The manifest is the last file that is moved, so it may have been. Returns None when there is no such export, or when it
    was begun with other inputs than `key` stands for.
    """
    record = work._read_stages().get(FINISHED, {})
    if record.get("key") != key:
        return None
    places = [
        (folder / name, size) for folder in (work.staging, work.scratch.parent) for name, size in record["files"].items()
    ]
    written = next((path for path, size in places if _get_size(path) == size), None)
    return None if written is None else (read_manifest(written), record)


def explain_failure(error: BaseException, disk_bytes: int, work: WorkFolder) -> BaseException:
    """Returns the error to raise instead of `error`: with its cause, and how to resume when there is work to resume.

    Removes the work folder when it is of no use: when it is empty, or when the input is bad, as the work was begun with
    that input. disk_bytes: how much disk space the whole export needs.
    """
    reported: BaseException = error
    words = refusal_in_words(error)
    if isinstance(error, OSError | SafetensorError | UserError) and is_disk_full(error, work.scratch):
        reported = UnfinishedError(f"{work.scratch.parent}: {FULL_DISK}; {disk_bytes / 2**20:.0f} MiB are needed; free some")
    elif words is not None and words.startswith(OUT_OF_MEMORY):
        reported = UnfinishedError(f"{words.partition(';')[0]}; {LESS_MEMORY}")
    elif words is not None:
        place = f"{work.scratch}: " if isinstance(error, OSError) and error.filename is None else ""
        reported = UnfinishedError(f"{place}{words}")
    if (isinstance(reported, UserError) and not isinstance(reported, UnfinishedError)) or not work.has_unfinished_work():
        work.remove()
        return reported
    hint = f"what was finished is kept in {work.work_dir}; the same command with --resume continues from there"
    if isinstance(reported, KeyboardInterrupt):
        return KeyboardInterrupt(f"interrupted; {hint}")
    return UnfinishedError(f"{reported}; {hint}") if isinstance(reported, UserError) else reported


def _get_size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _read_json(path: Path, schema: TypeAdapter[Any]) -> dict[str, Any]:
    """Returns the JSON object of a file; {} when the file does not exist, as after a kill before it was written."""
    remedy = f"delete {path.parent.parent} and start over"
    try:
        content: dict[str, Any] = read_json(path, "readable: it is damaged", remedy)
    except FileNotFoundError:
        return {}
    check_schema(schema, content, path, "the state of the export", remedy)
    return content
