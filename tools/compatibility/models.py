"""Compatibility cases of checkpoints: keys left over from conversions, rotary scalings, float ranges, other sources.

The models are small and random, of the true structure. The error is that of the float16 (or bfloat16) graph's logits on ONNX
Runtime, L2 of the difference relative to transformers' logits in float32.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import qvlm_export
from qvlm_export.calibrate.errors import DAMAGED_FILE_ERRORS
from qvlm_export.checkpoints.author_layout import convert_config
from qvlm_export.checkpoints.chat_templates import chat_text
from qvlm_export.checkpoints.files.hub import read_config
from qvlm_export.checkpoints.files.hub_errors import first_line
from qvlm_export.inputs.samples import default_calibration
from tools.compatibility.case import Case, Outcome, run_command
from tools.families.random_families import write_family
from tools.families.random_original import write_original

Edit = Callable[[dict[str, Any]], object]
Tensors = dict[str, torch.Tensor]
DOWN = "language_model.model.layers.0.mlp.down_proj.weight"
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 1e4,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}


def _edit_text(**values: object) -> Edit:
    return lambda config: config["text_config"].update(values)


def _edit_top(**values: object) -> Edit:
    return lambda config: config.update(values)


def _write(folder: Path, kind: str, edit: Edit | None, change: Callable[[Tensors], Tensors] | None = None) -> Path:
    """Writes a random checkpoint of a kind, with an edited config.json and changed tensors."""
    write_family(folder, kind)
    if edit is not None:
        path = folder / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        edit(config)
        path.write_text(json.dumps(config), encoding="utf-8")
    if change is not None:
        path = folder / "model.safetensors"
        save_file(change(load_file(path)), path, {"format": "pt"})
    return folder


def _question(folder: Path) -> dict[str, torch.Tensor]:
    processor = AutoProcessor.from_pretrained(folder)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 60, 3), dtype=np.uint8))
    text = chat_text(processor, [{"role": "user", "text": "What color is the ring?", "images": 1}])
    return dict(processor(images=[image], text=[text], return_tensors="pt"))


def _compare(folder: Path, model: Path, *arguments: str) -> Outcome:
    """Exports a model and compares its logits with those of transformers; or gives the refusal."""
    inputs = _question(model)
    loaded = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32).eval()
    with torch.inference_mode():
        wanted = loaded(**inputs).logits.numpy()
    result = run_command("export", "--model", model, "--out", folder / "x.plan", "--backend", "onnx", *arguments)
    theirs = "finite logits" if np.isfinite(wanted).all() else "NaN"
    if result.code:
        return Outcome(theirs, result.in_words(folder))
    with qvlm_export.load(folder / "x.plan", "onnxruntime") as exported:
        got = exported.logits(inputs["input_ids"].numpy(), inputs["pixel_values"].numpy())
    return Outcome(theirs, f"the same, error {np.linalg.norm(got - wanted) / np.linalg.norm(wanted):.1e}")


def _same(title: str, edit: Edit | None, kind: str = "llava", change: Callable[[Tensors], Tensors] | None = None) -> Case:
    return Case(title, lambda folder: _compare(folder, _write(folder / "model", kind, edit, change), "--scheme", "fp16"))


def _run_transformers(model: Path) -> str:
    """Returns what transformers makes of a checkpoint: an error in one line, random weights, NaN, or finite logits."""
    try:
        loaded, info = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32, output_loading_info=True)
        with torch.inference_mode():
            logits = loaded.eval()(**_question(model)).logits
    except DAMAGED_FILE_ERRORS as error:
        return f"{type(error).__name__}: {first_line(error)[:100]}".replace(f"{model.parent}/", "")
    if missing := len(info["missing_keys"]):
        return f"{missing} tensors are drawn at random, with a warning"
    return "finite logits" if bool(logits.isfinite().all()) else "NaN"


def _refused(title: str, write: Callable[[Path], object], kind: str = "llava", tried: bool = True) -> Case:
    """A case that is refused. tried: whether transformers is tried, too, and not only what it would take."""

    def run(folder: Path) -> Outcome:
        model = _write(folder / "model", kind, None)
        write(model)
        result = run_command("export", "--model", model, "--out", folder / "x.plan", "--backend", "onnx")
        return Outcome(_run_transformers(model) if tried else "not tried", result.in_words(folder))

    return Case(title, run)


def _rename(change: Callable[[str], str]) -> Callable[[Path], object]:
    def write(model: Path) -> None:
        path = model / "model.safetensors"
        save_file({change(name): tensor for name, tensor in load_file(path).items()}, path, {"format": "pt"})

    return write


def _put(**values: object) -> Callable[[Path], object]:
    def write(model: Path) -> None:
        path = model / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **values}), encoding="utf-8")

    return write


def _put_text(**values: object) -> Callable[[Path], object]:
    def write(model: Path) -> None:
        path = model / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config["text_config"] |= values
        path.write_text(json.dumps(config), encoding="utf-8")

    return write


def _leave_adapter(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "adapter_config.json").write_text("{}", encoding="utf-8")


def _leave_gguf(model: Path) -> None:
    (model / "model.safetensors").rename(model / "llava-q4_k_m.gguf")


def _name_tower(folder: Path) -> Outcome:
    """In the authors' layout, whose tower may be the path that it had where the model was trained."""
    write_original(folder / "model", "v1.6-vicuna")
    _put(mm_vision_tower="/home/someone/clip-vit-large-patch14-336")(folder / "model")
    vision = convert_config(read_config(folder / "model"), folder / "model")["vision_config"]
    return Outcome("–", f"{vision['model_type']} of {vision['image_size']} pixels, {vision['num_hidden_layers']} layers")


