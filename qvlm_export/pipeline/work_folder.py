"""Checkpoint/restart of an export: the locked work folder that an interrupted export is resumed from.

The work folder is `.X.work` beside the output X.plan. With `--work-dir`, calibration works there, and `.X.work` holds only
what must lie on the same disk as the output. In each of them, the folder `.export` holds the lock and the state: the
fingerprint of the inputs (`begun.json`), the calibrated blocks, and which graphs and plans are complete (`stages.json`).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from qvlm_export.calibrate.blockwise.resume import count_finished_blocks, holds_work
from qvlm_export.calibrate.checkpoint.calibrated import write_json
from qvlm_export.calibrate.checkpoint.safetensors_source import INDEX_FILE
from qvlm_export.calibrate.errors import UnfinishedError, UserError
from qvlm_export.engines.manifest import Manifest, read_manifest
from qvlm_export.pipeline.lock import hold_lock
from qvlm_export.pipeline.preparation.preflight import calibrated_folder, scratch_folder
from qvlm_export.pipeline.publish import is_disk_full

FINISHED = "finished"
LESS_MEMORY = "--memory lowers what activations take, fewer --samples and --effort rtn lower all of it"
STATE, BEGUN, STAGES = ".export", "begun.json", "stages.json"


@dataclass(frozen=True)
class WorkFolder:
    """The folders that one export works in.

    scratch: `.X.work` beside the output. work_dir: where calibration works and its checkpoint is written; the folder of
    `--work-dir`, or `scratch` without that option.
    """

    scratch: Path
    work_dir: Path

    @property
    def staging(self) -> Path:
        """The folder of the finished files, until they are moved into place."""
        return self.scratch / "out"

    @property
    def state(self) -> Path:
        """The folder with the fingerprint and the state of calibration."""
        return self.work_dir / STATE

    @property
    def calibrated(self) -> Path:
        """The folder of the calibrated checkpoint."""
        return calibrated_folder(self.work_dir)

    def count_finished_blocks(self) -> int:
        """Returns how many blocks are calibrated."""
        return count_finished_blocks(self.state)

    def has_unfinished_work(self) -> bool:
        """Returns whether an interrupted export left results that a new one would have to compute again."""
        begun = (self.state / BEGUN).exists()
        return bool(self.completed_stages()) or (
            begun and (holds_work(self.state) or (self.calibrated / INDEX_FILE).exists())
        )

    def completed_stages(self) -> dict[str, Any]:
        """Returns the records of the stages whose files are complete, by the name of the stage.

        A record is {"key": digest of all that the stage depends on, "files": sizes in bytes by file name, and the details
        given to `record_stage`}.
        """
        content = _read_json(self.scratch / STATE / STAGES)
        return {
            name: stage
            for name, stage in content.items()
            if all(_get_size(self.staging / file) == size for file, size in stage["files"].items())
        }

    def record_stage(self, name: str, key: str, files: list[Path], **details: Any) -> None:
        """Records that a stage is complete, once its `files` in the staging folder are synced to disk."""
        for path in files:
            with path.open("rb") as file:
                os.fsync(file.fileno())
        sizes = {path.name: path.stat().st_size for path in files}
        stages = {**_read_json(self.scratch / STATE / STAGES), name: {"key": key, "files": sizes, **details}}
        write_json(self.scratch / STATE / STAGES, stages)

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
        self.staging.mkdir(parents=True, exist_ok=True)
        for path in (*self.staging.glob(".*"), *self.staging.glob("*.tmp")):  # files that a killed run was writing
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        write_json(self.state / BEGUN, dict(fingerprint))

    def _check_fingerprint(self, fingerprint: Mapping[str, str]) -> None:
        """Raises UserError naming the first input that is not what the work was begun with."""
        begun = _read_json(self.state / BEGUN)
        changed = [name for name in dict.fromkeys((*begun, *fingerprint)) if begun.get(name) != fingerprint.get(name)]
        if changed:
            raise UserError(
                f"--resume: {changed[0]} changed since the work in {self.work_dir} was begun; "
                "run the command as it was, or delete the folder to start over"
            )

    def _clear(self) -> None:
        """Removes everything that an earlier export left, except the locks."""
        for folder in (self.staging, self.calibrated, self.state / "blocks"):
            shutil.rmtree(folder, ignore_errors=True)
        for path in (self.state / BEGUN, self.scratch / STATE / STAGES):
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Ends the work before the results are moved into place: from now on, nothing would have to be computed again."""
        (self.state / BEGUN).unlink(missing_ok=True)
        shutil.rmtree(self.state / "blocks", ignore_errors=True)

    def remove(self) -> None:
        """Removes everything of the export except the calibrated checkpoint in `--work-dir`."""
        if self.work_dir != self.scratch:
            shutil.rmtree(self.state, ignore_errors=True)
        shutil.rmtree(self.scratch, ignore_errors=True)


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
                busy, remedy = (
                    f"{folder}: another export is at work here",
                    "wait for it, or choose another --out and --work-dir",
                )
                locks.enter_context(hold_lock(folder / STATE / "lock", busy, remedy))
            yield work
    finally:
        for folder in missing:
            with suppress(OSError):  # a folder that is not empty holds the export, or unfinished work, and stays
                folder.rmdir()


def read_finished_export(work: WorkFolder, key: str) -> Manifest | None:
    """Returns the manifest of an export that was interrupted when only moving the files into place was left to do.

    Returns None when there is no such export, or when it was begun with other inputs than `key` stands for.
    """
    record = work.completed_stages().get(FINISHED, {})
    if record.get("key") != key:
        return None
    (name,) = record["files"]
    return read_manifest(work.staging / name)


def explain_failure(error: BaseException, disk_bytes: int, work: WorkFolder) -> BaseException:
    """Returns the error to raise instead of `error`: with its cause, and how to resume when there is work to resume.

    Removes the work folder when it is of no use: when it is empty, or when the input is bad, as the work was begun with
    that input. disk_bytes: how much disk space the whole export needs.
    """
    reported: BaseException = error
    if isinstance(error, OSError | SafetensorError | UserError) and is_disk_full(error, work.scratch):
        reported = UnfinishedError(
            f"{work.scratch.parent}: the disk is full; {disk_bytes / 2**20:.0f} MiB are needed; free some"
        )
    elif is_out_of_memory(error):
        reported = UnfinishedError(f"memory ran out; {LESS_MEMORY}")
    if (isinstance(reported, UserError) and not isinstance(reported, UnfinishedError)) or not work.has_unfinished_work():
        work.remove()
        return reported
    hint = f"what was finished is kept in {work.work_dir}; the same command with --resume continues from there"
    if isinstance(reported, KeyboardInterrupt):
        return KeyboardInterrupt(f"interrupted; {hint}")
    return UnfinishedError(f"{reported}; {hint}") if isinstance(reported, UserError) else reported


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether `error` says that memory ran out, of the host or of the GPU.

    torch raises a plain RuntimeError on a CPU and a subclass of it on a GPU, so their messages are searched.
    """
    phrases = ("can't allocate memory", "not enough memory", "CUDA out of memory")
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(p in str(error) for p in phrases))


def _get_size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object of a file; {} when the file does not exist, as after a kill before it was written."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: is damaged ({error}); delete {path.parent.parent} and start over") from error
    return content if isinstance(content, dict) else {}
