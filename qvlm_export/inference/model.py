"""`qvlm_export.load`: text generation with an exported LLaVA, for one prompt, a batch of prompts, or a conversation.

Prompts and images go in, texts come out, in pieces while they are decoded if asked for. Below it are `inputs/samples.py`,
which encodes prompts, and the session of `engines/runtime/session.py`, which works on token ids.
"""

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
from qvlm_export.inputs.samples import encode_prompt, load_processor
from qvlm_export.inputs.tiles import place_tiles, select_tiles, tile_counts

_MARKER = "\u2063answer\u2063"  # invisible separators, which no user types


@dataclass(frozen=True, kw_only=True)
class Generation(Sampling):
    """Settings of text generation: those of `Sampling`, the most new tokens, and the stop strings.

    stop: an answer ends before the first of these texts, which is not part of it. Raises UserError for values out of range.
    """

    max_new_tokens: int = 64
    stop: Sequence[str] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens {self.max_new_tokens}: must be at least 1")
        if isinstance(self.stop, str):  # a string would be taken as a sequence of its letters
            raise UserError(f"stop {self.stop!r}: give a list of texts")


class Settings(TypedDict, total=False):
    """The fields of `Generation`, as types of keyword arguments."""

    max_new_tokens: int
    stop: Sequence[str]
    temperature: float
    top_p: float
    repetition_penalty: float
    seed: int


DEFAULTS = Generation()


class LoadedModel:
    """An exported model: its session and its processor. A context manager, which closes the session."""

    def __init__(self, session: Session, processor: Any) -> None:
        self.session = session
        self.processor = processor

    def __enter__(self) -> LoadedModel:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.session.__exit__(kind, error, trace)

    @property
    def manifest(self) -> Manifest:
        """The manifest of the export."""
        return self.session.manifest

    def logits(
        self, input_ids: np.ndarray, pixel_values: np.ndarray | None = None, image_sizes: np.ndarray | None = None
    ) -> np.ndarray:
        """Returns the logits of every position: float32 [1, S, vocab].

        input_ids: int64 [1, S], the image token repeated for each feature. pixel_values: float32 [n, 3, R, R]. For models
        that cut images into tiles, pixel_values is float32 [n, most tiles, 3, R, R], padded as by their processor, and
        image_sizes [n, 2] is height and width of every image in pixels. Raises UserError when they do not fit the model.
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
        """Returns the model's answer to one user turn with these images; with `stream`, an iterator over its pieces.

        Keyword arguments are fields of `Generation`, such as max_new_tokens=64 or temperature=0.7, and override `settings`.
        Raises UserError for bad settings and for a prompt that cannot be taken, with `stream`, too, before the first piece.
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
        """Returns the answers to several prompts, computed as one batch; at most `--max-batch` of the export.

        images: the images of each prompt; None for prompts without images. Raises UserError for prompts that cannot be
        taken, and names the prompt where it is one of them.
        """
        generation, all_images = replace(settings, **changes), [()] * len(prompts) if images is None else images
        if not prompts or len(all_images) != len(prompts):
            raise UserError(
                f"{len(prompts)} prompts with pictures for {len(all_images)}; give as many lists of pictures as prompts"
            )
        encoded = []
        for number, (prompt, prompt_images) in enumerate(zip(prompts, all_images, strict=True), 1):
            text = chat_text(self.processor, [{"role": "user", "text": prompt, "images": len(prompt_images)}])
            rgb, where = [image.convert("RGB") for image in prompt_images], f"prompt {number}"
            encoded.append(encode_prompt(self.processor, self.manifest.config, text, rgb, where=where))
        pixels = [one.pixel_values for one in encoded if len(one.pixel_values)]
        rows = [len(one.pixel_values) * self.manifest.config.vision.tokens_per_image for one in encoded]
        placement = join_placements([one.placement for one in encoded], rows)
        input_ids = [one.input_ids for one in encoded]
        sequences = self.session.start(input_ids, np.concatenate(pixels) if pixels else None, placement)
        return _decode_batch(self, sequences, [len(ids) for ids in input_ids], generation)

    def chat(self) -> Chat:
        """Starts a new conversation."""
        return Chat(self.session, self.processor)


