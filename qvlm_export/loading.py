"""`qvlm_export.load`: an exported LLaVA that answers questions about pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image

from calibrate.errors import UserError
from engines.manifest import Manifest, read_manifest
from engines.session import Session, open_session
from qvlm_export.samples import chat_text, encode, load_processor


class LoadedModel:
    """A session together with its processor. A context manager."""

    def __init__(self, session: Session, processor: Any) -> None:
        self.session = session
        self.processor = processor

    def __enter__(self) -> LoadedModel:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.session.__exit__(kind, error, trace)

    @property
    def manifest(self) -> Manifest:
        return self.session.manifest

    def logits(self, input_ids: np.ndarray, pixel_values: np.ndarray | None = None) -> np.ndarray:
        """int64 [1, S] and float32 [n, 3, R, R] -> float32 [1, S, vocab], every position."""
        return self.session.logits(input_ids, pixel_values)

    def generate(self, prompt: str, images: Sequence[Image.Image] = (), max_new_tokens: int = 64) -> str:
        """The model's greedy answer to one user turn with these pictures."""
        return "".join(self.stream(prompt, images, max_new_tokens))

    def stream(self, prompt: str, images: Sequence[Image.Image] = (), max_new_tokens: int = 64) -> Iterator[str]:
        """The same answer in pieces, as they are decoded."""
        text = chat_text(self.processor, [{"role": "user", "text": prompt, "images": len(images)}])
        pixels, ids = encode(self.processor, text, [image.convert("RGB") for image in images])
        tokenizer = self.processor.tokenizer
        produced: list[int] = []
        shown = ""
        for step in self.session.generate_ids([ids], pixels, max_new_tokens, frozenset({tokenizer.eos_token_id})):
            token = step[0]
            if token is None or token == tokenizer.eos_token_id:
                break
            produced.append(token)
            whole = tokenizer.decode(produced, skip_special_tokens=True).lstrip()
            # A piece of a character decodes to a replacement mark until its last byte is there.
            if not whole.endswith("\ufffd"):
                yield whole[len(shown) :]
                shown = whole


def load(path: str | Path, runtime: str = "auto") -> LoadedModel:
    """Opens an export by its plan (X.plan) or manifest (X.json). Raises UserError for a missing or damaged one."""
    plan = Path(path)
    if plan.suffix not in (".plan", ".json"):
        raise UserError(f"{plan}: give the .plan that qvlm-export wrote, or the .json beside it")
    manifest = read_manifest(plan.with_suffix(".json"))
    session = open_session(manifest, runtime)
    return LoadedModel(session, load_processor(plan.parent / manifest.files["processor"]["name"]))
