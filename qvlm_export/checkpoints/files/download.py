"""Downloads weights into huggingface_hub's cache so that whatever arrives is kept: an interrupted download continues later.

huggingface_hub (2.0 to 2.4) throws a partial file away when its process ends. Here, bytes are appended to
`blobs/<sha256>.incomplete`, hashed as they come, and the finished file is linked into the snapshot as huggingface_hub does.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from threading import Event, Lock
from typing import BinaryIO

import httpx2

from qvlm_export.calibrate.errors import UnfinishedError, UserError
from qvlm_export.checkpoints.files.headers import Download
from qvlm_export.checkpoints.files.hub_errors import HUB_ERRORS, explain_hub_error, first_line
from qvlm_export.checkpoints.files.ranges import WAITS, is_transient, open_range

WORKERS = 4  # files at a time: one connection does not fill a fast line
HASHED_BYTES = 2**22  # of a partial file, hashed at a time
LOCK_SECONDS = 0.5  # between two looks whether another process has finished the same file


class _StoppedError(Exception):
    """The download was stopped, because another file failed or the user interrupted it."""


def remaining_bytes(downloads: Sequence[Download]) -> int:
    """Returns how many bytes are still to be downloaded; of equal files, only one is."""
    by_blob = {download.blob: download for download in downloads}
    return sum(max(0, download.size - _get_size(download)) for download in by_blob.values())


def _get_size(download: Download) -> int:
    path = download.blob if download.blob.exists() else download.partial
    return path.stat().st_size if path.exists() else 0


def download_files(downloads: Sequence[Download], progress: Callable[[int], None]) -> None:
    """Downloads the files, of which there is at least one.

    progress: called with the number of bytes that arrived, from several threads, one at a time.
    Raises UnfinishedError when the Hub does not give a file, after a few tries; what arrived until then is kept.
    KeyboardInterrupt ends the download in the same state.
    """
    stop, lock = Event(), Lock()

    def report(count: int) -> None:
        with lock:
            progress(count)

    by_blob = {download.blob: download for download in downloads}
    repository = downloads[0].snapshot.repository
    try:
        with ThreadPoolExecutor(WORKERS) as pool:
            tasks = {pool.submit(_download, download, report, stop): download for download in by_blob.values()}
            try:
                for task in as_completed(tasks):
                    repository = tasks[task].snapshot.repository
                    task.result()
            finally:  # after the first failure, the others are not waited for
                stop.set()
                pool.shutdown(cancel_futures=True)
        for download in downloads:
            _link(download)
    except HUB_ERRORS as error:
        is_lost = isinstance(error, httpx2.TransportError)
        reason = first_line(error) if is_lost else explain_hub_error(error, repository)
        raise UnfinishedError(_describe_failure(downloads, reason)) from error


def _describe_failure(downloads: Sequence[Download], reason: str) -> str:
    missing = [download for download in downloads if not download.blob.exists()]
    names = ", ".join(f"{download.snapshot.repository}/{download.name}" for download in missing[:3])
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    rest, total = remaining_bytes(downloads), sum(download.size for download in downloads)
    return (
        f"the download stopped, {format_size(rest)} of {format_size(total)} are missing ({names}{more}): {reason}; "
        "the same command fetches only the rest"
    )


def format_size(count: int) -> str:
    """Returns a number of bytes as text."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _download(download: Download, report: Callable[[int], None], stop: Event) -> None:
    """Downloads one file to its blob, continuing its partial file."""
    download.blob.parent.mkdir(parents=True, exist_ok=True)
    while not download.blob.exists():
        with download.partial.open("a+b") as file:
            if not _lock(file) or not _is_same(file, download.partial):  # another process downloads it, or just has
                if stop.wait(LOCK_SECONDS):
                    raise _StoppedError
                continue
            digest = _fill(download, file, report, stop)
            expected = download.snapshot.files[download.name].sha256
            if expected is not None and digest != expected:
                download.partial.unlink()
                raise UserError(
                    f"{download.snapshot.repository}/{download.name}: arrived damaged (sha256 {digest[:12]}…, not "
                    f"{expected[:12]}…) and was deleted; run the same command again"
                )
            os.fsync(file.fileno())
            download.partial.replace(download.blob)


def _fill(download: Download, file: BinaryIO, report: Callable[[int], None], stop: Event) -> str:
    """Appends what is missing to the partial file, and returns the sha256 of the whole."""
    digest, done = _hash_partial(file, download.size)
    waits = iter(WAITS)
    while done < download.size:
        before, failure = done, None
        try:
            with open_range(download.snapshot, download.name, done) as (begin, pieces):
                if begin != done:  # the server sends whole files only
                    report(-done)
                    file.truncate(0)
                    digest, done, before = hashlib.sha256(), 0, 0
                for piece in pieces:
                    if stop.is_set():
                        raise _StoppedError
                    if done + len(piece) > download.size:
                        raise ValueError(f"it sends more than the {download.size} bytes of {download.name}")
                    file.write(piece)
                    digest.update(piece)
                    done += len(piece)
                    report(len(piece))
        except httpx2.HTTPError as error:
            if not is_transient(error):
                raise
            failure = error
        if done > before:
            waits = iter(WAITS)
        elif (wait := next(waits, None)) is None:
            raise failure or ValueError(f"it sends no more than {done} of the {download.size} bytes of {download.name}")
        elif stop.wait(wait):
            raise _StoppedError
    file.flush()
    return digest.hexdigest()


def _hash_partial(file: BinaryIO, size: int) -> tuple[hashlib._Hash, int]:
    """Returns the hash of what an earlier download left, and its length; a file that is too long is emptied."""
    digest, done = hashlib.sha256(), 0
    file.seek(0, os.SEEK_END)
    if file.tell() > size:
        file.truncate(0)
    file.seek(0)
    while piece := file.read(HASHED_BYTES):
        digest.update(piece)
        done += len(piece)
    return digest, done


def _lock(file: BinaryIO) -> bool:
    """Locks the file for this process, if no other has. File systems without locks count as unlocked: hashes protect."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _is_same(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _link(download: Download) -> None:
    """Links the finished file into the snapshot, or moves it there where the file system has no links."""
    path = download.path
    path.unlink(missing_ok=True)
    try:
        path.symlink_to(os.path.relpath(download.blob, path.parent))
    except OSError:
        download.blob.replace(path)
