"""`qvlm_export.load`: an exported LLaVA that answers questions about pictures, once or in a conversation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypedDict, Unpack, overload

import numpy as np
from PIL import Image

from qvlm_export.calibrate.checkpoint.samples import join_placements
from qvlm_export.calibrate.errors import UserError
from qvlm_export.checkpoints.chat_templates import chat_text
from qvlm_export.engines.manifest import Manifest, read_manifest, verify_file
from qvlm_export.engines.runtime.open import open_session
from qvlm_export.engines.runtime.sampling import Sampling
from qvlm_export.engines.runtime.session import Sequences, Session
from qvlm_export.inputs.samples import encode_pictures, load_processor
from qvlm_export.inputs.tiles import place_tiles, select_tiles, tile_counts

_MARK = "\u2063answer\u2063"  # invisible separators: no user types them


@dataclass(frozen=True, kw_only=True)
class Generation(Sampling):
    """How to answer: how tokens are chosen, how many at most, and texts of which the first ends the answer before it."""

    max_new_tokens: int = 64
    stop: Sequence[str] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens {self.max_new_tokens}: must be at least 1")
        if isinstance(self.stop, str):  # a sequence of its letters otherwise
            raise UserError(f"stop {self.stop!r}: give a list of texts")


class Settings(TypedDict, total=False):
    """The fields of `Generation`, for keyword arguments."""

    max_new_tokens: int
    stop: Sequence[str]
    temperature: float
    top_p: float
    repetition_penalty: float
    seed: int


DEFAULTS = Generation()


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

    def logits(
        self, input_ids: np.ndarray, pixel_values: np.ndarray | None = None, image_sizes: np.ndarray | None = None
    ) -> np.ndarray:
        """int64 [1, S] and float32 [n, 3, R, R] -> float32 [1, S, vocab], every position.

        For models that cut pictures into tiles as their processor gives them: float32 [n, most tiles, 3, R, R], and
        image_sizes [n, 2], height and width of every picture in pixels.
        """
        if self.manifest.config.tiles is None or pixel_values is None or not len(pixel_values):
            return self.session.logits(input_ids, pixel_values)
        if image_sizes is None or np.ndim(pixel_values) != 5:
            raise UserError("this model cuts pictures into tiles; give pixel_values and image_sizes as its processor does")
        sizes = [(int(height), int(width)) for height, width in image_sizes]
        tiles = select_tiles(pixel_values, tile_counts(self.manifest.config, sizes))
        return self.session.logits(input_ids, tiles, place_tiles(self.manifest.config, sizes))

    @overload
    def generate(
        self,
        prompt: str,
        images: Sequence[Image.Image] = (),
        settings: Generation = DEFAULTS,
        *,
        stream: Literal[False] = False,
        **changes: Unpack[Settings],
    ) -> str: ...

    @overload
    def generate(
        self,
        prompt: str,
        images: Sequence[Image.Image] = (),
        settings: Generation = DEFAULTS,
        *,
        stream: Literal[True],
        **changes: Unpack[Settings],
    ) -> Iterator[str]: ...

    def generate(
        self,
        prompt: str,
        images: Sequence[Image.Image] = (),
        settings: Generation = DEFAULTS,
        *,
        stream: bool = False,
        **changes: Unpack[Settings],
    ) -> str | Iterator[str]:
        """The model's answer to one user turn with these pictures; with `stream`, in pieces as they are decoded.

        Keyword arguments are those of `Generation`, such as max_new_tokens=64 or temperature=0.7, and go before `settings`.
        Raises UserError for a prompt that cannot be taken, at once and not with the first piece.
        """
        pieces = self.chat().say(prompt, images, settings, **changes)
        return pieces if stream else "".join(pieces)

    def generate_batch(
        self,
        prompts: Sequence[str],
        images: Sequence[Sequence[Image.Image]] | None = None,
        settings: Generation = DEFAULTS,
        **changes: Unpack[Settings],
    ) -> list[str]:
        """Answers to several prompts at once, each with its own pictures; as many as `--max-batch` of the export.

        Raises UserError for prompts that cannot be taken, naming the prompt where it is one of them.
        """
        chosen, shown = replace(settings, **changes), [()] * len(prompts) if images is None else images
        if not prompts or len(shown) != len(prompts):
            raise UserError(
                f"{len(prompts)} prompts with pictures for {len(shown)}; give as many lists of pictures as prompts"
            )
        encoded = []
        for number, (prompt, pictures) in enumerate(zip(prompts, shown, strict=True), 1):
            text = chat_text(self.processor, [{"role": "user", "text": prompt, "images": len(pictures)}])
            rgb, where = [picture.convert("RGB") for picture in pictures], f"prompt {number}"
            encoded.append(encode_pictures(self.processor, self.manifest.config, text, rgb, where=where))
        pixels = [one.pixel_values for one in encoded if len(one.pixel_values)]
        rows = [len(one.pixel_values) * self.manifest.config.vision.tokens_per_image for one in encoded]
        placement = join_placements([one.placement for one in encoded], rows)
        starts = [one.input_ids for one in encoded]
        sequences = self.session.start(starts, np.concatenate(pixels) if pixels else None, placement)
        return _decode_batch(self, sequences, [len(ids) for ids in starts], chosen)

    def chat(self) -> Chat:
        """A new conversation."""
        return Chat(self.session, self.processor)


class Chat:
    """A conversation whose history stays in the cache: a turn computes its own tokens only.

    ended: why the last answer did: "stop" (the model's end token or a stop text), "max_new_tokens", or "context", which is
    full; None while it goes on, or after it was broken off.
    """

    ended: Literal["stop", "max_new_tokens", "context"] | None

    def __init__(self, session: Session, processor: Any) -> None:
        self.ended = None
        self._session, self._processor, self._config = session, processor, session.manifest.config
        self._turns: list[dict[str, Any]] = []
        self._sequences: Sequences | None = None

    def say(
        self,
        text: str,
        images: Sequence[Image.Image] = (),
        settings: Generation = DEFAULTS,
        **changes: Unpack[Settings],
    ) -> Iterator[str]:
        """Adds a user turn, computes it, and returns the answer in pieces, which are decoded as they are asked for.

        Raises UserError, with the conversation as it was, when the turn cannot be taken, such as for want of context. An
        answer that is broken off (by the caller, or Ctrl-C) stays in the history as far as it came.
        """
        chosen = replace(settings, **changes)
        turns = [*self._turns, {"role": "user", "text": text, "images": len(images)}]
        self._feed(turns, [image.convert("RGB") for image in images])
        self._turns, self.ended = [*turns, {"role": "assistant", "text": ""}], None
        return self._answer(self._turns[-1], chosen)

    def _answer(self, turn: dict[str, Any], settings: Generation) -> Iterator[str]:
        """Pieces of the answer, which is written into its turn."""
        for piece in self._decode(settings):
            turn["text"] += piece
            yield piece

    def _feed(self, turns: list[dict[str, Any]], images: list[Image.Image]) -> None:
        """Computes what the conversation has more than the cache."""
        if self._sequences is None:
            new = encode_pictures(self._processor, self._config, chat_text(self._processor, turns), images)
            self._sequences = self._session.start([new.input_ids], new.pixel_values, new.placement)
            return
        # What the template puts between the last answer and the next is the text behind a mark in the answer's place.
        marked = [*turns[:-2], {"role": "assistant", "text": _MARK}, turns[-1]]
        _, found, added = chat_text(self._processor, marked).rpartition(_MARK)
        if not found:
            raise UserError(
                "the chat template leaves earlier answers out, so this conversation cannot go on; start a new one"
            )
        new = encode_pictures(self._processor, self._config, added, images, continues=True)
        self._session.extend(self._sequences, [new.input_ids], new.pixel_values, new.placement)

    def _decode(self, settings: Generation) -> Iterator[str]:
        """Text pieces. A piece is held back while it could be the beginning of a stop string or of a character."""
        if self._sequences is None:
            raise RuntimeError("nothing was fed")
        sequence, tokenizer, stop = self._sequences.tokens[0], self._processor.tokenizer, tuple(settings.stop)
        began, shown, stop_ids, stopped = len(sequence), "", frozenset({tokenizer.eos_token_id}), False
        for (token,) in self._session.generate(self._sequences, settings.max_new_tokens, stop_ids, settings):
            stopped = token in stop_ids
            text, ended = _cut(tokenizer.decode(sequence[began:], skip_special_tokens=True).lstrip(), stop)
            safe = text if ended else text[: len(text) - _held(text, stop)]
            if len(safe) > len(shown) and not safe.endswith("\ufffd"):
                yield safe[len(shown) :]
                shown = safe
            if ended:
                self.ended = "stop"
                return
        full = len(sequence) == self._session.manifest.limits.max_length
        self.ended = "stop" if stopped else "context" if full else "max_new_tokens"
        rest = _cut(tokenizer.decode(sequence[began:], skip_special_tokens=True).lstrip(), stop)[0]
        if len(rest) > len(shown):
            yield rest[len(shown) :]


def _decode_batch(model: LoadedModel, sequences: Sequences, began: Sequence[int], settings: Generation) -> list[str]:
    """The answers behind the prompts, which end at `began`; over as soon as every row has ended or said a stop text."""
    tokenizer, stop = model.processor.tokenizer, tuple(settings.stop)

    def answers() -> list[tuple[str, bool]]:
        said = [tokens[start:] for tokens, start in zip(sequences.tokens, began, strict=True)]
        return [_cut(tokenizer.decode(tokens, skip_special_tokens=True).lstrip(), stop) for tokens in said]

    over = [False] * len(began)
    for tokens in model.session.generate(sequences, settings.max_new_tokens, frozenset({tokenizer.eos_token_id}), settings):
        over = [before or token is None for before, token in zip(over, tokens, strict=True)]
        if stop and all(done or cut for done, (_, cut) in zip(over, answers(), strict=True)):
            break
    return [text for text, _ in answers()]


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
    processor = load_processor(verify_file(manifest, "processor"))
    return LoadedModel(open_session(manifest, runtime, fast=fast), processor)
