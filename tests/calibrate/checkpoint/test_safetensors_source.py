"""Safetensors folders: tensors are read exactly, and damaged or hostile folders raise one-line errors with their path."""

from __future__ import annotations

import json
import re

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from qvlm_export.calibrate.checkpoint.safetensors_source import OpenedFile, SafetensorsSource
from qvlm_export.calibrate.errors import UserError

INDEX = "model.safetensors.index.json"
TENSORS = {
    "a.weight": np.arange(6, dtype=np.float16).reshape(2, 3),
    "b.weight": np.linspace(-1, 1, 4, dtype=np.float32).astype(ml_dtypes.bfloat16),
    "c.codes": np.array([[-8, 7]], np.int8),
    "d.scalar": np.array(3.5, np.float32),
    "e.empty": np.zeros((0, 4), np.float16),
}


def write_single(folder):
    save_file(TENSORS, folder / "model.safetensors")


def write_sharded(folder):
    weight_map = {}
    for number, (name, array) in enumerate(TENSORS.items(), start=1):
        save_file({name: array}, folder / f"model-{number}.safetensors")
        weight_map[name] = f"model-{number}.safetensors"
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def assert_refused(folder, *words):
    """Opening the folder raises a one-line error that holds all of `words`."""
    with pytest.raises(UserError) as caught:
        SafetensorsSource(folder)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message


@pytest.mark.parametrize("write", [write_single, write_sharded])
def test_names_shapes_dtypes_and_data_are_read(tmp_path, write):
    write(tmp_path)
    source = SafetensorsSource(tmp_path)
    assert sorted(source) == sorted(TENSORS)
    assert "f" not in source
    for name, array in TENSORS.items():
        assert name in source
        assert source.shape(name) == array.shape
        assert source.dtype(name) == array.dtype
        loaded = source.load(name)
        assert (loaded.dtype, loaded.tobytes()) == (array.dtype, array.tobytes())


def test_a_sharded_checkpoint_holds_the_same_tensors_as_a_single_file(llava):
    whole, split = SafetensorsSource(llava()), SafetensorsSource(llava(max_shard_size="1MB"))
    assert len(list(llava(max_shard_size="1MB").glob("*.safetensors"))) > 2
    assert set(whole) == set(split)
    for name in whole:
        assert whole.load(name).tobytes() == split.load(name).tobytes()


def test_tensors_are_renamed_and_dropped(tmp_path):
    write_single(tmp_path)
    source = SafetensorsSource(tmp_path, {"a.weight": "x", "c.codes": "y"}.get)
    assert sorted(source) == ["x", "y"]
    np.testing.assert_array_equal(source.load("x"), TENSORS["a.weight"])


def test_a_file_that_changed_after_opening_is_refused_with_its_path(tmp_path):
    write_single(tmp_path)
    source = SafetensorsSource(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / 'model.safetensors'}: was changed while it was read")):
        source.load("a.weight")


def test_a_file_that_ends_inside_a_tensor_is_refused_with_file_and_tensor(tmp_path, monkeypatch):
    """The file is truncated after the check for changes; missing data must not be filled in silently."""
    path = tmp_path / "model.safetensors"
    save_file({"a.weight": np.ones(5, np.float16)}, path)
    source = SafetensorsSource(tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    monkeypatch.setattr(OpenedFile, "check_unchanged", lambda _: None)
    with pytest.raises(UserError, match=r"model\.safetensors: tensor a\.weight can no longer be read .*ends inside"):
        source.load("a.weight")


def test_an_empty_folder_is_refused(tmp_path):
    assert_refused(tmp_path, tmp_path, "model.safetensors", INDEX)


def header(text, length=None):
    raw = text.encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw


TENSOR = '{"a":{"dtype":"%s","shape":[2],"data_offsets":[0,%d]}}'


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x01",
        b"not a safetensors file at all",
        header("{}", length=2**63 - 1),
        header("{}", length=2**40),
        header("{not json"),
        header("[]"),
        header(TENSOR % ("F32", 8)),  # the data is missing
        header(TENSOR % ("F32", 4)) + b"\0" * 4,  # too few bytes for the shape
        header(TENSOR % ("F32", 2**62)) + b"\0" * 8,
    ],
    ids=["empty", "one-byte", "text", "huge-header", "long-header", "no-json", "list", "cut", "short", "huge-offset"],
)
def test_a_damaged_file_is_refused(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    assert_refused(tmp_path, tmp_path / "model.safetensors", "download it again")


@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=80))
def test_a_file_of_random_bytes_is_refused(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("random")
    (folder / "model.safetensors").write_bytes(content)
    assert_refused(folder, folder / "model.safetensors")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.999])
def test_a_truncated_file_is_refused(tmp_path, llava, share):
    whole = (llava() / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: int(len(whole) * share)])
    assert_refused(tmp_path, tmp_path / "model.safetensors", "not a readable safetensors file")


def test_an_unsupported_dtype_is_refused_with_the_tensor(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(header(TENSOR % ("F8_E4M3", 2)) + b"\0" * 2)
    assert_refused(tmp_path, tmp_path / "model.safetensors", "tensor a", "F8_E4M3")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe\x00",
        b"[]",
        b"7",
        b"{}",
        b'{"weight_map": 3}',
        b'{"weight_map": []}',
        b'{"weight_map": null}',
        b'{"weight_map": {"a": ["model-1.safetensors"]}}',
        b'{"weight_map": {"a": "model-1.safetensors", "b": 3}}',
    ],
)
def test_a_damaged_index_is_refused(tmp_path, content):
    write_sharded(tmp_path)
    (tmp_path / INDEX).write_bytes(content)
    assert_refused(tmp_path, tmp_path / INDEX, "download it again")


@pytest.mark.parametrize("name", ["../evil.safetensors", "../evil", "/etc/passwd", "sub/a.safetensors", "."])
def test_an_index_that_names_a_file_outside_the_folder_is_refused(tmp_path, name):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    save_file(TENSORS, tmp_path / "evil.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a.weight": name}}))
    assert_refused(folder, folder / INDEX, repr(name))


@pytest.mark.parametrize("name", ["", ".."])
def test_an_index_that_names_a_folder_is_refused(tmp_path, name):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a.weight": name}}))
    assert_refused(tmp_path, tmp_path / name)


def test_an_index_that_names_a_missing_shard_is_refused(tmp_path):
    write_sharded(tmp_path)
    (tmp_path / "model-2.safetensors").unlink()
    assert_refused(tmp_path, tmp_path / "model-2.safetensors", INDEX, "missing")
