"""`qvlm_export.load`: an exported LLaVA that answers questions about pictures, once or in a conversation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image

from calibrate.errors import UserError
from engines.manifest import Manifest, read_manifest
from engines.sampling import Sampling
from engines.session import Sequences, Session, open_session
from qvlm_export.samples import chat_text, encode, load_processor

_MARK = "\u2063answer\u2063"  # invisible separators: no user types them


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

    def generate(
        self,
        prompt: str,
        images: Sequence[Image.Image] = (),
        max_new_tokens: int = 64,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
    ) -> str:
        """The model's answer to one user turn with these pictures."""
        return "".join(self.stream(prompt, images, max_new_tokens, sampling, stop))

    def stream(
        self,
        prompt: str,
        images: Sequence[Image.Image] = (),
        max_new_tokens: int = 64,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
    ) -> Iterator[str]:
        """The same answer in pieces, as they are decoded."""
        return self.chat().say(prompt, images, max_new_tokens, sampling, stop)

    def chat(self) -> Chat:
        """A new conversation."""
        return Chat(self.session, self.processor)


class Chat:
    """A conversation whose history stays in the cache: a turn computes its own tokens only."""

    def __init__(self, session: Session, processor: Any) -> None:
        self._session, self._processor = session, processor
        self._turns: list[dict[str, Any]] = []
        self._sequences: Sequences | None = None

    def say(
        self,
        text: str,
        images: Sequence[Image.Image] = (),
        max_new_tokens: int = 64,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
    ) -> Iterator[str]:
        """Adds a user turn and yields the answer in pieces.

        Raises UserError, with the conversation as it was, when the turn does not fit into the context. An answer that is
        broken off (by the caller, or Ctrl-C) stays in the history as far as it came.
        """
        turns = [*self._turns, {"role": "user", "text": text, "images": len(images)}]
        self._feed(turns, [image.convert("RGB") for image in images])
        self._turns = [*turns, {"role": "assistant", "text": ""}]
        pieces: list[str] = []
        try:
            for piece in self._decode(max_new_tokens, sampling or Sampling(), tuple(stop)):
                pieces.append(piece)
                yield piece
        finally:
            self._turns[-1]["text"] = "".join(pieces)

    def _feed(self, turns: list[dict[str, Any]], images: list[Image.Image]) -> None:
        """Computes what the conversation has more than the cache."""
        if self._sequences is None:
            pixels, ids = encode(self._processor, chat_text(self._processor, turns), images)
            self._sequences = self._session.start([ids], pixels if len(images) else None)
            return
        # What the template puts between the last answer and the next is the text behind a mark in the answer's place.
        marked = [*turns[:-2], {"role": "assistant", "text": _MARK}, turns[-1]]
        _, found, added = chat_text(self._processor, marked).rpartition(_MARK)
        if not found:
            raise UserError(
                "the chat template leaves earlier answers out, so this conversation cannot go on; start a new one"
            )
        pixels, ids = encode(self._processor, added, images, continues=True)
        self._session.extend(self._sequences, [ids], pixels if len(images) else None)

    def _decode(self, max_new_tokens: int, sampling: Sampling, stop: tuple[str, ...]) -> Iterator[str]:
        """Text pieces. A piece is held back while it could be the beginning of a stop string or of a character."""
        if self._sequences is None:
            raise RuntimeError("nothing was fed")
        sequence, tokenizer = self._sequences.tokens[0], self._processor.tokenizer
        began, shown, stop_ids = len(sequence), "", frozenset({tokenizer.eos_token_id})
        for _ in self._session.generate(self._sequences, max_new_tokens, stop_ids, sampling):
            text, ended = _cut(tokenizer.decode(sequence[began:], skip_special_tokens=True).lstrip(), stop)
            safe = text if ended else text[: len(text) - _held(text, stop)]
            if len(safe) > len(shown) and not safe.endswith("\ufffd"):
                yield safe[len(shown) :]
                shown = safe
            if ended:
                return
        rest = _cut(tokenizer.decode(sequence[began:], skip_special_tokens=True).lstrip(), stop)[0]
        if len(rest) > len(shown):
            yield rest[len(shown) :]


def _cut(text: str, stop: tuple[str, ...]) -> tuple[str, bool]:
    """The text before the first stop string, and whether there was one."""
    found = [at for at in (text.find(s) for s in stop if s) if at >= 0]
    return (text[: min(found)], True) if found else (text, False)


def _held(text: str, stop: tuple[str, ...]) -> int:
    """How many characters at the end could be the beginning of a stop string."""
    return max((n for s in stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)


def load(path: str | Path, runtime: str = "auto", fast: bool = False) -> LoadedModel:
    """Opens an export by its plan (X.plan) or manifest (X.json). Raises UserError for a missing or damaged one.

    fast: on ONNX Runtime, let INT4 products round activations to 8 bits; quicker, and not what the engine computes.
    """
    plan = Path(path)
    if plan.suffix not in (".plan", ".json"):
        raise UserError(f"{plan}: give the .plan that qvlm-export wrote, or the .json beside it")
    manifest = read_manifest(plan.with_suffix(".json"))
    processor = load_processor(manifest.file("processor"))
    return LoadedModel(open_session(manifest, runtime, fast=fast), processor)
