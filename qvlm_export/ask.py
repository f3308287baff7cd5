"""Asks a model many questions: pictures are decoded ahead in a thread, prompts of equal length go together."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from calibrate.errors import UserError
from qvlm_export.images import open_image
from qvlm_export.loading import LoadedModel
from qvlm_export.samples import chat_text, encode
from qvlm_export.tasks import Answer, Question

# Conversations of LLaVA's own evaluations; `own` is the checkpoint's chat template.
SYSTEMS = {
    "vicuna_v1": (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    ),
    "llava_v1": (
        "A chat between a curious human and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the human's questions."
    ),
}
CONVERSATIONS = ("own", *SYSTEMS)
CHUNK_BATCHES = 8  # questions looked at together, in batches, when those of equal length are sought


@dataclass(frozen=True)
class Manner:
    """How questions are put. choices: texts to compare the likelihoods of, none to generate an answer."""

    max_new_tokens: int
    choices: tuple[str, ...] = ()
    conversation: str = CONVERSATIONS[0]
    pad_square: bool = False
    batch: int = 1


@dataclass(frozen=True)
class Encoded:
    """text: the whole prompt as text. pixels: float32 [n, 3, R, R], of `pictures`. ids: int64 [S]."""

    question: Question
    text: str
    pictures: tuple[Image.Image, ...]
    pixels: np.ndarray
    ids: np.ndarray


def ask_all(model: LoadedModel, questions: Sequence[Question], manner: Manner) -> Iterator[dict[str, Answer]]:
    """Yields the answers of one batch after another, by id; questions that cannot be asked come with a reason."""
    size = CHUNK_BATCHES * manner.batch
    room = model.manifest.limits.max_length - (longest_choice(model, manner) if manner.choices else 1)
    for chunk in _decoded_ahead(questions, size):
        ready: list[Encoded] = []
        refused: dict[str, Answer] = {}
        for question, picture in chunk:
            try:
                ready.append(_encoded(model.processor, question, picture.result() if picture else None, manner, room))
            except UserError as error:
                refused[question.id] = Answer(failed=" ".join(str(error).split()))
        if refused:
            yield refused
        for batch in _batches(ready, manner.batch, model.manifest.limits.max_images):
            yield _choose(model, batch, manner) if manner.choices else _answer(model, batch, manner.max_new_tokens)


def _decoded_ahead(questions: Sequence[Question], size: int) -> Iterator[list[tuple[Question, Future[Image.Image] | None]]]:
    """Chunks of `size` questions, whose pictures are being decoded while the chunk before is answered."""
    chunks = [questions[start : start + size] for start in range(0, len(questions), size)]
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pictures")
    waiting: deque[list[tuple[Question, Future[Image.Image] | None]]] = deque()
    try:
        for chunk in chunks:
            waiting.append([(q, pool.submit(open_image, q.image, q.id) if q.image else None) for q in chunk])
            if len(waiting) > 1:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _encoded(processor: Any, question: Question, picture: Image.Image | None, manner: Manner, room: int) -> Encoded:
    """Raises UserError for a prompt that the processor refuses or that leaves no room for an answer."""
    pictures = [] if picture is None else [squared(picture, processor) if manner.pad_square else picture]
    text = prompt_text(processor, question.prompt, len(pictures), manner.conversation)
    pixels, ids = encode(processor, text, pictures, f"question {question.id}")
    if len(ids) > room:
        raise UserError(f"question {question.id}: is {len(ids)} tokens long, the model takes {room} and an answer")
    return Encoded(question, text, tuple(pictures), pixels, ids)


def prompt_text(processor: Any, prompt: str, pictures: int, conversation: str) -> str:
    """The whole text before the answer."""
    if conversation == CONVERSATIONS[0]:
        return chat_text(processor, [{"role": "user", "text": prompt, "images": pictures}])
    marks = f"{processor.image_token}\n" * pictures
    return f"{SYSTEMS[conversation]} USER: {marks}{prompt} ASSISTANT:"


def squared(picture: Image.Image, processor: Any) -> Image.Image:
    """As LLaVA-1.5 was evaluated: the picture in the middle of a square of the processor's mean colour."""
    side = max(picture.size)
    colour = tuple(round(255 * value) for value in processor.image_processor.image_mean)
    return ImageOps.pad(picture, (side, side), color=colour)