class Chat:
    """A conversation whose history stays in the key/value cache, so that a turn computes its own tokens only.

    ended: why the last answer ended: "stop" (the model's end token or a stop string), "max_new_tokens", or "context" (it is
    full). None while the answer goes on, and after it was interrupted.
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
        """Adds a user turn, computes it, and returns an iterator that decodes the answer piece by piece.

        Raises UserError, and leaves the conversation unchanged, when the turn cannot be taken, for example because the
        context is full. An answer that is interrupted (by the caller, or Ctrl-C) stays in the history as far as it came.
        """
        generation = replace(settings, **changes)
        turns = [*self._turns, {"role": "user", "text": text, "images": len(images)}]
        self._feed(turns, [image.convert("RGB") for image in images])
        self._turns, self.ended = [*turns, {"role": "assistant", "text": ""}], None
        return self._answer(self._turns[-1], generation)

    def _answer(self, turn: dict[str, Any], settings: Generation) -> Iterator[str]:
        """Yields the pieces of the answer, and appends them to its turn."""
        for piece in self._decode(settings):
            turn["text"] += piece
            yield piece

    def _feed(self, turns: list[dict[str, Any]], images: list[Image.Image]) -> None:
        """Encodes the part of the conversation that is not in the cache yet, and runs it through the model."""
        if self._sequences is None:
            new = encode_prompt(self._processor, self._config, chat_text(self._processor, turns), images)
            self._sequences = self._session.start([new.input_ids], new.pixel_values, new.placement)
            return
        # With a marker in place of the last answer, the new text is what the template writes after the marker.
        with_marker = [*turns[:-2], {"role": "assistant", "text": _MARKER}, turns[-1]]
        _, marker, added = chat_text(self._processor, with_marker).rpartition(_MARKER)
        if not marker:
            raise UserError(
                "the chat template leaves earlier answers out, so this conversation cannot go on; start a new one"
            )
        new = encode_prompt(self._processor, self._config, added, images, continues=True)
        self._session.extend(self._sequences, [new.input_ids], new.pixel_values, new.placement)

    def _decode(self, settings: Generation) -> Iterator[str]:
        """Yields the answer in pieces. Text at its end is held back while it could begin a stop string or a character."""
        if self._sequences is None:
            raise RuntimeError("nothing was fed")
        sequence, tokenizer, stop = self._sequences.tokens[0], self._processor.tokenizer, tuple(settings.stop)
        start, emitted, stop_ids, stopped = len(sequence), "", frozenset({tokenizer.eos_token_id}), False
        for (token,) in self._session.generate(self._sequences, settings.max_new_tokens, stop_ids, settings):
            stopped = token in stop_ids
            text, ended = _cut_at_stop(tokenizer.decode(sequence[start:], skip_special_tokens=True).lstrip(), stop)
            safe = text if ended else text[: len(text) - _partial_stop_length(text, stop)]
            if len(safe) > len(emitted) and not safe.endswith("\ufffd"):
                yield safe[len(emitted) :]
                emitted = safe
            if ended:
                self.ended = "stop"
                return
        full = len(sequence) == self._session.manifest.limits.max_length
        self.ended = "stop" if stopped else "context" if full else "max_new_tokens"
        whole = _cut_at_stop(tokenizer.decode(sequence[start:], skip_special_tokens=True).lstrip(), stop)[0]
        if len(whole) > len(emitted):
            yield whole[len(emitted) :]


def _decode_batch(
    model: LoadedModel, sequences: Sequences, prompt_lengths: Sequence[int], settings: Generation
) -> list[str]:
    """Returns the answers after the prompts; decoding ends as soon as every row has ended or reached a stop string."""
    tokenizer, stop = model.processor.tokenizer, tuple(settings.stop)

    def answers() -> list[tuple[str, bool]]:
        new_tokens = [tokens[start:] for tokens, start in zip(sequences.tokens, prompt_lengths, strict=True)]
        return [_cut_at_stop(tokenizer.decode(tokens, skip_special_tokens=True).lstrip(), stop) for tokens in new_tokens]

    ended = [False] * len(prompt_lengths)
    for tokens in model.session.generate(sequences, settings.max_new_tokens, frozenset({tokenizer.eos_token_id}), settings):
        ended = [before or token is None for before, token in zip(ended, tokens, strict=True)]
        if stop and all(done or stopped for done, (_, stopped) in zip(ended, answers(), strict=True)):
            break
    return [text for text, _ in answers()]


def _cut_at_stop(text: str, stop: tuple[str, ...]) -> tuple[str, bool]:
    """Returns the text before the first stop string, and whether there is one."""
    positions = [at for at in (text.find(s) for s in stop if s) if at >= 0]
    return (text[: min(positions)], True) if positions else (text, False)


def _partial_stop_length(text: str, stop: tuple[str, ...]) -> int:
    """Returns how many characters at the end of the text could be the beginning of a stop string."""
    return max((n for s in stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)


def load(path: str | Path, runtime: str = "auto", fast: bool = False) -> LoadedModel:
    """Opens an export by its engine file (X.plan) or manifest (X.json).

    runtime: one of RUNTIMES in `engines/runtime/open.py`. fast: lets ONNX Runtime round activations of INT4 products to
    8 bits, which is quicker, but not what the engine computes. Raises UserError for a missing or damaged export, and for a
    runtime that cannot run it here.
    """
    plan = Path(path)
    if plan.suffix not in (".plan", ".json"):
        raise UserError(f"{plan}: give the .plan that qvlm-export wrote, or the .json beside it")
    manifest = read_manifest(plan.with_suffix(".json"))
    processor = load_processor(verify_file(manifest, "processor"))
    return LoadedModel(open_session(manifest, runtime, fast=fast), processor)
