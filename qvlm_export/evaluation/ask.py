"""Asks a model many questions: they are prepared ahead in a thread, and prompts of equal length go together."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from qvlm_export.calibrate.checkpoint.samples import Placement, join_placements
from qvlm_export.calibrate.errors import UserError
from qvlm_export.checkpoints.chat_templates import OWN, prompt_text
from qvlm_export.engines.config import ModelConfig
from qvlm_export.evaluation.tasks.task import Answer, Question
from qvlm_export.inference.model import LoadedModel
from qvlm_export.inputs.images import open_image
from qvlm_export.inputs.samples import Encoded, encode_pictures

CHUNK_BATCHES = 8  # questions looked at together, in batches, when those of equal length are sought
PREPARED_BYTES = 2**29  # of pixels that are held for them; a picture in tiles may be 65 MB


@dataclass(frozen=True)
class Manner:
    """How questions are put. choices: texts to compare the likelihoods of, none to generate an answer."""

    max_new_tokens: int
    choices: tuple[str, ...] = ()
    conversation: str = OWN
    pad_square: bool = False
    batch: int = 1


@dataclass(frozen=True)
class AskedQuestion:
    """A question as the model takes it. tails: for each choice where its tokens begin, and the ids of prompt and choice."""

    question: Question
    encoded: Encoded
    tails: tuple[tuple[int, np.ndarray], ...] = ()

    @property
    def ids(self) -> np.ndarray:
        return self.encoded.input_ids

    @property
    def pictures(self) -> int:
        """Pictures or tiles."""
        return len(self.encoded.pixel_values)


def ask_all(model: LoadedModel, questions: Sequence[Question], manner: Manner) -> Iterator[dict[str, Answer]]:
    """Yields the answers of one batch after another, by id; questions that cannot be asked come with a reason."""
    limits, tiled = model.manifest.limits, model.manifest.config.tiles is not None
    for chunk in _prepared_ahead(model, questions, manner):
        ready: list[AskedQuestion] = []
        refused: dict[str, Answer] = {}
        for question, prepared in chunk:
            try:
                ready.append(prepared.result())
            except UserError as error:
                refused[question.id] = Answer(failed=" ".join(str(error).split()))
        if refused:
            yield refused
        for batch in _batches(ready, manner.batch, None if tiled else limits.max_images):
            yield _choose(model, batch) if manner.choices else _answer(model, batch, manner.max_new_tokens)


def _prepared_ahead(
    model: LoadedModel, questions: Sequence[Question], manner: Manner
) -> Iterator[list[tuple[Question, Future[AskedQuestion]]]]:
    """Chunks of questions, which are prepared while the chunk before is answered."""
    size = chunk_size(model.manifest.config, manner.batch)
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pictures")
    waiting: deque[list[tuple[Question, Future[AskedQuestion]]]] = deque()
    try:
        for start in range(0, len(questions), size):
            waiting.append([(q, pool.submit(_asked, model, q, manner)) for q in questions[start : start + size]])
            if len(waiting) > 1:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def chunk_size(config: ModelConfig, batch: int) -> int:
    """Questions in a chunk, of which two are held at a time."""
    side = config.vision.image_size
    question_bytes = 4 * 3 * side * side * config.most_tiles
    return max(batch, min(CHUNK_BATCHES * batch, PREPARED_BYTES // (2 * question_bytes)))


def _asked(model: LoadedModel, question: Question, manner: Manner) -> AskedQuestion:
    """Raises UserError for a picture or prompt that cannot be taken, or that leaves no room for an answer."""
    processor, config, where = model.processor, model.manifest.config, f"question {question.id}"
    pictures = [] if question.image is None else [open_image(question.image, question.id)]
    if manner.pad_square:
        pictures = [pad_to_square(picture, processor) for picture in pictures]
    text = prompt_text(processor, question.prompt, len(pictures), manner.conversation)
    encoded = encode_pictures(processor, config, text, pictures, where=where)
    whole = [encode_pictures(processor, config, f"{text} {choice}", pictures).input_ids for choice in manner.choices]
    most = model.manifest.limits.max_length
    if max(len(encoded.input_ids) + 1, *map(len, whole), 0) > most:
        raise UserError(f"{where}: is {len(encoded.input_ids)} tokens long, the model takes {most} with the answer")
    return AskedQuestion(question, encoded, tuple((_begin(encoded.input_ids, ids), ids) for ids in whole))


def _begin(prompt: np.ndarray, whole: np.ndarray) -> int:
    """Where `whole`, which continues the prompt's text, has other tokens than the prompt."""
    return int((prompt[: len(whole)] == whole[: len(prompt)]).cumprod().sum())


