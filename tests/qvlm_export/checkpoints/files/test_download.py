"""Downloads of weights: continued by the next run, complete, checked, and one line of error with what is missing."""

from __future__ import annotations

import fcntl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from huggingface_hub import hf_hub_download

from qvlm_export.calibrate.errors import UserError
from qvlm_export.checkpoints.files import download as module
from qvlm_export.checkpoints.files.download import download_files, remaining_bytes
from qvlm_export.checkpoints.files.headers import Download
from qvlm_export.checkpoints.files.hub import find_checkpoint
from qvlm_export.checkpoints.files.snapshot import Snapshot
from tools.compatibility.hub_server import PIECE_BYTES, Hub, Repository

NAME = "someone/llava"
ONE, TWO = bytes(range(256)) * 400, b"two" * 40_000
FILES = {"config.json": b"{}", "one.safetensors": ONE, "two.safetensors": TWO}


@pytest.fixture
def downloads(hub: Hub) -> list[Download]:
    hub.repositories[NAME] = Repository(dict(FILES))
    snapshot = find_checkpoint(NAME).snapshot
    assert snapshot is not None
    return [Download(snapshot, name) for name in FILES if name.endswith(".safetensors")]


def fetch(downloads: list[Download]) -> int:
    """Downloads the files; returns the number of bytes that progress was told of."""
    told: list[int] = []
    download_files(downloads, told.append)
    return sum(told)


def assert_complete(downloads: list[Download]) -> None:
    """Asserts that the cache holds the files, as huggingface_hub stores them, and no leftovers."""
    assert remaining_bytes(downloads) == 0
    for download in downloads:
        assert download.path.is_symlink()
        assert download.path.read_bytes() == FILES[download.name]
        path = hf_hub_download(NAME, download.name, revision=download.snapshot.commit, local_files_only=True)
        assert Path(path) == download.path
        assert not download.partial.exists()


def test_files_arrive_with_progress(hub: Hub, downloads: list[Download]) -> None:
    assert remaining_bytes(downloads) == len(ONE) + len(TWO) == fetch(downloads)
    assert_complete(downloads)
    assert hub.served_weights() == len(ONE) + len(TWO)
    assert fetch(downloads) == 0


def test_huggingface_hub_sends_nothing_again(hub: Hub, downloads: list[Download]) -> None:
    fetch(downloads)
    served = hub.served_weights()
    for download in downloads:
        hf_hub_download(NAME, download.name)
    assert hub.served_weights() == served


def test_dropped_connections_are_continued_where_they_were_cut(hub: Hub, downloads: list[Download]) -> None:
    hub.drops["one.safetensors"] = [PIECE_BYTES, 0, 10, 20_000]
    hub.drops["two.safetensors"] = [0]
    assert fetch(downloads) == len(ONE) + len(TWO) == hub.served_weights()
    assert_complete(downloads)


def test_the_next_run_fetches_only_the_rest(hub: Hub, downloads: list[Download]) -> None:
    hub.drops["one.safetensors"] = [30_000] + [0] * 50
    with pytest.raises(UserError) as caught:
        fetch(downloads[:1])
    words = [
        "the download stopped",
        "MiB are missing (someone/llava/one.safetensors)",
        "closed connection",
        "fetches only the rest",
    ]
    assert [word for word in words if word not in str(caught.value)] == []
    assert "\n" not in str(caught.value)
    assert remaining_bytes(downloads) == len(ONE) - 30_000 + len(TWO)
    hub.drops.clear()
    assert fetch(downloads) == len(ONE) - 30_000 + len(TWO)
    assert hub.served["one.safetensors"] == len(ONE)
    assert_complete(downloads)


def test_a_finished_file_is_kept_when_another_fails(hub: Hub, downloads: list[Download]) -> None:
    fetch(downloads[1:])
    hub.drops["one.safetensors"] = [0] * 50
    with pytest.raises(UserError, match=r"are missing \(someone/llava/one.safetensors\)"):
        fetch(downloads)
    hub.drops.clear()
    fetch(downloads)
    assert hub.served["two.safetensors"] == len(TWO)


