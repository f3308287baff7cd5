"""Samples of the smol LLaVA, with the tokens that it reads and writes when it answers.

The tokenizer splits off digits, so it joins the line break before an answer with the space of " 2" if it gets both as one
text, as calibration files are encoded. An answer that is generated begins behind that line break. So prompt and answer are
encoded one by one, in training as here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from qvlm_export.calibrate.checkpoint.samples import Sample
from qvlm_export.checkpoints.chat_templates import chat_text
from qvlm_export.inputs.samples import encode


def encode_sample(processor: Any, prompt: str, answer: str, image: Image.Image | None) -> Sample:
    """The sample of a question: the model's chat template, a space, the answer, the end token."""
    images = [] if image is None else [image]
    pixels, ids = encode(processor, chat_text(processor, [{"role": "user", "text": prompt, "images": len(images)}]), images)
    tokens = processor.tokenizer.encode(f" {answer}", add_special_tokens=False)
    return Sample(np.concatenate([ids, tokens, [processor.tokenizer.eos_token_id]]), pixels, len(ids))