def _scale(factors: Mapping[str, float]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {n: (t.bfloat16() * factors.get(n, 1.0)) for n, t in tensors.items()}


def _overflow(*arguments: str) -> Callable[[Path], Outcome]:
    def run(folder: Path) -> Outcome:
        model = _write(folder / "model", "llava", _edit_top(dtype="bfloat16"), _scale({DOWN: 2.0**15}))
        return _compare(folder, model, "--scheme", "fp16", *arguments)

    return run


def _keep_older_index(folder: Path) -> Outcome:
    model = _write(folder / "model", "llava", None)
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return _compare(folder, model, "--scheme", "fp16")


def _generate_first(folder: Path) -> Outcome:
    result = run_command("export", "--model", "tiny", "--out", folder / "x.plan", "--backend", "onnx")
    if result.code:
        return Outcome("–", result.in_words(folder))
    calibrated = folder / "x.calibrated"
    model, processor = AutoModelForImageTextToText.from_pretrained(calibrated), AutoProcessor.from_pretrained(calibrated)
    picture = default_calibration().parent / "images" / "000.png"
    text = chat_text(processor, [{"role": "user", "text": "What color is the ring?", "images": 1}])
    inputs = processor(images=[Image.open(picture)], text=[text], return_tensors="pt")
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    answer = run_command("run", folder / "x.plan", "--image", picture, "--prompt", "What color is the ring?")
    theirs = processor.decode(tokens, skip_special_tokens=True).strip()
    return Outcome(f"answers {theirs!r} from the folder", f"answers {answer.stdout.strip()!r} from the graph")


def _see_through_links(folder: Path) -> Outcome:
    result = run_command("export", "--model", "tiny", "--out", folder / "a" / "x.plan", "--backend", "onnx")
    if result.code:
        return Outcome("–", result.in_words(folder))
    store, view = folder / "store", folder / "view"
    view.mkdir()
    shutil.move(folder / "a", store)
    for path in store.iterdir():
        (view / path.name).symlink_to(path)
    answer = run_command("run", view / "x.plan", "--prompt", "What is this?", "--max-new-tokens", "4")
    return Outcome("–", f"exit code {answer.code}")


def _name_target(target: str) -> Callable[[Path], Outcome]:
    def run(folder: Path) -> Outcome:
        arguments = ("--backend", "tensorrt-rtx", "--target", target)
        return Outcome(
            "–", run_command("export", "--model", "tiny", "--out", folder / "x.plan", *arguments).in_words(folder)
        )

    return run


LEFTOVERS = (
    _same("Llama with Mistral's sliding_window", _edit_text(sliding_window=24)),
    _same("Llama with Qwen's layer_types", _edit_text(sliding_window=24, layer_types=["sliding_attention"] * 2)),
    _same("Llama with logit scale and softcaps", _edit_text(logit_scale=0.1, final_logit_softcapping=1.0)),
    _same("Llama with partial_rotary_factor", _edit_text(partial_rotary_factor=0.5)),
    _same("Mistral with Llama's attention_bias", _edit_text(attention_bias=True), "bakllava"),
    _same("Mistral with a window", _edit_text(sliding_window=24), "bakllava"),
    _same("VIP-LLaVA with a select strategy", _edit_top(vision_feature_select_strategy="full"), "vipllava"),
    _same("LLaVA with keys of the authors' layout", _edit_top(mm_vision_tower="openai/clip-vit-large-patch14")),
    _same("projector without activation", _edit_top(projector_hidden_act="linear")),
    _same("activation named gelu_new", _edit_text(hidden_act="gelu_new")),
    Case("single weight file beside an older index", _keep_older_index),
    _same("rope_type dynamic", _edit_text(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})),
    _same("rope_type linear", _edit_text(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4})),
    _same("rope_type llama3", _edit_text(rope_parameters=LLAMA3)),
    _same("rope_type yarn", _edit_text(rope_parameters=YARN)),
    _refused("Qwen2 with layers of two kinds", _put_text(
        use_sliding_window=True, sliding_window=24, max_window_layers=1, layer_types=None), "interleave"),
    _refused("is_causal false", _put_text(is_causal=False)),
    _refused("rms_norm_eps NaN", _put_text(rms_norm_eps=float("nan"))),
    _refused("rope_theta 0", _put_text(rope_parameters={"rope_type": "default", "rope_theta": 0.0})),
    _refused("a billion layers", _put_text(num_hidden_layers=10**9), tried=False),
    Case("bfloat16 activations beyond 65504", _overflow()),
    Case("the same with --dtype bfloat16", _overflow("--dtype", "bfloat16")),
)  # fmt: skip
SOURCES = (
    _refused("AWQ", _put(quantization_config={"quant_method": "awq", "bits": 4})),
    _refused("bitsandbytes, 4 bits", _put(
        quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})),
    _refused("LoRA adapter without its base", _leave_adapter),
    _refused("names with module.", _rename(lambda name: f"module.{name}")),
    _refused("names with _orig_mod.", _rename(lambda name: f"_orig_mod.{name}")),
    _refused("a GGUF file alone", _leave_gguf),
    Case("known tower by a path of another machine", _name_tower),
    Case("X.calibrated, generate() first", _generate_first),
    Case("an export seen through symbolic links", _see_through_links),
    Case("--target sm90", _name_target("sm90")),
    Case("--target h100", _name_target("h100")),
)  # fmt: skip