def pad_to_square(picture: Image.Image, processor: Any) -> Image.Image:
    """As LLaVA-1.5 was evaluated: the picture in the middle of a square of the processor's mean colour."""
    side = max(picture.size)
    colour = tuple(int(255 * value) for value in processor.image_processor.image_mean)
    square = Image.new("RGB", (side, side), colour)
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square


def _batches(ready: Sequence[AskedQuestion], size: int, max_images: int | None) -> Iterator[list[AskedQuestion]]:
    """Prompts of equal length, up to `size` together and with `max_images` pictures at most (None: any number)."""
    groups: dict[int, list[AskedQuestion]] = {}
    for one in ready:
        groups.setdefault(len(one.ids), []).append(one)
    for group in groups.values():
        batch: list[AskedQuestion] = []
        for one in group:
            images = sum(other.pictures for other in batch) + one.pictures
            if batch and (len(batch) == size or (max_images is not None and images > max_images)):
                yield batch
                batch = []
            batch.append(one)
        yield batch


def _shown(model: LoadedModel, batch: Sequence[AskedQuestion]) -> tuple[np.ndarray | None, Placement | None]:
    """The pixels of all prompts, and where their features go."""
    patches = model.manifest.config.vision.tokens_per_image
    placement = join_placements([one.encoded.placement for one in batch], [one.pictures * patches for one in batch])
    shown = [one.encoded.pixel_values for one in batch if one.pictures]
    return (np.concatenate(shown) if shown else None), placement


def _answer(model: LoadedModel, batch: Sequence[AskedQuestion], max_new_tokens: int) -> dict[str, Answer]:
    """Greedy answers."""
    tokenizer = model.processor.tokenizer
    sequences = model.session.start([one.ids for one in batch], *_shown(model, batch))
    for _ in model.session.generate(sequences, max_new_tokens, frozenset({tokenizer.eos_token_id})):
        pass
    said = [tokens[len(one.ids) :] for tokens, one in zip(sequences.tokens, batch, strict=True)]
    texts = [tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in said]
    return {one.question.id: Answer(text) for one, text in zip(batch, texts, strict=True)}


def _choose(model: LoadedModel, batch: Sequence[AskedQuestion]) -> dict[str, Answer]:
    """Log-likelihoods of the choices behind each prompt, in nats.

    Where every choice is one token behind the prompt, as yes and no mostly are, one pass over the prompts says all.
    """
    if all(start == len(one.ids) == len(ids) - 1 for one in batch for start, ids in one.tails):
        logits = model.session.start([one.ids for one in batch], *_shown(model, batch)).logits
        scores = [
            [float(_log_softmax(line)[ids[-1]]) for _, ids in one.tails] for line, one in zip(logits, batch, strict=True)
        ]
    else:
        scores = [[_likelihood(model, one, *tail) for tail in one.tails] for one in batch]
    return {one.question.id: Answer(choices=tuple(row)) for one, row in zip(batch, scores, strict=True)}


def _likelihood(model: LoadedModel, one: AskedQuestion, start: int, ids: np.ndarray) -> float:
    logits = model.session.logits(ids[None], *_shown(model, [one]))[0]
    return float(sum(_log_softmax(logits[place - 1])[ids[place]] for place in range(start, len(ids))))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64) - logits.max()
    return np.asarray(wide - np.log(np.exp(wide).sum()))
