"""Headers of weights on the Hub: as the safetensors library and torch read whole files, and hardly a byte more is served."""

from __future__ import annotations

import io
import json
from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.numpy import load, save

from qvlm_export.calibrate.checkpoint.tensor_source import TensorSource
from qvlm_export.calibrate.errors import UserError
from qvlm_export.checkpoints.files.download import download_files
from qvlm_export.checkpoints.files.headers import find_downloads, read_safetensors_header, read_torch_header
from qvlm_export.checkpoints.files.hub import find_checkpoint
from qvlm_export.checkpoints.files.ranges import BLOCK_BYTES
from qvlm_export.checkpoints.files.weights import open_weights
from tools.compatibility.hub_server import Hub, Repository

NAME = "someone/llava"
BIG = {"a.weight": np.zeros((512, 1024), np.float32), "b": np.ones((3, 5), ml_dtypes.bfloat16)}  # two MiB


def torch_file(tensors: dict[str, np.ndarray], **settings: bool) -> bytes:
    stream = io.BytesIO()
    torch.save({name: to_torch(array) for name, array in tensors.items()}, stream, **settings)
    return stream.getvalue()


def to_torch(array: np.ndarray) -> torch.Tensor:
    is_bfloat16 = array.dtype == ml_dtypes.bfloat16
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16) if is_bfloat16 else torch.from_numpy(array)


def index(shards: dict[str, str]) -> bytes:
    return json.dumps({"weight_map": shards}).encode()


def open_remote(hub: Hub, files: dict[str, bytes]) -> TensorSource:
    """The weights of a repository with these files."""
    hub.repositories[NAME] = Repository({"config.json": b"{}", **files})
    return open_weights(find_checkpoint(NAME), lambda name: None if name == "dropped" else name)


def describe(source: TensorSource) -> dict[str, tuple[tuple[int, ...], str]]:
    return {name: (source.shape(name), str(source.dtype(name))) for name in source}


@pytest.mark.parametrize("pack", [save, torch_file])
def test_names_shapes_and_dtypes_without_the_weights(hub: Hub, pack: Callable[..., bytes]) -> None:
    name = "model.safetensors" if pack is save else "pytorch_model.bin"
    content = pack({**BIG, "dropped": np.zeros(1, np.int8)})
    source = open_remote(hub, {name: content})
    assert describe(source) == {"a.weight": ((512, 1024), "float32"), "b": ((3, 5), "bfloat16")}
    assert "a.weight" in source
    assert "dropped" not in source
    (download,) = find_downloads(source)
    assert (download.name, download.size, download.path) == (name, len(content), source.files()[0])
    assert 0 < hub.served_weights() < 8 * BLOCK_BYTES < len(content)
    with pytest.raises(RuntimeError, match="not downloaded"):
        source.load("b")


def test_a_server_without_ranges_sends_no_more(hub: Hub) -> None:
    hub.ignore_ranges = True
    content = save({"a": np.zeros(16 * 2**20, np.int8)})
    assert describe(open_remote(hub, {"model.safetensors": content})) == {"a": ((16 * 2**20,), "int8")}
    assert hub.served_weights() < len(content) / 2  # what the connection buffers


def test_a_dropped_connection_is_tried_again(hub: Hub) -> None:
    hub.drops["model.safetensors"] = [5, 0]
    assert "a.weight" in open_remote(hub, {"model.safetensors": save(BIG)})


def test_a_connection_that_drops_every_time_is_refused(hub: Hub) -> None:
    hub.drops["model.safetensors"] = [5] * 50
    with pytest.raises(UserError, match=f"^{NAME}/model.safetensors: cannot be downloaded from {hub.url}"):
        open_remote(hub, {"model.safetensors": save(BIG)})


def test_a_repository_that_is_gated_for_weights_is_refused(hub: Hub) -> None:
    hub.repositories[NAME] = repository = Repository({"config.json": b"{}", "model.safetensors": save(BIG)})
    location = find_checkpoint(NAME)
    repository.gated = True
    with pytest.raises(UserError, match="is a gated repository, and no token was sent"):
        open_weights(location, str)


# Which files


SHARDS = {"model-1.safetensors": save({"a": BIG["a.weight"]}), "model-2.safetensors": save({"b": BIG["b"]})}
INDEX = index({"a": "model-1.safetensors", "b": "model-2.safetensors"})
TORCH_INDEX = index({"a": "pytorch_model-1.bin"})


