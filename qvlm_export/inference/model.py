"""`qvlm_export.load`: text generation with an exported LLaVA, for one prompt, a batch of prompts, or a conversation.

Prompts and images go in, texts come out, in pieces while they are decoded if asked for. Below it are `inputs/samples.py`,
which encodes prompts, and the session of `engines/runtime/session.py`, which works on token ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
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
from qvlm_export.engines.runtime.sampling import Sampling, require_whole_number
from qvlm_export.engines.runtime.session import Sequences, Session
from qvlm_export.inference.answer import AnswerText
from qvlm_export.inputs.images import Pictures, open_pictures
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
        require_whole_number("max_new_tokens", self.max_new_tokens, 1)
        if not isinstance(self.stop, list | tuple) or not all(isinstance(text, str) and text for text in self.stop):
            raise UserError(f"stop {self.stop!r:.80}: give a list of texts, none of them empty")


class Settings(TypedDict, total=False):
    """The fields of `Generation`, as types of keyword arguments."""

    max_new_tokens: int
    stop: Sequence[str]
    temperature: float
    top_p: float
    repetition_penalty: float
    seed: int


DEFAULTS = Generation()


def _change(settings: Generation, changes: Settings) -> Generation:
    """Returns the settings with some of them changed. Raises UserError for names and values that are no settings."""
    names = [field.name for field in fields(Generation)]
    if unknown := sorted(set(changes) - set(names)):
        raise UserError(f"{unknown[0]}: is no setting of text generation; there are {', '.join(names)}")
    if not isinstance(settings, Generation):
        raise UserError(f"settings: is of type {type(settings).__name__}; give a Generation, or keyword arguments")
    return replace(settings, **changes)


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

    @property
    def end_tokens(self) -> frozenset[int]:
        """The ids of the tokens that end an answer."""
        return _find_end_tokens(self.manifest, self.processor)

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
        images: Pictures = (),
        settings: Generation = DEFAULTS,
        *,
        stream: Literal[False] = False,
        **changes: Unpack[Settings],
    ) -> str: ...

    @overload
    def generate(
        self,
        prompt: str,
        images: Pictures = (),
        settings: Generation = DEFAULTS,
        *,
        stream: Literal[True],
        **changes: Unpack[Settings],
    ) -> Iterator[str]: ...

    def generate(
        self,
        prompt: str,
        images: Pictures = (),
        settings: Generation = DEFAULTS,
        *,
        stream: bool = False,
        **changes: Unpack[Settings],
    ) -> str | Iterator[str]:
        """Returns the model's answer to one user turn with these images; with `stream`, an iterator over its pieces.

        images: one picture, or a list of pictures, each a path, a PIL image, or uint8 pixels [height, width, 3].
        Keyword arguments are fields of `Generation`, such as max_new_tokens=64 or temperature=0.7, and override `settings`.
        Raises UserError for bad settings and for a prompt that cannot be taken, with `stream`, too, before the first piece.
        """
        pieces = self.chat().say(prompt, images, settings, **changes)
        return pieces if stream else "".join(pieces)

    def generate_batch(
        self,
        prompts: Sequence[str],
        images: Sequence[Pictures] | None = None,
        settings: Generation = DEFAULTS,
        **changes: Unpack[Settings],
    ) -> list[str]:
        """Returns the answers to several prompts, computed as one batch; at most `--max-batch` of the export.

        images: the picture or pictures of each prompt, as for `generate`; None for prompts without pictures. Raises
        UserError for prompts that cannot be taken, and names the prompt where it is one of them.
        """
        generation = _change(settings, changes)
        if not isinstance(prompts, list | tuple) or not isinstance(images, list | tuple | None):
            raise UserError("prompts and images: give a list of prompts, and a list with the pictures of each prompt")
        all_images = [None] * len(prompts) if images is None else images
        if not prompts or len(all_images) != len(prompts):
            raise UserError(
                f"{len(prompts)} prompts with pictures for {len(all_images)}; give as many lists of pictures as prompts"
            )
        encoded, config, max_length = [], self.manifest.config, self.manifest.limits.max_length
        for number, (prompt, prompt_images) in enumerate(zip(prompts, all_images, strict=True), 1):
            where = f"prompt {number}"
            rgb = open_pictures(prompt_images, f"{where}: picture")
            text = chat_text(self.processor, [{"role": "user", "text": _check_text(prompt, where), "images": len(rgb)}])
            encoded.append(encode_prompt(self.processor, config, text, rgb, where=where, max_length=max_length))
        pixels = [one.pixel_values for one in encoded if len(one.pixel_values)]
        rows = [len(one.pixel_values) * config.vision.tokens_per_image for one in encoded]
        placement = join_placements([one.placement for one in encoded], rows)
        input_ids = [one.input_ids for one in encoded]
        sequences = self.session.start(input_ids, np.concatenate(pixels) if pixels else None, placement)
        return _decode_batch(self, sequences, generation)

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
        images: Pictures = (),
        settings: Generation = DEFAULTS,
        **changes: Unpack[Settings],
    ) -> Iterator[str]:
        """Adds a user turn, computes it, and returns an iterator that decodes the answer piece by piece.

        images: as for `LoadedModel.generate`. Raises UserError, and leaves the conversation unchanged, when the turn cannot
        be taken, for example because the context is full. An answer that is interrupted (by the caller, or Ctrl-C) stays in
        the history as far as it came.
        """
        generation, rgb = _change(settings, changes), open_pictures(images)
        turns = [*self._turns, {"role": "user", "text": _check_text(text, "the prompt"), "images": len(rgb)}]
        self._feed(turns, rgb)
        self._turns, self.ended = [*turns, {"role": "assistant", "text": ""}], None
        return self._answer(self._turns[-1], generation)

    def _answer(self, turn: dict[str, Any], settings: Generation) -> Iterator[str]:
        """Yields the pieces of the answer, and keeps all of it in its turn, however it ends."""
        if self._sequences is None:
            raise RuntimeError("nothing was fed")
        answer, sequence = AnswerText(self._processor.tokenizer, settings.stop), self._sequences.tokens[0]
        end_tokens, ended = _find_end_tokens(self._session.manifest, self._processor), False
        try:
            for (token,) in self._session.generate(self._sequences, settings.max_new_tokens, end_tokens, settings):
                if token is None or token in end_tokens:
                    ended = True
                elif piece := answer.add(token):
                    yield piece
                if answer.stopped:
                    break
        except (KeyboardInterrupt, UserError):
            if rest := answer.rest():
                yield rest
            raise
        finally:
            turn["text"] = answer.text
        full = len(sequence) == self._session.manifest.limits.max_length
        self.ended = "stop" if ended or answer.stopped else "context" if full else "max_new_tokens"
        if rest := answer.rest():
            yield rest

    def _feed(self, turns: list[dict[str, Any]], images: list[Image.Image]) -> None:
        """Encodes the part of the conversation that is not in the cache yet, and runs it through the model."""
        max_length = self._session.manifest.limits.max_length
        if self._sequences is None:
            text = chat_text(self._processor, turns)
            new = encode_prompt(self._processor, self._config, text, images, max_length=max_length)
            self._sequences = self._session.start([new.input_ids], new.pixel_values, new.placement)
            return
        # With a marker in place of the last answer, the new text is what the template writes after the marker.
        with_marker = [*turns[:-2], {"role": "assistant", "text": _MARKER}, turns[-1]]
        _, marker, added = chat_text(self._processor, with_marker).rpartition(_MARKER)
        if not marker:
            raise UserError(
                "the chat template leaves earlier answers out, so this conversation cannot go on; start a new one"
            )
        new = encode_prompt(self._processor, self._config, added, images, continues=True, max_length=max_length)
        self._session.extend(self._sequences, [new.input_ids], new.pixel_values, new.placement)


def _decode_batch(model: LoadedModel, sequences: Sequences, settings: Generation) -> list[str]:
    """Returns the answers after the prompts; decoding ends as soon as every row has ended or reached a stop string."""
    answers = [AnswerText(model.processor.tokenizer, settings.stop) for _ in sequences.tokens]
    end_tokens, ended = model.end_tokens, [False] * len(answers)
    for tokens in model.session.generate(sequences, settings.max_new_tokens, end_tokens, settings):
        for row, (answer, token) in enumerate(zip(answers, tokens, strict=True)):
            if token is None or token in end_tokens:
                ended[row] = True
            elif not ended[row]:
                answer.add(token)
                ended[row] = answer.stopped
        if all(ended):
            break
    return [answer.text for answer in answers]


def _find_end_tokens(manifest: Manifest, processor: Any) -> frozenset[int]:
    """Returns those of the checkpoint; where it names none, and in exports that record none, that of the tokenizer."""
    return frozenset(manifest.generation.get("eos_token_ids") or [processor.tokenizer.eos_token_id])


def _check_text(prompt: Any, where: str) -> str:
    if not isinstance(prompt, str):
        raise UserError(f"{where}: is of type {type(prompt).__name__}; give a text")
    return prompt


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
