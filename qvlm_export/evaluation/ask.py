"""Batched evaluation: greedy answers, or log-likelihoods of fixed choices, for many questions to one model.

Questions are encoded one chunk ahead in a thread, so that decoding images does not delay the model. Within a chunk, prompts
of equal length form a batch, so no padding is needed. Questions that cannot be encoded are answered with the reason.
"""

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
from qvlm_export.inputs.samples import Encoded, encode_prompt

CHUNK_BATCHES = 8  # the size of a chunk, in batches; a larger chunk has more prompts of equal length
MAX_ENCODED_BYTES = 2**29  # of pixels that are kept for encoded questions; an image in tiles may have 65 MB


@dataclass(frozen=True)
class AskSettings:
    """How questions are put to a model.

    max_new_tokens: the longest answer. choices: texts whose likelihoods are compared; empty to generate an answer instead.
    conversation: the chat format, one of `CHOICES` in `checkpoints/chat_templates.py`. pad_square: whether images are padded
    to squares. batch: questions in a batch at most.
    """

    max_new_tokens: int
    choices: tuple[str, ...] = ()
    conversation: str = OWN
    pad_square: bool = False
    batch: int = 1


@dataclass(frozen=True)
class EncodedQuestion:
    """A question as the inputs of a model.

    continuations: for each choice, the position where its tokens begin, and the token ids of prompt and choice, int64 [S].
    """

    question: Question
    encoded: Encoded
    continuations: tuple[tuple[int, np.ndarray], ...] = ()

    @property
    def input_ids(self) -> np.ndarray:
        """The token ids of the prompt, int64 [S]."""
        return self.encoded.input_ids

    @property
    def num_images(self) -> int:
        """The number of images that the vision tower runs on: one per image, or one per tile."""
        return len(self.encoded.pixel_values)


def ask_all(model: LoadedModel, questions: Sequence[Question], manner: AskSettings) -> Iterator[dict[str, Answer]]:
    """Yields the answers of one batch after another, by question id.

    The answer to a question that cannot be encoded, such as for an unreadable image, holds the reason in `failed`. Raises
    UserError when the logits are not finite, as no answer of such a model could be trusted.
    """
    limits, tiled = model.manifest.limits, model.manifest.config.tiles is not None
    for chunk in _encode_ahead(model, questions, manner):
        encoded: list[EncodedQuestion] = []
        failures: dict[str, Answer] = {}
        for question, future in chunk:
            try:
                encoded.append(future.result())
            except UserError as error:
                failures[question.id] = Answer(failed=" ".join(str(error).split()))
        if failures:
            yield failures
        for batch in _make_batches(encoded, manner.batch, None if tiled else limits.max_images):
            yield _score_choices(model, batch) if manner.choices else _generate(model, batch, manner.max_new_tokens)


