"""The searching efforts from the command line: to the end, and refused before anything is measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from commands import assert_refused, copy_checkpoint, export_to, run_export, write_calibration
from safetensors.numpy import load_file, save_file

from qvlm_export.calibrate.checkpoint.calibrated import CalibratedCheckpoint

Llava = Callable[..., Path]
EFFORTS = ("rtn", "fast", "full")


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Samples without pictures."""
    path = tmp_path / "texts.jsonl"
    lines = [{"prompt": f"How many are {count}?", "answer": str(count)} for count in range(2)]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("effort", EFFORTS)
def test_quantizes_one_input_once(llava: Llava, tmp_path: Path, effort: str) -> None:
    """Every effort gives a graph in which linears that read one input read one quantized input."""
    out, data = tmp_path / "x.plan", write_calibration(tmp_path, 3)
    export_to(llava(), out, "--scheme", "int8", "--effort", effort, "--backend", "onnx", "--calib-data", data)
    calibrated = CalibratedCheckpoint(tmp_path / "x.calibrated")
    for graph, prefix in {"x.vision.onnx": "vision_tower.", "x.onnx": "language_model."}.items():
        nodes = [node.op_type for node in onnx.load(tmp_path / graph, load_external_data=False).graph.node]
        blocks = {name.rpartition(".layers.")[2].partition(".")[0] for name in calibrated.schemes if name.startswith(prefix)}
        inputs = 4 * len({block for block in blocks if block.isdigit()})  # of q, k, v; o; gate, up; down
        projector = 2 * (prefix == "vision_tower.")
        assert nodes.count("QuantizeLinear") == inputs + projector
    blocks = json.loads((tmp_path / "x.json").read_text())["calibration"]["blocks"]
    assert all("compared" in block for block in blocks) == (effort != "rtn")


@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize("dry", [False, True])
def test_refuses_texts_alone_for_a_tower(llava: Llava, tmp_path: Path, texts: Path, effort: str, dry: bool) -> None:
    out = tmp_path / "out" / "x.plan"
    given = ("--scheme", "int8", "--effort", effort, "--backend", "onnx", "--calib-data", texts, *["--dry-run"] * dry)
    assert_refused(run_export(llava(), out, *given), str(texts), "no sample has a picture", "add samples with pictures")
    assert not out.parent.exists()


@pytest.mark.parametrize("effort", EFFORTS)
def test_texts_alone_calibrate_a_decoder(llava: Llava, tmp_path: Path, texts: Path, effort: str) -> None:
    recipe = tmp_path / "decoder.yaml"
    left = [f"- {{match: '{part}*', scheme: float}}\n" for part in ("vision_tower", "multi_modal_projector")]
    recipe.write_text("".join(["base: int8\n", "rules:\n", *left]))
    content = export_to(
        llava(), tmp_path / "x.plan", "--recipe", recipe, "--effort", effort, "--backend", "onnx", "--calib-data", texts
    )
    assert content
    assert all(n.startswith("language_model.") for n in CalibratedCheckpoint(tmp_path / "x.calibrated").schemes)


@pytest.mark.parametrize("effort", EFFORTS)
def test_refuses_values_that_overflow_inside_a_block(llava: Llava, tmp_path: Path, effort: str) -> None:
    """In less time than a search takes, whatever is searched."""
    folder = copy_checkpoint(llava(dtype="float32"), tmp_path / "checkpoint")
    tensors = load_file(folder / "model.safetensors")
    norm = "language_model.model.layers.1.post_attention_layernorm.weight"
    tensors[norm] = tensors[norm] * 0 + 1e30
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    given = ("--scheme", "int8", "--effort", effort, "--backend", "onnx", "--calib-data", write_calibration(tmp_path))
    refused = run_export(folder, tmp_path / "out" / "x.plan", *given)
    # Only `fast` looks at what a linear reads before what a block gives.
    wrong = "reach 3e+30, which is too large" if effort == "fast" else "are not finite"
    assert_refused(refused, "language_model.model.layers.1", f"activations of sample 1 {wrong}")
    assert not list((tmp_path / "out").glob("x.*"))
