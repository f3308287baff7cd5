"""What an evaluation task is: how its official files are read, what is asked, how answers are judged and handed in.

A task is a row of data (`Task`), one file a task family; this file holds the row's shape and the reading that all share.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from qvlm_export.calibrate.errors import UserError

# How questions are put: as LLaVA-1.5 was evaluated, asked for short answers, or as 1.3, the bare question.
FORMS = ("v1.5", "v1.3")

Row = TypeVar("Row", bound=BaseModel)


@dataclass(frozen=True)
class Question:
    """id: as in the official files. prompt: the user's turn without its picture. image: None where there is none."""

    id: str
    prompt: str
    image: Path | None


@dataclass(frozen=True)
class QuestionSet:
    """A split as read. truth: what scoring needs, by id; empty where the split's answers are not public.

    files: what was read, whose bytes identify the set. others: ids that a submission names too, without being asked.
    """

    questions: tuple[Question, ...]
    truth: Mapping[str, Any]
    files: tuple[Path, ...]
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class Request:
    """What the command line says of the data. questions: a file of prompts that replaces the task's own, or None."""

    data: Path
    split: str
    form: str = FORMS[0]
    questions: Path | None = None


@dataclass(frozen=True)
class Answer:
    """What a model said to one question: text, or the log-likelihoods of the task's choices, or why it said nothing."""

    text: str = ""
    choices: tuple[float, ...] = ()
    failed: str | None = None


Answers = Mapping[str, Answer]


@dataclass(frozen=True)
class Score:
    """metrics: name -> 0..1, None over no question. counts: questions behind each. unparsed: answers that say nothing."""

    metrics: Mapping[str, float | None]
    counts: Mapping[str, int]
    unparsed: int


@dataclass(frozen=True)
class Task:
    """One benchmark.

    splits: the first is the default. layout: what a data directory holds, for people. main: the metric of summaries.
    choices: texts whose likelihoods are compared instead of generating an answer. max_new_tokens: by form.
    submission: the official JSON of answers, None where there is none.
    """

    name: str
    splits: tuple[str, ...]
    layout: str
    main: str
    read: Callable[[Request], QuestionSet]
    score: Callable[[QuestionSet, Answers], Score]
    max_new_tokens: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(FORMS, 1))
    choices: tuple[str, ...] = ()
    submission: Callable[[QuestionSet, Answers], list[dict[str, Any]]] | None = None
    own_questions: bool = False  # whether --questions makes sense


def find_file(data: Path, names: Sequence[str], layout: str) -> Path:
    """The first of `names` that is in the data directory. Raises UserError saying which file is missing."""
    if not data.is_dir():
        raise UserError(f"--data {data}: there is no such directory; give one with {layout}")
    for name in names:
        if (data / name).is_file():
            return data / name
    raise UserError(f"--data {data}: holds no {names[0]}; give a directory with {layout}")


def find_folder(data: Path, names: Sequence[str], layout: str) -> Path:
    """The first of the folders `names` that is in the data directory. Raises UserError saying which is missing."""
    for name in names:
        if (data / name).is_dir():
            return data / name
    raise UserError(f"--data {data}: holds no folder {names[0]}; give a directory with {layout}")


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises UserError when it is not UTF-8, not JSON, or names a key of an object twice."""
    text = _read_text(path)
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); download it again") from error


def read_json_lines(path: Path) -> list[tuple[str, Any]]:
    """(where, content) of every line that is not empty. Raises UserError naming file and line."""
    rows = []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if line.strip():
            try:
                rows.append((f"{path}:{number}", json.loads(line, object_pairs_hook=_unique)))
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}:{number}: not JSON ({error}); download it again") from error
    return rows


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check its rights") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (byte {error.start}); download it again or save it as UTF-8") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """json keeps the last of equal keys without a word, and a question would be gone."""
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{find_duplicate(names)!r} stands twice in one object")
    return content


def find_duplicate(ids: Iterable[str]) -> str | None:
    """The first id that comes a second time."""
    seen: set[str] = set()
    for one in ids:
        if one in seen:
            return one
        seen.add(one)
    return None


def validate_entry(row: type[Row], content: Any, where: str) -> Row:
    """`content` as a row. Raises UserError, begun with `where`, naming the field that is missing or of another type."""
    try:
        return row.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the entry"
        raise UserError(f"{where}: {place}: {first['msg']}; download the file again") from error


def find_list(content: Any, key: str | None, path: Path) -> list[Any]:
    """The list in `content`, or under `key` in it. Raises UserError when there is none."""
    found = content.get(key) if isinstance(content, dict) and key else content
    if not isinstance(found, list):
        raise UserError(f"{path}: holds no list{f' of {key}' if key else ''}; is it the official file?")
    return found


def require_questions(questions: Sequence[Question], path: Path, split: str) -> None:
    """Raises UserError for an empty split and for an id that comes twice."""
    if not questions:
        raise UserError(f"{path}: the split {split} holds no question; give another --split, or download the file again")
    if (twice := find_duplicate(q.id for q in questions)) is not None:
        raise UserError(f"{path}: question {twice} stands twice; download the file again")


def mean(values: Sequence[float]) -> float | None:
    """None over nothing."""
    return sum(values) / len(values) if values else None


def by_group(scores: Mapping[str, Sequence[float]], unparsed: int) -> Score:
    """A Score of per-question values by metric."""
    return Score({n: mean(v) for n, v in scores.items()}, {n: len(v) for n, v in scores.items()}, unparsed)
