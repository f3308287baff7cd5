"""An export seen through links, as in a store or cache of models: every command takes it like the files themselves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from commands import export_to, run_model, write_calibration
from stores import hard_link, link_into_store
from typer.testing import CliRunner

import qvlm_export
from qvlm_export.calibrate.errors import UserError
from qvlm_export.cli.inspect import app as inspect_app
from qvlm_export.cli.validate import app as validate_app


@pytest.fixture(scope="module")
def exported(llava: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an INT4 export without engines."""
    folder = tmp_path_factory.mktemp("links") / "export"
    data = write_calibration(folder.parent)
    export_to(llava(), folder / "x.plan", "--backend", "onnx", "--calib-data", data, "--max-length", "128")
    return folder


@pytest.fixture(params=[link_into_store, hard_link, lambda export, folder: folder.symlink_to(export) or folder])
def linked(request: pytest.FixtureRequest, exported: Path, tmp_path: Path) -> Path:
    """X.plan of the export, seen through symbolic links of files, hard links, or a symbolic link of the folder."""
    return request.param(exported, tmp_path / "seen") / "x.plan"


def test_logits_are_those_of_the_files_themselves(exported: Path, linked: Path) -> None:
    ids = np.array([[1, 7, 8, 9]])
    with qvlm_export.load(exported / "x.plan") as model, qvlm_export.load(linked) as other:
        np.testing.assert_array_equal(other.logits(ids), model.logits(ids))


def test_commands_take_it(linked: Path, llava: Callable[..., Path]) -> None:
    verified = CliRunner().invoke(inspect_app, [str(linked), "--verify"])
    assert verified.exit_code == 0, verified.stderr
    assert "size and sha256 are what the export wrote" in verified.stdout
    assert run_model(linked, "--prompt", "What is it?", "--max-new-tokens", "2").exit_code == 0
    arguments = [str(linked), "--reference", str(llava()), "--limit", "1", "--per-layer", "--json"]
    validated = CliRunner().invoke(validate_app, arguments)
    content = json.loads(validated.stdout)
    assert content["weights"]["checked"] == 34
    assert content["weights"]["wrong"] == []
    assert sum(layer["graph_compared"] for layer in content["layers"]) > 0


def test_weights_outside_the_one_data_file_are_refused(exported: Path, tmp_path: Path) -> None:
    """A graph could otherwise name any file of the machine as its weights."""
    folder = hard_link(exported, tmp_path / "seen")
    graph = folder / "x.onnx"
    content = graph.read_bytes()
    graph.unlink()
    graph.write_bytes(content.replace(b"x.onnx.data", b"../passwdxx"))
    manifest = json.loads((folder / "x.json").read_text())
    from qvlm_export.engines.manifest import describe_file, seal

    manifest["files"]["language_onnx"] = describe_file(graph)
    (folder / "x.json").unlink()
    (folder / "x.json").write_text(json.dumps(seal(manifest)))
    with pytest.raises(UserError, match=r"lies in \.\./passwdxx, not in x\.onnx\.data"):
        qvlm_export.load(folder / "x.plan")
