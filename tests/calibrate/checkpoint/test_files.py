"""Files read and written whole: JSON of foreign hands, files that are complete or absent, and safetensors files."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save

from qvlm_export.calibrate.checkpoint.files import (
    WRITING,
    clear_leftovers,
    printable,
    read_json,
    write_atomically,
    write_json,
    write_tensors,
)
from qvlm_export.calibrate.errors import UserError


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "Expecting value"),
        (b"\xff", "utf-8"),
        (b"[" * 700 + b"]" * 700, "nested more than 100 deep"),
        (b"[" * 100_000, "nested more than 100 deep"),
        (b'{"a": "\\ud800"}', "surrogates not allowed"),
        (b'{"\\udfff": 1}', "surrogates not allowed"),
    ],
)
def test_json_that_cannot_be_used_is_refused_in_one_line(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_json(path, "a readable list", "write it again")
    assert str(caught.value).startswith(f"{path}: not a readable list (")
    assert reason in str(caught.value)
    assert str(caught.value).endswith("; write it again")
    assert "\n" not in str(caught.value)


def test_what_is_no_file_is_refused_before_it_is_opened(tmp_path: Path) -> None:
    """A pipe would never end."""
    os.mkfifo(tmp_path / "pipe")
    for path, kind in ((tmp_path / "pipe", "a pipe"), (tmp_path, "a folder"), (Path("/dev/zero"), "a device")):
        with pytest.raises(UserError, match=f"^{path}: is {kind}, not a readable list"):
            read_json(path, "a readable list", "")
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none", "", "")
    with pytest.raises(UserError, match="File name too long"):
        read_json(tmp_path / ("x" * 5000), "", "")
    with pytest.raises(UserError, match="embedded null"):
        read_json(tmp_path / "\0", "", "")


def nest(inner: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    return st.lists(inner, max_size=3) | st.dictionaries(st.text("aé"), inner, max_size=3)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text("aé🐈"), nest, max_leaves=8))
@settings(max_examples=50)
def test_written_json_is_read_back(tmp_path_factory: pytest.TempPathFactory, content: object) -> None:
    path = tmp_path_factory.getbasetemp() / "some.json"
    write_json(path, content)
    assert read_json(path, "", "") == json.loads(path.read_text(encoding="utf-8")) == content


def test_a_write_that_fails_leaves_the_older_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, fail)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a", "old")]


def test_a_kill_inside_a_write_leaves_what_is_cleared(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        write_atomically(tmp_path / "a", lambda path: (path.write_text("half"), os.kill(os.getpid(), signal.SIGKILL)))
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [f"{WRITING}a"]
    clear_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []


DTYPES = [*["bool", "uint8", "int8", "int16", "float16", "int32", "float32", "float64", "int64"], ml_dtypes.bfloat16]
SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)


@given(st.dictionaries(st.text('aZé"\\', min_size=1), st.tuples(st.sampled_from(DTYPES), SHAPES)), st.booleans())
def test_tensors_are_written_as_the_library_writes_them(
    tmp_path_factory: pytest.TempPathFactory, kinds: dict[str, tuple[type, tuple[int, ...]]], format_is_pt: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "t.safetensors"
    rng = np.random.default_rng(0)
    tensors = {name: np.asarray(rng.integers(0, 9, shape)).astype(dtype) for name, (dtype, shape) in kinds.items()}
    metadata = {"format": "pt"} if format_is_pt else None
    write_tensors(path, tensors, metadata)
    assert path.read_bytes() == save(tensors, metadata)
    assert load_file(path).keys() == tensors.keys()


def test_arrays_that_are_not_contiguous_are_written_in_order(tmp_path: Path) -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    write_tensors(tmp_path / "t", {"a": array.T})
    np.testing.assert_array_equal(load_file(tmp_path / "t")["a"], array.T)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_have_the_permissions_that_the_umask_gives(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_tensors(tmp_path / "t", {"a": np.zeros(1)})
        write_json(tmp_path / "j", {})
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o666 & ~umask}


def test_text_for_messages_has_no_control_characters() -> None:
    assert printable("a\nb\x1b[31m\udcff\u202eü日 🐈") == "a\\nb\\x1b[31m\\udcff\\u202eü日 🐈"