def _batches(ready: Sequence[Encoded], size: int, max_images: int) -> Iterator[list[Encoded]]:
    """Prompts of equal length, up to `size` together and with `max_images` pictures at most."""
    groups: dict[int, list[Encoded]] = {}
    for one in ready:
        groups.setdefault(len(one.ids), []).append(one)
    for group in groups.values():
        batch: list[Encoded] = []
        for one in group:
            images = sum(len(other.pixels) for other in batch) + len(one.pixels)
            if batch and (len(batch) == size or images > max_images):
                yield batch
                batch = []
            batch.append(one)
        yield batch


def _pixels(batch: Sequence[Encoded]) -> np.ndarray | None:
    shown = [one.pixels for one in batch if len(one.pixels)]
    return np.concatenate(shown) if shown else None


def _answer(model: LoadedModel, batch: Sequence[Encoded], max_new_tokens: int) -> dict[str, Answer]:
    """Greedy answers."""
    tokenizer = model.processor.tokenizer
    sequences = model.session.start([one.ids for one in batch], _pixels(batch))
    for _ in model.session.generate(sequences, max_new_tokens, frozenset({tokenizer.eos_token_id})):
        pass
    said = [tokens[len(one.ids) :] for tokens, one in zip(sequences.tokens, batch, strict=True)]
    texts = [tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in said]
    return {one.question.id: Answer(text) for one, text in zip(batch, texts, strict=True)}


def _choose(model: LoadedModel, batch: Sequence[Encoded], manner: Manner) -> dict[str, Answer]:
    """Log-likelihoods of the choices behind each prompt, in nats.

    Where every choice is one token behind the prompt, as yes and no mostly are, one pass over the prompts says all.
    """
    tails = [[_tail(model.processor, one, choice) for choice in manner.choices] for one in batch]
    if all(
        start == len(one.ids) and len(ids) == start + 1 for one, row in zip(batch, tails, strict=True) for start, ids in row
    ):
        logits = model.session.start([one.ids for one in batch], _pixels(batch)).logits
        scores = [[float(_log_softmax(line)[ids[-1]]) for _, ids in row] for line, row in zip(logits, tails, strict=True)]
    else:
        scores = [[_likelihood(model, one, *tail) for tail in row] for one, row in zip(batch, tails, strict=True)]
    return {one.question.id: Answer(choices=tuple(row)) for one, row in zip(batch, scores, strict=True)}


def _tail(processor: Any, one: Encoded, choice: str) -> tuple[int, np.ndarray]:
    """Where the choice's tokens begin, and the ids of prompt and choice, encoded as one text."""
    _, ids = encode(processor, f"{one.text} {choice}", list(one.pictures), f"question {one.question.id}")
    same = one.ids[: len(ids)] == ids[: len(one.ids)]
    return int(same.cumprod().sum()), ids


def _likelihood(model: LoadedModel, one: Encoded, start: int, ids: np.ndarray) -> float:
    logits = model.session.logits(ids[None], one.pixels if len(one.pixels) else None)[0]
    return float(sum(_log_softmax(logits[place - 1])[ids[place]] for place in range(start, len(ids))))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64) - logits.max()
    return np.asarray(wide - np.log(np.exp(wide).sum()))


def longest_choice(model: LoadedModel, manner: Manner) -> int:
    """Tokens that a choice adds to a prompt, at most."""
    tokenizer = model.processor.tokenizer
    return max(len(tokenizer(f" {choice}", add_special_tokens=False)["input_ids"]) for choice in manner.choices) + 1