def _encode_ahead(
    model: LoadedModel, questions: Sequence[Question], manner: AskSettings
) -> Iterator[list[tuple[Question, Future[EncodedQuestion]]]]:
    """Yields chunks of questions; each is encoded in a thread while the chunk before it is answered."""
    size = chunk_size(model.manifest.config, manner.batch)
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pictures")
    waiting: deque[list[tuple[Question, Future[EncodedQuestion]]]] = deque()
    try:
        for start in range(0, len(questions), size):
            waiting.append([(q, pool.submit(_encode_question, model, q, manner)) for q in questions[start : start + size]])
            if len(waiting) > 1:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def chunk_size(config: ModelConfig, batch: int) -> int:
    """Returns the number of questions in a chunk, at least a batch; the pixels of two chunks are in memory at a time."""
    side = config.vision.image_size
    question_bytes = 4 * 3 * side * side * config.most_tiles
    return max(batch, min(CHUNK_BATCHES * batch, MAX_ENCODED_BYTES // (2 * question_bytes)))


def _encode_question(model: LoadedModel, question: Question, manner: AskSettings) -> EncodedQuestion:
    """Raises UserError for an image or a prompt that the model cannot take, or that leaves no room for an answer."""
    processor, config, where = model.processor, model.manifest.config, f"question {question.id}"
    images = [] if question.image is None else [open_image(question.image, question.id)]
    if manner.pad_square:
        images = [pad_to_square(image, processor) for image in images]
    text = prompt_text(processor, question.prompt, len(images), manner.conversation)
    max_length = model.manifest.limits.max_length
    encoded = encode_prompt(processor, config, text, images, where=where, max_length=max_length)
    with_choice = [encode_prompt(processor, config, f"{text} {choice}", images).input_ids for choice in manner.choices]
    if max(len(encoded.input_ids) + 1, *map(len, with_choice), 0) > max_length:
        raise UserError(f"{where}: is {len(encoded.input_ids)} tokens long, the model takes {max_length} with the answer")
    continuations = tuple((_find_divergence(encoded.input_ids, ids), ids) for ids in with_choice)
    return EncodedQuestion(question, encoded, continuations)


def _find_divergence(prompt_ids: np.ndarray, ids: np.ndarray) -> int:
    """Returns the first position at which `ids`, the tokens of the prompt and a text behind it, differ from the prompt's.

    It may lie before the end of the prompt, where the tokenizer joins its last characters with the text behind them.
    """
    return int((prompt_ids[: len(ids)] == ids[: len(prompt_ids)]).cumprod().sum())


def pad_to_square(image: Image.Image, processor: Any) -> Image.Image:
    """Centers an RGB image in a square of the processor's mean colour, as in the evaluation of LLaVA-1.5."""
    side = max(image.size)
    colour = tuple(int(255 * value) for value in processor.image_processor.image_mean)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _make_batches(
    questions: Sequence[EncodedQuestion], size: int, max_images: int | None
) -> Iterator[list[EncodedQuestion]]:
    """Yields batches of prompts of equal length: `size` of them at most, with `max_images` images at most (None: no limit).

    A single question with more images than that is a batch of its own.
    """
    by_length: dict[int, list[EncodedQuestion]] = {}
    for question in questions:
        by_length.setdefault(len(question.input_ids), []).append(question)
    for equally_long in by_length.values():
        batch: list[EncodedQuestion] = []
        for question in equally_long:
            num_images = sum(other.num_images for other in batch) + question.num_images
            if batch and (len(batch) == size or (max_images is not None and num_images > max_images)):
                yield batch
                batch = []
            batch.append(question)
        yield batch


def _join_images(model: LoadedModel, batch: Sequence[EncodedQuestion]) -> tuple[np.ndarray | None, Placement | None]:
    """Returns the pixels of all prompts, float32 [n, 3, R, R] or None, and the placement of their image features."""
    patches = model.manifest.config.vision.tokens_per_image
    placement = join_placements([q.encoded.placement for q in batch], [q.num_images * patches for q in batch])
    pixels = [q.encoded.pixel_values for q in batch if q.num_images]
    return (np.concatenate(pixels) if pixels else None), placement


def _generate(model: LoadedModel, batch: Sequence[EncodedQuestion], max_new_tokens: int) -> dict[str, Answer]:
    """Generates an answer to each question by greedy decoding."""
    tokenizer = model.processor.tokenizer
    sequences = model.session.start([q.input_ids for q in batch], *_join_images(model, batch))
    for _ in model.session.generate(sequences, max_new_tokens, model.end_tokens):
        pass
    new_tokens = [tokens[len(q.input_ids) :] for tokens, q in zip(sequences.tokens, batch, strict=True)]
    texts = [tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in new_tokens]
    return {q.question.id: Answer(text) for q, text in zip(batch, texts, strict=True)}


def _score_choices(model: LoadedModel, batch: Sequence[EncodedQuestion]) -> dict[str, Answer]:
    """Computes the log-likelihoods of the choices behind each prompt, in nats.

    If every choice is one token behind the prompt, as "yes" and "no" mostly are, one pass over the prompts is enough.
    """
    if all(start == len(q.input_ids) == len(ids) - 1 for q in batch for start, ids in q.continuations):
        logits = model.session.start([q.input_ids for q in batch], *_join_images(model, batch)).logits
        scores = [
            [float(_log_softmax(row)[ids[-1]]) for _, ids in q.continuations] for row, q in zip(logits, batch, strict=True)
        ]
    else:
        scores = [[_log_likelihood(model, q, *continuation) for continuation in q.continuations] for q in batch]
    return {q.question.id: Answer(choices=tuple(row)) for q, row in zip(batch, scores, strict=True)}


def _log_likelihood(model: LoadedModel, question: EncodedQuestion, start: int, ids: np.ndarray) -> float:
    """Returns the log-likelihood in nats of the tokens ids[start:], given the image and the tokens before them."""
    logits = model.session.logits(ids[None], *_join_images(model, [question]))[0]
    return float(sum(_log_softmax(logits[t - 1])[ids[t]] for t in range(start, len(ids))))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))
