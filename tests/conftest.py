"""Shared checkpoints: small, of true structure, with random weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from random_llava import write_random_llava

# Tests must not depend on how many cores a machine has.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """llava(**changes) -> folder of a random checkpoint, made once for each set of changes. Do not write to it."""
    made: dict[str, Path] = {}

    def make(**changes: object) -> Path:
        key = repr(sorted(changes.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp("llava") / "checkpoint"
            write_random_llava(folder, **changes)
            made[key] = folder
        return made[key]

    return make


@pytest.fixture
def absent(tmp_path: Path) -> Iterator[Path]:
    """A path for --out of a command that is to be refused: not even its folder may be there after the test."""
    yield tmp_path / "new" / "engine.plan"
    assert not (tmp_path / "new").exists()
