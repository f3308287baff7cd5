"""Every `--effort` on the command line: exports that succeed, and calibration sets and models that are refused."""

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
EFFORTS = ("rtn", "fast", "full", "qvlm")


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A calibration set without images."""
    path = tmp_path / "texts.jsonl"
    lines = [{"prompt": f"How many are {count}?", "answer": str(count)} for count in range(2)]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("effort", EFFORTS)
def test_linears_with_a_shared_input_share_its_quantizer(llava: Llava, tmp_path: Path, effort: str) -> None:
    """Linears that read the same input read the same QuantizeLinear node in the graph."""
    out, data = tmp_path / "x.plan", write_calibration(tmp_path, 3)
    export_to(llava(), out, "--scheme", "int8", "--effort", effort, "--backend", "onnx", "--calib-data", data,
              "--strict")  # fmt: skip
    calibrated = CalibratedCheckpoint(tmp_path / "x.calibrated")
    for graph, prefix in {"x.vision.onnx": "vision_tower.", "x.onnx": "language_model."}.items():
        nodes = [node.op_type for node in onnx.load(tmp_path / graph, load_external_data=False).graph.node]
        blocks = {name.rpartition(".layers.")[2].partition(".")[0] for name in calibrated.schemes if name.startswith(prefix)}
        inputs = 4 * len({block for block in blocks if block.isdigit()})  # q, k, v share one; o; gate and up share one; down
        projector = 2 * (prefix == "vision_tower.")
        assert nodes.count("QuantizeLinear") == inputs + projector
    blocks = json.loads((tmp_path / "x.json").read_text())["calibration"]["blocks"]
    assert all("compared" in block for block in blocks) == (effort != "rtn")


@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize("dry", [False, True])
def test_a_quantized_tower_without_images_is_refused(
    llava: Llava, tmp_path: Path, texts: Path, effort: str, dry: bool
) -> None:
    out = tmp_path / "out" / "x.plan"
    arguments = ("--scheme", "int8", "--effort", effort, "--backend", "onnx", "--calib-data", texts, *["--dry-run"] * dry)
    assert_refused(run_export(llava(), out, *arguments), str(texts), "no sample has a picture", "add samples with pictures")
    assert not out.parent.exists()


@pytest.mark.parametrize("effort", EFFORTS)
def test_text_alone_calibrates_a_decoder(llava: Llava, tmp_path: Path, texts: Path, effort: str) -> None:
    recipe = tmp_path / "decoder.yaml"
    float_rules = [f"- {{match: '{part}*', scheme: float}}\n" for part in ("vision_tower", "multi_modal_projector")]
    recipe.write_text("".join(["base: int8\n", "rules:\n", *float_rules]))
    content = export_to(
        llava(), tmp_path / "x.plan", "--recipe", recipe, "--effort", effort, "--backend", "onnx", "--calib-data", texts
    )
    assert content
    assert all(n.startswith("language_model.") for n in CalibratedCheckpoint(tmp_path / "x.calibrated").schemes)


@pytest.mark.parametrize("effort", EFFORTS)
def test_values_that_overflow_inside_a_block_are_refused(llava: Llava, tmp_path: Path, effort: str) -> None:
    folder = copy_checkpoint(llava(dtype="float32"), tmp_path / "checkpoint")
    tensors = load_file(folder / "model.safetensors")
    norm = "language_model.model.layers.1.post_attention_layernorm.weight"
    tensors[norm] = tensors[norm] * 0 + 1e30
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    arguments = ("--scheme", "int8", "--effort", effort, "--backend", "onnx", "--calib-data", write_calibration(tmp_path))
    float16 = run_export(folder, tmp_path / "out" / "x.plan", *arguments)
    assert_refused(float16, "language_model.model.layers.1", "beyond float16's 65504", "--dtype bfloat16")
    arguments = (*arguments, "--dtype", "bfloat16")
    refused = run_export(folder, tmp_path / "out" / "x.plan", *arguments)
    # Only `fast` and `qvlm` check the inputs of a linear before the outputs of its block.
    cause = "reach 3e+30, which is too large" if effort == "fast" else "are not finite"
    assert_refused(refused, "language_model.model.layers.1", f"activations of sample 1 {cause}")
    assert not list((tmp_path / "out").glob("x.*"))