def test_a_busy_server_is_asked_again(hub: Hub, downloads: list[Download]) -> None:
    hub.failures = [503, 429]
    fetch(downloads)
    assert_complete(downloads)


@pytest.mark.parametrize(
    ("status", "words"), [(404, "no repository"), (500, "cannot answer now"), (403, "no right to read")]
)
def test_a_server_that_refuses_is_quoted(hub: Hub, downloads: list[Download], status: int, words: str) -> None:
    hub.failures = [status] * 50
    with pytest.raises(UserError, match=words):
        fetch(downloads)


def test_a_server_without_ranges_starts_over(hub: Hub, downloads: list[Download]) -> None:
    hub.ignore_ranges = True
    hub.drops["one.safetensors"] = [30_000]
    assert fetch(downloads[:1]) == len(ONE)
    assert_complete(downloads[:1])


@pytest.mark.parametrize("leftover", [b"x" * 10, b"x" * (len(ONE) + 1), b"x" * len(ONE)])
def test_a_leftover_of_other_content_is_found_out(downloads: list[Download], leftover: bytes) -> None:
    partial = downloads[0].partial
    partial.parent.mkdir(exist_ok=True)
    partial.write_bytes(leftover)
    if len(leftover) <= len(ONE):
        with pytest.raises(UserError, match=r"one.safetensors: arrived damaged .* run the same command again"):
            fetch(downloads[:1])
        assert not partial.exists()
    fetch(downloads[:1])
    assert_complete(downloads[:1])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (ONE + b"more", "sends more than the 102400 bytes"),
        (ONE[:-1], "sends no more than 102399 of the 102400 bytes"),
        (b"\0" * len(ONE), "arrived damaged"),
    ],
)
def test_a_server_that_sends_something_else_is_refused(
    downloads: list[Download], monkeypatch: pytest.MonkeyPatch, content: bytes, words: str
) -> None:
    @contextmanager
    def send(_: Snapshot, __: str, start: int) -> Iterator[tuple[int, Iterator[bytes]]]:
        yield start, iter([content[start:]])

    monkeypatch.setattr(module, "open_range", send)
    with pytest.raises(UserError, match=words):
        fetch(downloads[:1])
    assert not downloads[0].path.exists()


def test_equal_files_are_downloaded_once(hub: Hub) -> None:
    hub.repositories[NAME] = Repository({"config.json": b"{}", "a.bin": ONE, "b.bin": ONE})
    snapshot = find_checkpoint(NAME).snapshot
    assert snapshot is not None
    both = [Download(snapshot, name) for name in ("a.bin", "b.bin")]
    assert remaining_bytes(both) == len(ONE) == fetch(both) == hub.served_weights()
    assert [download.path.read_bytes() for download in both] == [ONE, ONE]


def test_a_disk_without_links_holds_the_files_themselves(downloads: list[Download], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    fetch(downloads)
    assert [download.path.read_bytes() for download in downloads] == [ONE, TWO]


def test_a_second_process_waits_for_the_first(hub: Hub, downloads: list[Download], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOCK_SECONDS", 0.01)
    download = downloads[0]
    download.partial.parent.mkdir(exist_ok=True)
    with download.partial.open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        waiting = threading.Thread(target=fetch, args=([download],))
        waiting.start()
        time.sleep(0.1)
        assert hub.served_weights() == 0
        other.write(ONE)
        other.flush()
        download.partial.replace(download.blob)
    waiting.join(timeout=20)
    assert (hub.served_weights(), download.path.read_bytes()) == (0, ONE)


def test_an_interruption_stops_soon_and_keeps_what_came(
    hub: Hub, downloads: list[Download], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "as_completed", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fetch(downloads)
    monkeypatch.undo()
    kept = len(ONE) + len(TWO) - remaining_bytes(downloads)
    assert kept <= hub.served_weights() <= len(ONE) + len(TWO)


def test_a_full_disk_is_one_line(downloads: list[Download], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", refuse)
    with pytest.raises(UserError, match=r"the disk of the cache .* is full; .*only the rest"):
        fetch(downloads)
