"""The manifest: it is read back as written, and damaged, newer or missing files are one-line errors with the path."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import threading
from dataclasses import replace

import pytest
from small_export import open_small

from qvlm_export.calibrate.errors import UserError
from qvlm_export.engines import manifest as manifest_module
from qvlm_export.engines.config import Limits
from qvlm_export.engines.manifest import (
    Manifest,
    describe_file,
    describe_folder,
    describe_in_background,
    read_manifest,
    seal,
    verify_file,
    verify_files,
    write_manifest,
)


@pytest.fixture
def manifest(llava, tmp_path):
    """A manifest with every field filled, beside the one file that it lists."""
    (tmp_path / "engine.onnx").write_bytes(b"graph")
    return Manifest(
        path=tmp_path / "engine.json",
        model={"name": "tiny", "model_type": "llava"},
        config=open_small(llava()).config,
        limits=Limits(max_length=128, max_batch=2, max_images=3),
        float_type="float16",
        scheme="int4",
        linears={"a.b": "W4A16 g128", "é": "W8A8"},
        calibration={"method": "rtn", "samples": 4},
        backend={"name": "tensorrt-rtx", "version": "1.7", "targets": ["sm89"]},
        plan_check=({"linear": "a.b", "scheme": "W4A16", "executed": "half x int4 -> half", "passed": True},),
        interface={"language": {"inputs": [{"name": "input_ids", "type": "int64", "shape": ["batch", 1]}]}},
        versions={"python": "3.11"},
        files={"language_onnx": describe_file(tmp_path / "engine.onnx")},
    )


def assert_refused(path, *words):
    """Reads a manifest, which must fail with one line that contains all `words`."""
    with pytest.raises(UserError) as caught:
        read_manifest(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    for word in words:
        assert word in message


def change(path, **changes):
    """Rewrites the file with some entries changed and a valid hash; None removes an entry."""
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    remaining = {key: value for key, value in content.items() if value is not None}
    path.write_text(json.dumps(seal(remaining)), encoding="utf-8")


def test_a_written_manifest_is_read_back_unchanged(manifest):
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


def test_an_error_about_a_missing_role_names_it(manifest):
    assert manifest.file("language_onnx").read_bytes() == b"graph"
    with pytest.raises(UserError, match=re.escape(f"{manifest.path}: this export has no language_plan; export again")):
        manifest.file("language_plan")


def test_a_missing_file_is_named(manifest, tmp_path):
    (tmp_path / "engine.onnx").unlink()
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / 'engine.onnx'}: is missing; it belongs to engine.json")):
        manifest.file("language_onnx")


def test_a_missing_manifest_is_refused(tmp_path):
    assert_refused(tmp_path / "engine.json", "there is no such manifest")


def test_a_folder_in_place_of_the_manifest_is_refused(tmp_path):
    assert_refused(tmp_path, "not a readable manifest")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b'{"format": "qvlm-export", "version": 1'])
def test_a_file_that_is_no_json_is_refused(tmp_path, content):
    (tmp_path / "engine.json").write_bytes(content)
    assert_refused(tmp_path / "engine.json", "not a readable manifest", "export again")


@pytest.mark.parametrize("content", ["[]", "7", "null", "{}", '{"format": "other", "version": 1}'])
def test_json_that_is_no_manifest_is_refused(tmp_path, content):
    (tmp_path / "engine.json").write_text(content)
    assert_refused(tmp_path / "engine.json", "is no manifest of qvlm-export")


@pytest.mark.parametrize("version", [4, 99, "1"])
def test_a_newer_version_is_refused(manifest, version):
    write_manifest(manifest)
    change(manifest.path, version=version)
    assert_refused(manifest.path, f"manifest version {version}, this program reads 3", "update qvlm-export")


KEYS = ("model", "config", "limits", "float_type", "scheme", "linears", "calibration", "backend")
MORE_KEYS = ("plan_check", "interface", "versions", "files")


@pytest.mark.parametrize("key", [*KEYS, *MORE_KEYS])
def test_a_missing_entry_is_refused_by_name(manifest, key):
    write_manifest(manifest)
    change(manifest.path, **{key: None})
    assert_refused(manifest.path, "the manifest is damaged", key)


@pytest.mark.parametrize(
    "changes",
    [
        {"limits": {"max_length": 1, "colour": "red"}},
        {"limits": 7},
        {"limits": {}},
        {"config": []},
        {"config": {"vision": {}, "projector": {}, "text": {}, "image_token_id": 4}},
        {"plan_check": 7},
        {"generation": 7},
        {"generation": {"eos_token_ids": "2"}},
        {"generation": {"eos_token_ids": [2, -1]}},
        {"generation": {"eos_token_ids": [True]}},
    ],
)
def test_an_entry_of_another_type_is_refused(manifest, changes):
    write_manifest(manifest)
    change(manifest.path, **changes)
    assert_refused(manifest.path, "the manifest is damaged", "export again")


def test_end_tokens_are_read_back_and_may_be_missing(manifest):
    """Exports of older versions have none."""
    write_manifest(replace(manifest, generation={"eos_token_ids": [0, 2]}))
    assert read_manifest(manifest.path).generation == {"eos_token_ids": [0, 2]}
    content = json.loads(manifest.path.read_text(encoding="utf-8"))
    del content["generation"]
    manifest.path.write_text(json.dumps(seal(content)), encoding="utf-8")
    assert read_manifest(manifest.path).generation == {}


def test_an_edited_manifest_is_refused(manifest):
    write_manifest(manifest)
    text = manifest.path.read_text(encoding="utf-8")
    manifest.path.write_text(text.replace('"float_type": "float16"', '"float_type": "float32"'), encoding="utf-8")
    assert manifest.path.read_text(encoding="utf-8") != text
    assert_refused(manifest.path, "was changed since the export wrote it", "export again")


@pytest.mark.parametrize("content", [b"", b"grap", b"graphs"])
def test_a_file_of_another_size_is_refused(manifest, tmp_path, content):
    (tmp_path / "engine.onnx").write_bytes(content)
    expected = f"{tmp_path / 'engine.onnx'}: has {len(content)} bytes, the manifest says 5; it was changed or is incomplete"
    for use in (lambda: manifest.file("language_onnx"), lambda: verify_files(manifest)):
        with pytest.raises(UserError, match=f"^{re.escape(expected)}, export again$"):
            use()


def test_an_entry_without_a_size_is_accepted(manifest, tmp_path):
    (tmp_path / "engine.processor").mkdir()
    unsized = replace(manifest, files={"a": {"name": "engine.onnx"}, "processor": {"name": "engine.processor"}})
    (tmp_path / "engine.onnx").write_bytes(b"another")
    assert [unsized.file(role) for role in unsized.files] == [tmp_path / "engine.onnx", tmp_path / "engine.processor"]


@pytest.fixture
def with_folder(manifest, tmp_path):
    """A manifest that lists two files with hashes and a folder without."""
    (tmp_path / "engine.plan").write_bytes(b"plan")
    plan = describe_file(tmp_path / "engine.plan")
    return replace(manifest, files={**manifest.files, "language_plan": plan, "processor": {"name": "engine.processor"}})


def test_every_hashed_file_is_verified(with_folder):
    fractions = []
    assert [path.name for path in verify_files(with_folder, fractions.append)] == ["engine.onnx", "engine.plan"]
    assert fractions == [0.5, 1.0]


@pytest.mark.parametrize("name", ["engine.onnx", "engine.plan"])
def test_one_changed_bit_is_detected(with_folder, tmp_path, name):
    data = bytearray((tmp_path / name).read_bytes())
    data[-1] ^= 1
    (tmp_path / name).write_bytes(data)
    with pytest.raises(
        UserError, match=f"^{re.escape(str(tmp_path / name))}: its sha256 is .*it was changed, export again$"
    ):
        verify_files(with_folder)


@pytest.mark.parametrize("name", ["engine.onnx", "engine.plan"])
def test_a_missing_file_cannot_be_verified(with_folder, tmp_path, name):
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=f"^{re.escape(str(tmp_path / name))}: is missing"):
        verify_files(with_folder)


def test_a_file_that_cannot_be_read_is_refused(with_folder, tmp_path):
    unreadable = replace(with_folder, files={"language_onnx": {"name": "folder", "sha256": "0" * 64}})
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / 'folder'}: cannot be read (Is a directory)")):
        verify_files(unreadable)


def test_a_manifest_without_hashes_cannot_be_verified(with_folder):
    with pytest.raises(UserError, match=f"^{re.escape(str(with_folder.path))}: lists no sha256"):
        verify_files(replace(with_folder, files={"language_onnx": {"name": "engine.onnx", "bytes": 5}}))


@pytest.fixture
def processor(manifest, tmp_path):
    """A manifest that lists a folder of two files, one of them in a subfolder."""
    folder = tmp_path / "engine.processor"
    (folder / "more").mkdir(parents=True)
    (folder / "tokenizer.json").write_bytes(b"tokens")
    (folder / "more" / "image.json").write_bytes(b"{}")
    return replace(manifest, files={**manifest.files, "processor": describe_folder(folder)})


def test_a_folder_is_described_by_its_files(processor):
    assert processor.files["processor"] == {
        "name": "engine.processor",
        "files": {
            "more/image.json": {"bytes": 2, "sha256": hashlib.sha256(b"{}").hexdigest()},
            "tokenizer.json": {"bytes": 6, "sha256": hashlib.sha256(b"tokens").hexdigest()},
        },
    }
    write_manifest(processor)
    assert read_manifest(processor.path) == processor


def test_files_in_folders_are_verified_with_the_others(processor, tmp_path):
    fractions = []
    inside = [tmp_path / "engine.processor" / name for name in ("more/image.json", "tokenizer.json")]
    assert verify_files(processor, fractions.append) == [tmp_path / "engine.onnx", *inside]
    assert fractions == [1 / 3, 2 / 3, 1.0]
    assert verify_file(processor, "processor") == tmp_path / "engine.processor"


def change_content(folder):
    (folder / "tokenizer.json").write_bytes(b"tokenS")


def change_size(folder):
    (folder / "more" / "image.json").write_bytes(b"{} ")


def remove_file(folder):
    (folder / "more" / "image.json").unlink()


def add_unlisted_file(folder):
    (folder / "preprocessor_config.json").write_bytes(b"{}")


@pytest.mark.parametrize("use", [lambda m: verify_file(m, "processor"), verify_files], ids=["opened", "verified"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (change_content, "tokenizer.json: its sha256 is "),
        (change_size, "more/image.json: has 3 bytes, the manifest says 2; it was changed or is incomplete, export again"),
        (remove_file, "more/image.json: is missing; it belongs to engine.json"),
        (add_unlisted_file, "preprocessor_config.json: is not part of this export; take it away, or export again"),
    ],
)
def test_a_folder_with_changed_files_is_refused(processor, tmp_path, change, words, use):
    folder = tmp_path / "engine.processor"
    change(folder)
    with pytest.raises(UserError, match=f"^{re.escape(f'{folder}/{words}')}"):
        use(processor)


@pytest.mark.parametrize("name", [".DS_Store", ".cache/huggingface/lock", "more/.tmpA1b2"])
def test_hidden_files_in_a_folder_stop_no_session_but_are_not_verified(processor, tmp_path, name):
    path = tmp_path / "engine.processor" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    verify_file(processor, "processor")
    with pytest.raises(UserError, match=f"{re.escape(name)}: is not part of this export; take it away"):
        verify_files(processor)
    assert describe_folder(tmp_path / "engine.processor")["files"][name]["bytes"] == 1


def test_a_link_to_a_folder_in_a_folder_is_not_part_of_the_export(processor, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "engine.processor" / "linked").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="linked: is not part of this export"):
        verify_file(processor, "processor")


def test_a_folder_without_a_record_is_not_verified(processor, tmp_path):
    """Exports made before folders were recorded have such entries."""
    older = replace(processor, files={**processor.files, "processor": {"name": "engine.processor"}})
    add_unlisted_file(tmp_path / "engine.processor")
    assert verify_file(older, "processor") == tmp_path / "engine.processor"
    assert verify_files(older) == [tmp_path / "engine.onnx"]


def test_large_files_are_hashed_by_verify_files_only(processor, tmp_path, monkeypatch):
    monkeypatch.setattr(manifest_module, "VERIFY_AT_OPEN_BYTES", 5)
    change_content(tmp_path / "engine.processor")
    verify_file(processor, "processor")
    with pytest.raises(UserError, match=r"tokenizer\.json: its sha256 is"):
        verify_files(processor)


@pytest.mark.usefixtures("processor")
def test_files_are_described_in_the_background(tmp_path):
    path, folder = tmp_path / "some.data", tmp_path / "engine.processor"
    path.write_bytes(bytes(3 * 2**20))
    with describe_in_background({"a": path, "b": folder}) as described:
        assert described() == {"a": describe_file(path), "b": describe_folder(folder)}


def test_an_error_in_the_context_stops_the_hashing(tmp_path):
    path, read = tmp_path / "endless", threading.Event()
    os.mkfifo(path)

    def fill() -> None:
        with path.open("wb", buffering=0) as file, contextlib.suppress(BrokenPipeError):
            while True:
                file.write(bytes(2**20))
                read.set()

    writer = threading.Thread(target=fill)
    writer.start()
    with contextlib.suppress(UserError), describe_in_background({"a": path}):
        assert read.wait(60)
        raise UserError("nothing built")
    writer.join(60)
    assert not writer.is_alive()


def test_an_error_of_the_hashing_is_raised_to_the_caller_that_waits(tmp_path):
    with describe_in_background({"a": tmp_path / "gone"}) as described, pytest.raises(FileNotFoundError):
        described()
