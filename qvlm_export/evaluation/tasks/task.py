"""Data model of an evaluation task: questions read from official files, prompts, scoring, submission files.

A task is a row of data (`Task`) at the end of the file of its task family. This file defines that row, and what all families
share to read and validate their files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from qvlm_export.calibrate.checkpoint.regular_file import check_regular_file
from qvlm_export.calibrate.errors import UserError
from qvlm_export.inputs.lines import make_unique_dict

# The wording of prompts: v1.5 asks for a short answer, as in the evaluation of LLaVA-1.5; v1.3 is the bare question.
FORMS = ("v1.5", "v1.3")

Row = TypeVar("Row", bound=BaseModel)


@dataclass(frozen=True)
class Question:
    """A question. id: as in the official files. prompt: the user's turn without its image. image: its path, or None."""

    id: str
    prompt: str
    image: Path | None


@dataclass(frozen=True)
class QuestionSet:
    """The questions of a split.

    truth: what scoring needs, by question id; empty when the answers of the split are not public. files: the files that were
    read; their content identifies the set. unasked_ids: further questions that a submission must name.
    """

    questions: tuple[Question, ...]
    truth: Mapping[str, Any]
    files: tuple[Path, ...]
    unasked_ids: tuple[str, ...] = ()


@dataclass(frozen=True)
class Request:
    """Which questions to read.

    data: the directory of the official files. form: one of `FORMS`. questions: a file of prompts that replaces the task's
    own, or None.
    """

    data: Path
    split: str
    form: str = FORMS[0]
    questions: Path | None = None


@dataclass(frozen=True)
class Answer:
    """A model's answer to a question.

    text: the generated text. choices: the log-likelihoods of the task's choices in nats, instead of a text. failed: why the
    question could not be asked, or None.
    """

    text: str = ""
    choices: tuple[float, ...] = ()
    failed: str | None = None


Answers = Mapping[str, Answer]  # by question id


@dataclass(frozen=True)
class Score:
    """The score of a set of answers.

    metrics: values from 0 to 1 by name; None over no question. counts: the number of questions behind each metric. unparsed:
    the number of answers that could not be interpreted.
    """

    metrics: Mapping[str, float | None]
    counts: Mapping[str, int]
    unparsed: int


@dataclass(frozen=True)
class Task:
    """A benchmark.

    splits: the first is the default. layout: a description of the data directory for error messages. main: the metric that
    summaries show. read: reads the questions. score: scores answers. max_new_tokens: by form. choices: texts whose
    likelihoods are compared instead of generating an answer. submission: makes the content of the official JSON file of
    answers; None when the benchmark has none. own_questions: whether a file of prompts (--questions) can replace the task's.
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
    own_questions: bool = False


def find_file(data: Path, names: Sequence[str], layout: str) -> Path:
    """Returns the first of the files `names` that is in the data directory. Raises UserError when none is."""
    if not data.is_dir():
        raise UserError(f"--data {data}: there is no such directory; give one with {layout}")
    for name in names:
        if (data / name).is_file():
            return data / name
    raise UserError(f"--data {data}: holds no {names[0]}; give a directory with {layout}")


def find_folder(data: Path, names: Sequence[str], layout: str) -> Path:
    """Returns the first of the folders `names` that is in the data directory. Raises UserError when none is."""
    for name in names:
        if (data / name).is_dir():
            return data / name
    raise UserError(f"--data {data}: holds no folder {names[0]}; give a directory with {layout}")


def read_json(path: Path) -> Any:
    """Returns the content of a JSON file. Raises UserError when it is not UTF-8 or JSON, or an object has a key twice."""
    text = _read_text(path)
    try:
        return json.loads(text, object_pairs_hook=make_unique_dict)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); download it again") from error


def read_json_lines(path: Path) -> list[tuple[str, Any]]:
    """Returns ("path:line number", content) of every line that is not empty. Raises UserError that names file and line."""
    rows = []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if line.strip():
            try:
                rows.append((f"{path}:{number}", json.loads(line, object_pairs_hook=make_unique_dict)))
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}:{number}: not JSON ({error}); download it again") from error
    return rows


def _read_text(path: Path) -> str:
    check_regular_file(path, "a file of questions")
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check its rights") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (byte {error.start}); download it again or save it as UTF-8") from error


def find_duplicate(ids: Iterable[str]) -> str | None:
    """Returns the first id that occurs a second time, or None."""
    earlier: set[str] = set()
    for current in ids:
        if current in earlier:
            return current
        earlier.add(current)
    return None


def validate_entry(row: type[Row], content: Any, where: str) -> Row:
    """Returns `content` as a validated `row`. Raises UserError that begins with `where` and names the first wrong field."""
    try:
        return row.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        field_name = ".".join(str(part) for part in first["loc"]) or "the entry"
        raise UserError(f"{where}: {field_name}: {first['msg']}; download the file again") from error


def find_list(content: Any, key: str | None, path: Path) -> list[Any]:
    """Returns the list that is `content`, or that `content` holds under `key`. Raises UserError when there is none."""
    entries = content.get(key) if isinstance(content, dict) and key else content
    if not isinstance(entries, list):
        raise UserError(f"{path}: holds no list{f' of {key}' if key else ''}; is it the official file?")
    return entries


def require_questions(questions: Sequence[Question], path: Path, split: str) -> None:
    """Raises UserError for a split without questions, and for an id that occurs twice."""
    if not questions:
        raise UserError(f"{path}: the split {split} holds no question; give another --split, or download the file again")
    if (duplicate := find_duplicate(q.id for q in questions)) is not None:
        raise UserError(f"{path}: question {duplicate} stands twice; download the file again")


def mean(values: Sequence[float]) -> float | None:
    """Returns the mean, or None over no value."""
    return sum(values) / len(values) if values else None


def average_columns(values: Mapping[str, Sequence[float]], unparsed: int) -> Score:
    """Returns the score whose metrics are the means of `values`, the values of single questions by metric."""
    return Score({n: mean(v) for n, v in values.items()}, {n: len(v) for n, v in values.items()}, unparsed)
