"""Self-calibration: the float model writes its own calibration set.

It answers questions about the built-in pictures, and writes both sides of other conversations: it continues the chat
template first where the user's text goes (Magpie, Xu et al. 2024) and then where the answer goes. Texts that a model samples
show a quantizer the tokens and activations of its training better than texts of another domain (LLM-QAT, Liu et al. 2023;
Williams et al. 2024). What comes out is a calibration set as `--calib-data` reads it.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from qvlm_export.calibrate.checkpoint.files import write_atomically
from qvlm_export.calibrate.checkpoint.samples import join_placements
from qvlm_export.checkpoints.chat_templates import chat_text
from qvlm_export.engines.config import ModelConfig
from qvlm_export.engines.runtime.sampling import Sampling
from qvlm_export.inference.answer import cut_at_stop
from qvlm_export.inference.model import LoadedModel
from qvlm_export.inference.torch_session import choose_batch
from qvlm_export.inputs.images import open_image
from qvlm_export.inputs.lines import Line
from qvlm_export.inputs.samples import Entry, encode_answered, encode_prompt, read_entries

BATCH, TEMPERATURE = 32, 1.0  # 0.8 gave a worse quantized model, in one run (docs/self-calibration.md)
COUNT = 64  # conversations of a whole set
FILE = "self.jsonl"
_MARKER = "\u2063"  # an invisible separator, which no template writes
_TEMPLATE_TOKENS = 64  # of chat template and given prompts, for estimates
_MARGIN = 8  # tokens that a text may gain when it is encoded again, prompt and answer as one text
_DRAWS, _SPACES = 1000, ("\u0120", "\u2581")  # what byte-level BPE and SentencePiece write for a space before a word
_LOOP_WORDS, _LOOP_SHARE = 16, 0.25  # a text repeats itself when fewer of its words than this share differ


@dataclass(frozen=True)
class Kind:
    """A kind of conversation. share: how many of COUNT are of it.

    pictures: whether it is about a picture. prompts: what the user says, one after the other; None where the model writes
    that, too. prompt_tokens, answer_tokens: the most that is written. random_word: whether a word drawn from the vocabulary
    begins a prompt that the model writes, as models begin most of theirs alike (LLM-QAT draws the first token so).
    """

    share: int
    pictures: bool
    prompts: tuple[str, ...] | None
    prompt_tokens: int
    answer_tokens: int
    random_word: bool = False


@dataclass(frozen=True)
class Draft:
    """A conversation that is to be written. picture: an entry of the built-in set; None without a picture.

    prompt: None where the model writes it; then `spare` stands in for one that comes out empty.
    """

    kind: Kind
    picture: Entry | None
    prompt: str | None
    spare: str


# Of the built-in pictures and of anything: what any model of pictures and text can be asked.
ABOUT_PICTURES = (
    "Describe the picture.",
    "What does the picture show?",
    "List what you see.",
    "Is anything written in the picture? Read it.",
    "Tell a story about this picture.",
    "What is unusual about this picture?",
    "Write a caption.",
    "What is in this picture? Explain your answer.",
)
ABOUT_ANYTHING = (
    "Write a story.",
    "Explain how something works.",
    "Tell me about a famous place.",
    "Write a letter to a friend.",
    "Write a list.",
    "Ask a question, and answer it.",
    "Write a short program.",
    "Describe a dream.",
)
KINDS = (
    Kind(12, pictures=True, prompts=(), prompt_tokens=0, answer_tokens=64),
    Kind(10, pictures=True, prompts=ABOUT_PICTURES, prompt_tokens=0, answer_tokens=96),
    Kind(12, pictures=True, prompts=None, prompt_tokens=48, answer_tokens=64),
    Kind(10, pictures=False, prompts=None, prompt_tokens=64, answer_tokens=160),
    Kind(14, pictures=False, prompts=None, prompt_tokens=160, answer_tokens=96, random_word=True),
    Kind(6, pictures=False, prompts=ABOUT_ANYTHING, prompt_tokens=0, answer_tokens=256),
)


def plan_drafts(count: int, pictures: Sequence[Entry]) -> list[Draft]:
    """Returns `count` conversations to write, of all kinds in their shares. pictures: the built-in set, used in turn.

    A kind whose prompts are empty asks what the built-in set asks about the picture.
    """
    kinds = [kind for kind in KINDS for _ in range(kind.share)]
    drafts: list[Draft] = []
    for number in range(count):
        kind = kinds[number * len(kinds) // count]
        picture = pictures[sum(draft.picture is not None for draft in drafts) % len(pictures)] if kind.pictures else None
        asked = kind.prompts or (ABOUT_PICTURES if kind.pictures else ABOUT_ANYTHING)
        spare = asked[number % len(asked)]
        own = picture.line.prompt if picture is not None and kind.prompts == () else spare
        drafts.append(Draft(kind, picture, None if kind.prompts is None else own, spare))
    return drafts


def stand_ins(drafts: Sequence[Draft], length: int, image_tokens: int) -> list[Entry]:
    """Returns entries about as long as the longest that can be written for these drafts, to plan with.

    length: of the longest sample in tokens. image_tokens: of a picture.
    """
    entries = []
    for draft in drafts:
        kind, picture = draft.kind, draft.picture
        room = max(0, length - _TEMPLATE_TOKENS - kind.pictures * image_tokens)
        prompt_tokens = min(kind.prompt_tokens, room // 2)
        answer = _filler(min(kind.answer_tokens, room - prompt_tokens)) or None
        prompt = draft.prompt or _filler(prompt_tokens)
        line = Line(image=None if picture is None else picture.line.image, prompt=prompt, answer=answer)
        entries.append(Entry("self-calibration", line, None if picture is None else picture.image))
    return entries


def most_tokens(image_tokens: int) -> tuple[int, int]:
    """Returns how many tokens are prefilled at most, and how many a conversation has. image_tokens: of a picture."""
    begun = [_TEMPLATE_TOKENS + kind.pictures * image_tokens + kind.prompt_tokens for kind in KINDS]
    return max(begun), max(tokens + kind.answer_tokens for tokens, kind in zip(begun, KINDS, strict=True))


def count_steps(drafts: Sequence[Draft]) -> int:
    """Returns the most steps of decoding that a batch takes."""
    return max(d.kind.prompt_tokens for d in drafts) + max(d.kind.answer_tokens for d in drafts)


def _filler(tokens: int) -> str:
    return " ".join(["the"] * tokens)


def write_own_set(
    open_model: Callable[[], LoadedModel],
    config: ModelConfig,
    drafts: Sequence[Draft],
    folder: Path,
    *,
    length: int,
    progress: Callable[[float], None],
) -> list[Entry]:
    """Writes the conversations into `folder`, with their pictures, in parts that a killed run need not write again.

    open_model: opens the float model; called when a part is missing. length: of the longest sample in tokens. Returns the
    entries, in the order of the drafts. Raises UserError when the model's logits are not finite, and when it says nothing
    at all.
    """
    size = choose_batch(config, BATCH)
    batches = [list(drafts[start : start + size]) for start in range(0, len(drafts), size)]
    paths = [folder / f"{number:03d}.jsonl" for number in range(len(batches))]
    _copy_pictures(drafts, folder)
    with ExitStack() as stack:
        writer = None
        for number, (batch, path) in enumerate(zip(batches, paths, strict=True)):

            def report(done: float, before: int = number) -> None:
                progress((before + done) / len(batches))

            if not path.exists():
                writer = writer or _Writer(stack.enter_context(open_model()), length)
                lines = writer.write(batch, number, report)
                _write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
            report(1.0)
    return [entry for path in paths for entry in read_entries(path, None, size)]


def _copy_pictures(drafts: Sequence[Draft], folder: Path) -> None:
    """Puts the pictures of the drafts into `folder`, so that the set can be moved and read again."""
    for name, source in {d.picture.line.image: d.picture.image for d in drafts if d.picture is not None}.items():
        if name is not None and source is not None and not (folder / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / name, functools.partial(shutil.copyfile, source))


def join_parts(folder: Path, out: Path) -> Path:
    """Copies a set that `write_own_set` wrote to the folder `out`, as one file for `--calib-data`; returns that file."""
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.jsonl"), dirs_exist_ok=True)
    text = "".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.jsonl")))
    _write_text(out / FILE, text)
    return out / FILE


def _write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def repeats_itself(text: str) -> bool:
    """Whether most of a text is the same few words."""
    words = text.split()
    return len(words) >= _LOOP_WORDS and len(set(words)) < _LOOP_SHARE * len(words)


class _Writer:
    """Continues texts with the float model. length: of the longest sample in tokens."""

    def __init__(self, model: LoadedModel, length: int) -> None:
        self._model, self._length = model, min(length, model.manifest.limits.max_length)
        self._before = [self._split_template(images) for images in (0, 1)]
        behind = self._before[0][1].strip().split("\n")[0]
        self._stop = [text for text in (model.processor.image_token, behind) if text]
        tokens = model.processor.tokenizer(behind, add_special_tokens=False)["input_ids"][:1]
        self._ends = model.end_tokens | {t for t in tokens if t in model.processor.tokenizer.all_special_ids}

    def _split_template(self, images: int) -> tuple[str, str]:
        """Returns what the chat template writes before and behind the text of a user with so many pictures."""
        turn = {"role": "user", "text": _MARKER, "images": images}
        before, _, behind = chat_text(self._model.processor, [turn]).partition(_MARKER)
        return before.rstrip(" "), behind  # tokenizers join a space with the word behind it

    def write(self, drafts: Sequence[Draft], seed: int, progress: Callable[[float], None]) -> list[dict[str, str]]:
        """Returns the lines of the conversations. seed: another for each batch."""
        done, steps = 0, count_steps(drafts)

        def step() -> None:
            nonlocal done
            done += 1
            progress(done / steps)

        prompts = [draft.prompt for draft in drafts]
        open_ones = [n for n, d in enumerate(drafts) if d.prompt is None and self._can_begin(d)]
        words = [self._draw_word(drafts[n], [seed, n]) for n in open_ones]
        before = [self._before[drafts[n].picture is not None][0] for n in open_ones]
        begun = [
            (text + (word if text[-1:].isspace() else f" {word}".rstrip()), drafts[n])
            for text, word, n in zip(before, words, open_ones, strict=True)
        ]
        limits = [min(drafts[n].kind.prompt_tokens, self._length // 2) for n in open_ones]
        for n, word, text in zip(open_ones, words, self._continue(begun, limits, 2 * seed, step), strict=True):
            prompts[n] = (word + text).strip()
        asked = [text or draft.spare for text, draft in zip(prompts, drafts, strict=True)]
        texts = [self._chat_text(text, draft) for text, draft in zip(asked, drafts, strict=True)]
        limits = [draft.kind.answer_tokens for draft in drafts]
        answers = self._continue(list(zip(texts, drafts, strict=True)), limits, 2 * seed + 1, step)
        return [self._make_line(d, text, answer.strip()) for d, text, answer in zip(drafts, asked, answers, strict=True)]

    def _draw_word(self, draft: Draft, seed: Sequence[int]) -> str:
        """Returns the word that begins a prompt; none where none is asked for, or the vocabulary has none."""
        tokenizer, random = self._model.processor.tokenizer, np.random.default_rng(seed)
        for token in random.integers(len(tokenizer), size=_DRAWS if draft.kind.random_word else 0).tolist():
            word = str(tokenizer.decode([token])).strip()
            if str(tokenizer.convert_ids_to_tokens(token)).startswith(_SPACES) and len(word) > 2 and word.isalpha():
                return word
        return ""

    def _can_begin(self, draft: Draft) -> bool:
        """Whether the model can write what the user says: not where the template puts the picture behind it."""
        return draft.picture is None or self._model.processor.image_token in self._before[1][0]

    def _chat_text(self, prompt: str, draft: Draft) -> str:
        turn = {"role": "user", "text": prompt, "images": int(draft.picture is not None)}
        return chat_text(self._model.processor, [turn])

    def _continue(
        self, begun: Sequence[tuple[str, Draft]], limits: Sequence[int], seed: int, step: Callable[[], None]
    ) -> list[str]:
        """Returns what the model writes behind the texts, with their pictures. limits: of its tokens, for each text."""
        if not begun:
            return []
        model, config = self._model, self._model.manifest.config
        encoded = [encode_prompt(model.processor, config, text, _open_picture(draft)) for text, draft in begun]
        pixels = [one.pixel_values for one in encoded if len(one.pixel_values)]
        rows = [len(one.pixel_values) * config.vision.tokens_per_image for one in encoded]
        placement = join_placements([one.placement for one in encoded], rows)
        sequences = model.session.start(
            [e.input_ids for e in encoded], np.concatenate(pixels) if pixels else None, placement
        )
        starts = [len(tokens) for tokens in sequences.tokens]
        most = min(max(limits), self._length - max(starts) - _MARGIN)
        for _ in model.session.generate(sequences, most, self._ends, Sampling(temperature=TEMPERATURE, seed=seed)):
            step()
        spans = zip(sequences.tokens, starts, limits, strict=True)
        texts = [self._decode(tokens[start - 1 : start + limit]) for tokens, start, limit in spans]
        return [cut_at_stop(text, self._stop)[0] for text in texts]

    def _decode(self, tokens: list[int]) -> str:
        """Returns the text of all tokens but the first; some tokenizers leave out the space before what they decode."""
        first, whole = (
            str(self._model.processor.tokenizer.decode(part, skip_special_tokens=True)) for part in (tokens[:1], tokens)
        )
        return whole.removeprefix(first)

    def _make_line(self, draft: Draft, prompt: str, answer: str) -> dict[str, str]:
        """Returns a line of the set, shortened where it is too long once prompt and answer are one text."""
        picture = {} if draft.picture is None else {"image": str(draft.picture.line.image)}
        while (length := self._count_tokens(draft, prompt, answer)) > self._length and answer:
            answer = answer[: len(answer) * self._length // (length + 1)].strip()
        while self._count_tokens(draft, prompt, answer) > self._length and draft.prompt is None and len(prompt) > 1:
            prompt = prompt[: len(prompt) // 2].strip()
        return {**picture, "prompt": prompt, **({"answer": answer} if answer else {})}

    def _count_tokens(self, draft: Draft, prompt: str, answer: str) -> int:
        """Returns how long the sample is that calibration makes of a line."""
        model, images = self._model, _open_picture(draft)
        text, config = self._chat_text(prompt, draft), model.manifest.config
        return len(encode_answered(model.processor, config, text, answer or None, images, where="the sample").input_ids)


def _open_picture(draft: Draft) -> list[Image.Image]:
    if draft.picture is None or draft.picture.image is None:
        return []
    return [open_image(draft.picture.image, draft.picture.where)]
