"""The manifest: what is written comes back, and what is damaged, newer or gone is one line with its path."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace

import pytest
from small_export import open_small

from calibrate.errors import UserError
from engines.config import Limits
from engines.manifest import Manifest, describe_file, read_manifest, write_manifest


@pytest.fixture
def manifest(llava, tmp_path):
    """A manifest with every field filled, and the one file it names."""
    (tmp_path / "engine.onnx").write_bytes(b"graph")
    return Manifest(
        path=tmp_path / "engine.json",
        model={"name": "tiny", "model_type": "llava"},
        config=open_small(llava()).config,
        limits=Limits(max_length=128, max_batch=2, max_images=3),
        float_type="float16",
        scheme="int4",
        linears={"a.b": "W4A16 g128", "é": "W8A8"},
        calibration={"method": "absmax", "samples": 4},
        backend={"name": "tensorrt-rtx", "version": "1.7", "targets": ["sm89"]},
        plan_check=({"linear": "a.b", "planned": "W4A16", "executed": "half x int4 -> half", "passed": True},),
        interface={"language": {"inputs": [{"name": "input_ids", "type": "int64", "shape": ["batch", 1]}]}},
        versions={"python": "3.11"},
        files={"language_onnx": describe_file(tmp_path / "engine.onnx")},
    )


def refused(path, *words):
    with pytest.raises(UserError) as caught:
        read_manifest(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    for word in words:
        assert word in message


def change(path, **changes):
    """Rewrites the file with some of its entries changed; None removes one."""
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}), encoding="utf-8")


def test_what_is_written_comes_back(manifest):
    write_manifest(manifest)
    assert read_manifest(manifest.path) == manifest
    assert [path.name for path in sorted(manifest.path.parent.iterdir())] == ["engine.json", "engine.onnx"]


def test_a_second_write_replaces_the_first(manifest):
    write_manifest(manifest)
    write_manifest(replace(manifest, scheme="int8"))
    assert read_manifest(manifest.path).scheme == "int8"


def test_a_moved_manifest_finds_its_files_beside_it(manifest, tmp_path):
    write_manifest(manifest)
    there = tmp_path / "there"
    there.mkdir()
    for name in ("engine.json", "engine.onnx"):
        (tmp_path / name).rename(there / name)
    moved = read_manifest(there / "engine.json")
    assert moved.path == there / "engine.json"
    assert moved.file("language_onnx") == there / "engine.onnx"


def test_a_file_is_described_by_its_content(tmp_path):
    path = tmp_path / "some.data"
    path.write_bytes(b"\x00\x01" * 100_000)
    digest = hashlib.sha256(b"\x00\x01" * 100_000).hexdigest()
    assert describe_file(path) == {"name": "some.data", "bytes": 200_000, "sha256": digest}


def test_a_role_that_was_not_exported_is_named(manifest):
    assert manifest.file("language_onnx").read_bytes() == b"graph"
    with pytest.raises(UserError, match=re.escape(f"{manifest.path}: this export has no language_plan; export again")):
        manifest.file("language_plan")


def test_a_file_that_is_gone_is_named(manifest, tmp_path):
    (tmp_path / "engine.onnx").unlink()
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / 'engine.onnx'}: is missing; it belongs to engine.json")):
        manifest.file("language_onnx")


def test_a_missing_manifest(tmp_path):
    refused(tmp_path / "engine.json", "there is no such manifest")


def test_a_folder_in_its_place(tmp_path):
    refused(tmp_path, "not a readable manifest")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b'{"format": "qvlm-export", "version": 1'])
def test_no_json(tmp_path, content):
    (tmp_path / "engine.json").write_bytes(content)
    refused(tmp_path / "engine.json", "not a readable manifest", "export again")


@pytest.mark.parametrize("content", ["[]", "7", "null", "{}", '{"format": "other", "version": 1}'])
def test_json_of_another_kind(tmp_path, content):
    (tmp_path / "engine.json").write_text(content)
    refused(tmp_path / "engine.json", "is no manifest of qvlm-export")


@pytest.mark.parametrize("version", [2, 99, "1"])
def test_a_newer_version(manifest, version):
    write_manifest(manifest)
    change(manifest.path, version=version)
    refused(manifest.path, f"manifest version {version}, this program reads 1", "update qvlm-export")


KEYS = ("model", "config", "limits", "float_type", "scheme", "linears", "calibration", "backend")
MORE_KEYS = ("plan_check", "interface", "versions", "files")


@pytest.mark.parametrize("key", [*KEYS, *MORE_KEYS])
def test_a_missing_entry(manifest, key):
    write_manifest(manifest)
    change(manifest.path, **{key: None})
    refused(manifest.path, "the manifest is damaged", key)


@pytest.mark.parametrize(
    "changes",
    [
        {"limits": {"max_length": 1, "colour": "red"}},
        {"limits": 7},
        {"limits": {}},
        {"config": []},
        {"config": {"vision": {}, "projector": {}, "text": {}, "image_token_id": 4}},
        {"plan_check": 7},
    ],
)
def test_an_entry_of_another_shape(manifest, changes):
    write_manifest(manifest)
    change(manifest.path, **changes)
    refused(manifest.path, "the manifest is damaged", "export again")