@pytest.mark.parametrize(
    ("files", "names"),
    [
        ({**SHARDS, "model.safetensors.index.json": INDEX, "extra.safetensors": b"x"}, list(SHARDS)),
        ({"model.safetensors": save(BIG), "model.safetensors.index.json": INDEX}, ["model.safetensors"]),  # a stale index
        ({"model.safetensors": save(BIG), "pytorch_model.bin": b"x"}, ["model.safetensors"]),
        ({"pytorch_model.bin": torch_file(BIG), "pytorch_model.bin.index.json": TORCH_INDEX}, ["pytorch_model.bin"]),
        ({"pytorch_model-1.bin": torch_file(BIG), "pytorch_model.bin.index.json": TORCH_INDEX}, ["pytorch_model-1.bin"]),
    ],
)
def test_the_files_are_those_that_transformers_would_load(hub: Hub, files: dict[str, bytes], names: list[str]) -> None:
    source = open_remote(hub, {**files, "consolidated.safetensors": b"x", "onnx/model.onnx": b"x"})
    assert [download.name for download in find_downloads(source)] == names


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"model.safetensors.index.json": INDEX}, "model-1.safetensors: this shard is named by .* but missing"),
        ({"model.safetensors.index.json": index({"a": "../model.safetensors"})}, "which is not in this folder"),
        ({"model.safetensors.index.json": b"["}, "not a weight index"),
        ({"mm_projector.bin": b"x"}, "a pretrained projector alone"),
        ({"adapter_config.json": b"{}"}, "a LoRA adapter"),
        ({"model.gguf": b"x"}, "no model weights"),
    ],
)
def test_repositories_without_complete_weights_are_refused(hub: Hub, files: dict[str, bytes], words: str) -> None:
    with pytest.raises(UserError, match=words):
        open_remote(hub, files)


@pytest.mark.parametrize("files", [{"model.safetensors": save(BIG)}, {**SHARDS, "model.safetensors.index.json": INDEX}])
def test_weights_that_are_not_in_the_cache_are_missed_by_name_without_network(
    hub: Hub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_remote(hub, files)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"^someone/llava: .*is not completely in the cache .*, and HF_HUB_OFFLINE"):
        open_weights(find_checkpoint(NAME), str)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    download_files(find_downloads(source), lambda _: None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert open_weights(find_checkpoint(NAME), str).load("b").shape == (3, 5)


# Damaged headers


def with_header(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(**changes: object) -> dict[str, object]:
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}


DAMAGED = [
    b"", b"\0" * 7, with_header({}, length=2**63), with_header({}, length=3), with_header(b"[]"), with_header(b"{"),
    with_header(b"[" * 100_000), with_header(entry(), b"\0" * 7), with_header(entry(), b"\0" * 9),
    with_header(entry(shape=[3]), b"\0" * 8), with_header(entry(shape=[-2]), b"\0" * 8),
    with_header(entry(shape=2), b"\0" * 8),
    with_header(entry(shape=[True, 2]), b"\0" * 8), with_header(entry(shape=["2"]), b"\0" * 8),
    with_header(entry(data_offsets=[0]), b"\0" * 8), with_header(entry(data_offsets=[8, 16]), b"\0" * 16),
    with_header(entry(dtype="F7"), b"\0" * 8), with_header(entry(dtype=["F32"]), b"\0" * 8), with_header({"a": 1}),
    with_header({**entry(), "b": entry()["a"]}, b"\0" * 8), b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
]  # fmt: skip


@pytest.mark.parametrize("content", DAMAGED)
def test_damaged_headers_are_refused_as_by_the_safetensors_library(content: bytes) -> None:
    with pytest.raises(UserError, match=r"^where: (not a readable safetensors file|tensor a has type)"):
        read_safetensors_header(io.BytesIO(content), len(content), "where")
    with pytest.raises(SafetensorError):
        load(content)


SHAPES = st.lists(st.integers(0, 3), max_size=3).map(tuple)
DTYPES = st.sampled_from([np.float32, np.float16, np.int8, np.bool_, ml_dtypes.bfloat16])


@given(st.dictionaries(st.text(min_size=1, max_size=4), st.tuples(SHAPES, DTYPES), max_size=4))
def test_every_file_of_the_safetensors_library_is_read(tensors: dict[str, tuple[tuple[int, ...], type]]) -> None:
    tensors.pop("__metadata__", None)
    content = save({name: np.zeros(shape, dtype) for name, (shape, dtype) in tensors.items()}, {"format": "pt"})
    header = read_safetensors_header(io.BytesIO(content), len(content), "where")
    assert header == {name: (shape, np.dtype(dtype)) for name, (shape, dtype) in tensors.items()}


@given(st.integers(0, 120), st.integers(0, 255))
def test_a_changed_byte_is_refused_by_both_or_by_none(place: int, value: int) -> None:
    """Where both read the file, both read the same."""
    content = bytearray(save({"a": np.zeros((2, 3), np.float32), "b": np.zeros(4, np.int8)}))
    content[place % len(content)] = value
    try:
        expected = {name: array.shape for name, array in load(bytes(content)).items()}
    except (SafetensorError, ValueError, TypeError, KeyError):
        return
    try:
        header = read_safetensors_header(io.BytesIO(content), len(content), "where")
    except UserError as error:
        if "has type" in str(error):  # which numpy can hold but a model's weights cannot be
            return
        raise
    assert {name: shape for name, (shape, _) in header.items()} == expected


def test_torch_files_without_a_header_are_refused() -> None:
    content = torch_file({"a": BIG["a.weight"]}, _use_new_zipfile_serialization=False)
    for damaged in (content, b"", torch_file(BIG)[:-1000]):
        with pytest.raises(UserError, match=r"before torch 1.6 or is damaged.*`hf download`"):
            read_torch_header(io.BytesIO(damaged), len(damaged), "where")


def test_a_torch_file_that_would_run_code_is_refused() -> None:
    stream = io.BytesIO()
    torch.save({"a": print}, stream)
    with pytest.raises(UserError, match="was not opened, as it could run code"):
        read_torch_header(stream, len(stream.getvalue()), "where")
