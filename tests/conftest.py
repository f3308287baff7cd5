"""Fixtures of all tests: small checkpoints of real structure with random weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from random_llava import write_random_llava

from tools.compatibility.hub_server import Hub, run_hub

# The results of tests must not depend on the number of cores of the machine.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """llava(**changes) -> folder of a random checkpoint, made once for each set of changes; tests must not write to it."""
    folders: dict[str, Path] = {}

    def make(**changes: object) -> Path:
        key = repr(sorted(changes.items()))
        if key not in folders:
            folder = tmp_path_factory.mktemp("llava") / "checkpoint"
            write_random_llava(folder, **changes)
            folders[key] = folder
        return folders[key]

    return make


@pytest.fixture
def absent(tmp_path: Path) -> Iterator[Path]:
    """A path for --out of a command that must be refused; after the test not even its folder may exist."""
    yield tmp_path / "new" / "engine.plan"
    assert not (tmp_path / "new").exists()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An empty Hub on localhost with an empty cache, which huggingface_hub uses in this process."""
    with run_hub() as server:
        monkeypatch.delenv("HF_TOKEN", raising=False)
        for name, value in (
            ("ENDPOINT", server.url),
            ("HUGGINGFACE_CO_URL_TEMPLATE", f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"),
            ("HF_HUB_CACHE", str(tmp_path / "hub")),
            ("HF_TOKEN_PATH", str(tmp_path / "token")),
        ):
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr("qvlm_export.checkpoints.files.snapshot.WAITS", (0.0, 0.0))
        monkeypatch.setattr("qvlm_export.checkpoints.files.ranges.WAITS", (0.0, 0.0))
        monkeypatch.setattr("qvlm_export.checkpoints.files.download.WAITS", (0.0, 0.0))
        yield server
