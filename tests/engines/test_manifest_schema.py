"""A manifest that was edited and sealed again: every value is read as it was meant, or refused in one line."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import export_to, write_calibration
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import qvlm_export
from qvlm_export.calibrate.errors import UserError
from qvlm_export.cli.inspect import app as inspect_app
from qvlm_export.cli.run import app as run_app
from qvlm_export.engines.manifest import read_manifest, seal

Path_ = tuple[str | int, ...]


@pytest.fixture(scope="module")
def exported(llava: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """X.json of an INT4 export, which tests rewrite."""
    folder = tmp_path_factory.mktemp("schema")
    data = write_calibration(folder)
    export_to(llava(), folder / "x.plan", "--backend", "onnx", "--calib-data", data, "--max-length", "64")
    return folder / "x.json"


@pytest.fixture(scope="module")
def content(exported: Path) -> dict[str, Any]:
    """What the export wrote into X.json."""
    result: dict[str, Any] = json.loads(exported.read_text())
    return result


def paths_in(content: Any, path: Path_ = ()) -> Iterator[Path_]:
    """The path of every value in JSON; of long lists and objects, only that of the first few."""
    if path:
        yield path
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in list(items)[:20]:
        yield from paths_in(value, (*path, key))


def put(content: dict[str, Any], path: Path_, value: Any) -> dict[str, Any]:
    """A sealed copy of the content with another value at `path`."""
    changed = copy.deepcopy(content)
    place: Any = changed
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return seal(changed)


def open_and_inspect(path: Path) -> None:
    """Opens the export, asks for a token, and inspects it, as the commands do; only a UserError may end this."""
    for app, arguments in ((inspect_app, ["--json"]), (run_app, ["--prompt", "hi", "--max-new-tokens", "1"])):
        result = CliRunner().invoke(app, [str(path.with_suffix(".plan")), *arguments])
        assert result.exit_code in (0, 2), (result.exception, result.stderr)
        assert result.exit_code == 0 or result.stderr.count("\n") == 1


WRONG = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.sampled_from([-1, 0, 1, 2, 7, 33, 64, 1000, 2**31, 2**63, 1.5, -0.5, 1e308, float("inf"), float("nan")]),
    st.sampled_from(["", "7", "..", "/etc/passwd", "a/b", "\ud800", "\0", "x" * 20_000, "W8A8", "x.onnx"]),
    st.sampled_from([[], {}, [1], [[]], {"a": 1}, [None], {"name": "x.onnx"}, {"": {}}]),
)


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_value_in_any_field_ends_in_a_traceback(exported: Path, content: dict[str, Any], data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(sorted(set(paths_in(content)) - {("sha256",)}, key=str)))
    exported.write_text(json.dumps(put(content, path, data.draw(WRONG))))
    try:
        read_manifest(exported)
    except UserError as error:
        assert str(error).startswith(f"{exported}: ")  # noqa: PT017
        assert "\n" not in str(error)  # noqa: PT017
    else:
        open_and_inspect(exported)


@pytest.mark.parametrize("name", ["../x.onnx", "/etc/passwd", "..", ".", "", "a/b", "a\\b", "a\0b"])
def test_a_file_outside_the_folder_is_refused(exported: Path, content: dict[str, Any], name: str) -> None:
    for path in (("files", "language_onnx", "name"), ("files", "processor", "name")):
        exported.write_text(json.dumps(put(content, path, name)))
        with pytest.raises(UserError, match=rf"the manifest is damaged \({'.'.join(path)}: .*file in this folder"):
            read_manifest(exported)
    inside = {**content["files"]["processor"]["files"], f"../{name}/x": {"bytes": 1, "sha256": "0" * 64}}
    exported.write_text(json.dumps(put(content, ("files", "processor", "files"), inside)))
    with pytest.raises(UserError, match=r"the manifest is damaged \(files\.processor\.files"):
        read_manifest(exported)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("config", "text", "num_layers"), 10**9, "config.text.num_layers: Input should be less than or equal to 1000"),
        (("config", "text", "num_layers"), True, "config.text.num_layers: Input should be a valid integer and is true"),
        (("config", "text", "hidden_size"), "256", "config.text.hidden_size: Input should be a valid integer"),
        (("config", "text", "rms_norm_eps"), -1, "config.text.rms_norm_eps"),
        (("config", "text", "rope_scale"), 0, "text.rope_scale is 0"),
        (("config", "text", "colour"), "red", "config.text.colour: Extra inputs are not permitted"),
        (("config", "vision", "num_heads"), 0, "config.vision.num_heads: Input should be greater than or equal to 1"),
        (("config", "vision", "hidden_act"), "", "config.vision.hidden_act: Input should be 'quick_gelu', 'gelu'"),
        (("config", "image_token_id"), 10**6, "image_token_id is not in the vocabulary"),
        (("limits", "max_batch"), 0, "limits.max_batch"),
        (("float_type",), "float8", "float_type: Input should be 'float16', 'bfloat16' or 'float32'"),
        (("files", "language_onnx", "sha256"), "0" * 63, "files.language_onnx.sha256"),
        (("files", "language_onnx", "bytes"), -1, "files.language_onnx.bytes"),
        (("files", "language_onnx", "bytes"), None, "x.onnx has a hash but no size"),
        (("linears", "a"), 8, "linears.a: Input should be a valid string"),
        (("calibration", "x"), float("nan"), "a number that is not finite"),
    ],
)
def test_the_wrong_value_is_named(exported: Path, content: dict[str, Any], path: Path_, value: Any, words: str) -> None:
    exported.write_text(json.dumps(put(content, path, value)))
    with pytest.raises(UserError) as caught:
        read_manifest(exported)
    assert words in str(caught.value)
    assert str(caught.value).endswith("; export again")


def test_keys_that_a_later_version_adds_elsewhere_are_ignored(exported: Path, content: dict[str, Any]) -> None:
    for path in (("later",), ("model", "later"), ("backend", "later"), ("files", "language_onnx", "later")):
        exported.write_text(json.dumps(put(content, path, [1])))
        with qvlm_export.load(exported.with_suffix(".plan")) as model:
            assert model.manifest.scheme == "int4"


def test_what_an_export_writes_is_read_back(exported: Path, content: dict[str, Any]) -> None:
    exported.write_text(json.dumps(content))
    assert read_manifest(exported).limits.max_length == 64
