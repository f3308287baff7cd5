"""What the tests of `qvlm-run` share, with and without --chat."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from commands import export_to


@pytest.fixture(scope="module")
def exported(llava: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plan path of a float16 export without engines. Do not write beside it."""
    plan = tmp_path_factory.mktemp("run") / "x.plan"
    export_to(llava(), plan, "--backend", "onnx", "--scheme", "fp16", "--max-length", "256")
    return plan
