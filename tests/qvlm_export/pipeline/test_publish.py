"""Publishing replaces every file of an older export or none, whatever cannot be moved, and whenever it is killed."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from commands import read_files

from qvlm_export.calibrate.errors import UnfinishedError
from qvlm_export.pipeline.publish import Move, publish

OLD = ("x.plan", "x.onnx", "x.calibrated/a", "x.calibrated/.hidden", "x.json")
NEW = ("x.onnx", "x.calibrated/a", "x.processor/b", "x.json")
NAMES = ("x.plan", "x.onnx", "x.calibrated", "x.processor", "x.json")  # the manifest last
# Moves aside of the four files that are there, and moves into place of the four new ones.
STEPS = 8


def write(folder: Path, names: tuple[str, ...], text: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{text} {name}")


@pytest.fixture
def moves(tmp_path: Path) -> list[Move]:
    """The moves of an export over an older one that has engines."""
    out, staging = tmp_path / "out", tmp_path / "out" / ".x.work" / "out"
    write(out, (*OLD, "mine.txt"), "old")
    write(staging, NEW, "new")
    return [
        Move(staging / name if name != "x.plan" else None, out / name, tmp_path / "out" / ".x.work" / "old" / name)
        for name in NAMES
    ]


def published(tmp_path: Path) -> dict[str, bytes]:
    """The files at their places; the work folder is left out."""
    return {name: data for name, data in read_files(tmp_path / "out").items() if not name.startswith(".x.work")}


def fail_at(step: int, error: OSError) -> Callable[[Path, Path], None]:
    """A rename that raises `error` at the n-th call, and works before and after."""
    calls = iter(range(1000))

    def move(source: Path, target: Path) -> None:
        if next(calls) == step:
            raise error
        os.replace(source, target)

    return move


def test_everything_is_replaced_and_what_is_obsolete_goes(moves: list[Move], tmp_path: Path) -> None:
    publish(moves)
    assert published(tmp_path) == {"mine.txt": b"old mine.txt"} | {name: f"new {name}".encode() for name in NEW}
    assert not (tmp_path / "out" / ".x.work" / "old").exists()


@pytest.mark.parametrize("step", range(STEPS))
def test_what_cannot_be_moved_sends_everything_back(moves: list[Move], tmp_path: Path, step: int) -> None:
    """As with a file that is immutable, or lies in the sticky folder of another owner."""
    before, staged = published(tmp_path), read_files(tmp_path / "out" / ".x.work" / "out")
    with pytest.raises(UnfinishedError) as caught:
        publish(moves, fail_at(step, PermissionError(errno.EPERM, "Operation not permitted")))
    assert "cannot be replaced (Operation not permitted); what stood there is in its place again" in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "out" / "x."))
    assert published(tmp_path) == before
    assert read_files(tmp_path / "out" / ".x.work" / "out") == staged
    publish(moves)  # and it can be published once that is mended
    assert set(published(tmp_path)) == {"mine.txt", *NEW}


def test_there_are_no_more_steps(moves: list[Move]) -> None:
    publish(moves, fail_at(STEPS, PermissionError()))


@pytest.mark.parametrize("step", range(STEPS))
def test_a_kill_leaves_no_manifest_or_a_whole_export(moves: list[Move], tmp_path: Path, step: int) -> None:
    before = published(tmp_path)

    move = fail_at(step, OSError())

    def move_or_die(source: Path, target: Path) -> None:
        try:
            move(source, target)
        except OSError:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        publish(moves, move_or_die)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert published(tmp_path) == before or not (tmp_path / "out" / "x.json").exists()
    publish(moves)
    assert published(tmp_path) == {"mine.txt": b"old mine.txt"} | {name: f"new {name}".encode() for name in NEW}


def test_a_real_refusal_of_the_system_keeps_the_older_export(moves: list[Move], tmp_path: Path) -> None:
    """The older calibrated checkpoint cannot be moved to another disk, as a rename never leaves its own."""
    other_disk = Path("/dev/shm")
    if not other_disk.is_dir() or other_disk.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second disk")
    aside = other_disk / tmp_path.name
    before = published(tmp_path)
    try:
        with pytest.raises(UnfinishedError, match=r"x\.onnx: cannot be replaced \(Invalid cross-device link\)"):
            publish([replace(m, aside=aside / "x") if m.target.name == "x.onnx" else m for m in moves])
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    assert published(tmp_path) == before


def test_a_folder_without_write_permission_is_deleted_too(moves: list[Move], tmp_path: Path) -> None:
    (tmp_path / "out" / "x.calibrated").chmod(0o555)
    publish(moves)
    assert not (tmp_path / "out" / ".x.work" / "old").exists()


def test_links_are_replaced_and_their_targets_kept(moves: list[Move], tmp_path: Path) -> None:
    """An export seen in a store of models must not be written through into the store."""
    store = tmp_path / "store"
    shutil.move(tmp_path / "out" / "x.calibrated", store)
    (tmp_path / "out" / "x.calibrated").symlink_to(store)
    (tmp_path / "blob").write_text("blob")
    (tmp_path / "out" / "x.onnx").unlink()
    (tmp_path / "out" / "x.onnx").symlink_to(tmp_path / "blob")
    publish(moves)
    assert (tmp_path / "blob").read_text() == "blob"
    assert read_files(store) == {"a": b"old x.calibrated/a", ".hidden": b"old x.calibrated/.hidden"}
    assert not (tmp_path / "out" / "x.calibrated").is_symlink()
