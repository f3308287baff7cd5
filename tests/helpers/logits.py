"""Logits of a checkpoint: of transformers' own model, and of the float16 export."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from commands import export_to
from PIL import Image
from transformers import AutoModelForImageTextToText

import qvlm_export
from qvlm_export.checkpoints.chat_templates import chat_text
from qvlm_export.inputs.samples import encode, load_processor


def relative_l2(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def question(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [1, S] and pixels of a question about an image of noise."""
    noise = np.random.default_rng(0).integers(0, 255, (70, 60, 3), dtype=np.uint8)
    processor = load_processor(folder)
    text = chat_text(processor, [{"role": "user", "text": "What color is the ring?", "images": 1}])
    pixels, ids = encode(processor, text, [Image.fromarray(noise)])
    return ids[None], pixels


def reference_logits(folder: Path) -> np.ndarray:
    """Logits of transformers in float32 for the same question."""
    ids, pixels = question(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits: np.ndarray = model(input_ids=torch.from_numpy(ids), pixel_values=torch.from_numpy(pixels)).logits.numpy()
    return logits


def exported_logits(folder: Path, out: Path) -> np.ndarray:
    """Logits of the float16 export, computed by ONNX Runtime."""
    export_to(folder, out / "x.plan", "--backend", "onnx", "--scheme", "fp16")
    with qvlm_export.load(out / "x.plan", "onnxruntime") as model:
        return model.logits(*question(folder))
