"""The work folder of an export: one export at a time, and what a killed one goes on from.

`.X.work` beside the output, or `--work-dir` and `.X.work` for what must lie beside the output. Inside, `.export` holds the
lock, what the work was begun with (`begun.json`), the finished blocks, and which graphs and plans are whole (`stages.json`).
"""

from __future__ import annotations

import fcntl
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
from qvlm_export.pipeline.planning.preflight import calibrated_folder, scratch_folder
from qvlm_export.pipeline.publish import is_disk_full

FINISHED = "finished"
LESS_MEMORY = "--memory lowers what activations take, fewer --samples and --effort rtn lower all of it"
STATE, BEGUN, STAGES = ".export", "begun.json", "stages.json"


@dataclass(frozen=True)
class WorkFolder:
    """scratch: beside the output, `.X.work`. kept: where the calibrated checkpoint is made, `--work-dir` or the same."""

    scratch: Path
    kept: Path

    @property
    def stage(self) -> Path:
        """Finished files, until they are moved into place."""
        return self.scratch / "out"

    @property
    def state(self) -> Path:
        return self.kept / STATE

    @property
    def calibrated(self) -> Path:
        return calibrated_folder(self.kept)

    def finished_blocks(self) -> int:
        return count_finished_blocks(self.state)

    def unfinished(self) -> bool:
        """Whether an earlier export left something that would have to be computed again."""
        begun = (self.state / BEGUN).exists()
        return bool(self.stages()) or (begun and (holds_work(self.state) or (self.calibrated / INDEX_FILE).exists()))

    def stages(self) -> dict[str, Any]:
        """What is whole: by name {key: of everything it depends on, files: sizes by name, and what it said}."""
        content = _read(self.scratch / STATE / STAGES)
        return {
            name: stage
            for name, stage in content.items()
            if all(_size(self.stage / file) == size for file, size in stage["files"].items())
        }

    def note_stage(self, name: str, key: str, files: list[Path], **said: Any) -> None:
        """Notes that `files` of the stage folder are whole, after they are on disk."""
        for path in files:
            with path.open("rb") as file:
                os.fsync(file.fileno())
        sizes = {path.name: path.stat().st_size for path in files}
        stages = {**_read(self.scratch / STATE / STAGES), name: {"key": key, "files": sizes, **said}}
        write_json(self.scratch / STATE / STAGES, stages)

    def begin(self, fingerprint: Mapping[str, str], resume: bool) -> None:
        """Takes up unfinished work, or clears it away when there is none worth it.

        Raises UserError when the work was begun with something else, or when it is there and `resume` was not said.
        """
        if not self.unfinished():
            self._clear()
        elif not resume:
            raise UserError(
                f"{self.kept}: holds the unfinished work of an earlier export ({self.finished_blocks()} blocks are "
                "calibrated); add --resume to go on with it, or delete the folder to begin anew"
            )
        else:
            self._compare(fingerprint)
        self.stage.mkdir(parents=True, exist_ok=True)
        for path in (*self.stage.glob(".*"), *self.stage.glob("*.tmp")):  # what was being written
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        write_json(self.state / BEGUN, dict(fingerprint))

    def _compare(self, fingerprint: Mapping[str, str]) -> None:
        begun = _read(self.state / BEGUN)
        changed = [name for name in dict.fromkeys((*begun, *fingerprint)) if begun.get(name) != fingerprint.get(name)]
        if changed:
            raise UserError(
                f"--resume: {changed[0]} changed since the work in {self.kept} was begun; "
                "run the command as it was, or delete the folder to begin anew"
            )

    def _clear(self) -> None:
        """Whatever an earlier export left, but the locks."""
        for folder in (self.stage, self.calibrated, self.state / "blocks"):
            shutil.rmtree(folder, ignore_errors=True)
        for path in (self.state / BEGUN, self.scratch / STATE / STAGES):
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Before the results are moved into place: from now on there is nothing to be computed again."""
        (self.state / BEGUN).unlink(missing_ok=True)
        shutil.rmtree(self.state / "blocks", ignore_errors=True)

    def remove(self) -> None:
        """Everything of the export but the calibrated checkpoint in --work-dir."""
        if self.kept != self.scratch:
            shutil.rmtree(self.state, ignore_errors=True)
        shutil.rmtree(self.scratch, ignore_errors=True)


@contextmanager
def work_folder(out: Path, work_dir: Path | None) -> Iterator[WorkFolder]:
    """Makes and locks the work folder of `--out out`. Folders that had to be made and stayed empty are gone afterwards.

    Raises UserError when another export works there.
    """
    scratch = scratch_folder(out)
    work = WorkFolder(scratch, work_dir or scratch)
    made = [folder for base in (scratch, work.kept) for folder in (base, *base.parents) if not folder.exists()]
    try:
        with ExitStack() as locks:
            for folder in dict.fromkeys((scratch, work.kept)):
                locks.enter_context(_locked(folder))
            yield work
    finally:
        for folder in made:
            with suppress(OSError):  # not empty: the export, or what it goes on from, is there
                folder.rmdir()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the folder for one process; a kill lets go of it."""
    path = folder / STATE / "lock"
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                raise UserError(
                    f"{folder}: another export is at work here (process {file.read() or 'unknown'}); "
                    "wait for it, or choose another --out and --work-dir"
                ) from error
            if not _same_file(file.fileno(), path):  # its owner has just finished and removed the folder
                continue
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield
            return


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def read_finished_export(work: WorkFolder, key: str) -> Manifest | None:
    """The manifest of an export that was killed when all was done but moving it into place."""
    noted = work.stages().get(FINISHED, {})
    if noted.get("key") != key:
        return None
    (name,) = noted["files"]
    return read_manifest(work.stage / name)


def explain_failure(error: BaseException, disk_bytes: int, work: WorkFolder) -> BaseException:
    """The error as the user gets it, saying how to go on where work is left; clears away what is of no use.

    An error in the input makes the work useless, as it was begun with that input.
    """
    told: BaseException = error
    if isinstance(error, OSError | SafetensorError | UserError) and is_disk_full(error, work.scratch):
        told = UnfinishedError(
            f"{work.scratch.parent}: the disk is full; {disk_bytes / 2**20:.0f} MiB are needed; free some"
        )
    elif is_out_of_memory(error):
        told = UnfinishedError(f"memory ran out; {LESS_MEMORY}")
    if (isinstance(told, UserError) and not isinstance(told, UnfinishedError)) or not work.unfinished():
        work.remove()
        return told
    hint = f"what was finished is kept in {work.kept}; the same command with --resume goes on from there"
    if isinstance(told, KeyboardInterrupt):
        return KeyboardInterrupt(f"interrupted; {hint}")
    return UnfinishedError(f"{told}; {hint}") if isinstance(told, UserError) else told


def is_out_of_memory(error: BaseException) -> bool:
    """torch raises RuntimeErrors of its own making on CPU, and a class of its own on a GPU."""
    words = ("can't allocate memory", "not enough memory", "CUDA out of memory")
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(w in str(error) for w in words))


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; {} where there is none, as after a kill before it was written."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: is damaged ({error}); delete {path.parent.parent} and begin anew") from error
    return content if isinstance(content, dict) else {}
