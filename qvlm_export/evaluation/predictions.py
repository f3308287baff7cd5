"""Files of predictions (JSONL): a header that identifies the run, then one line per answer, appended batch by batch.

The same command continues the file that an interrupted run has left; a file of any other run is refused. The files of all
shards merge into the one that a single run would have written.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from qvlm_export.calibrate.checkpoint.files import write_atomically
from qvlm_export.calibrate.checkpoint.regular_file import check_regular_file
from qvlm_export.calibrate.errors import UserError
from qvlm_export.evaluation.tasks.task import Answer
from qvlm_export.pipeline.lock import hold_lock

FORMAT, VERSION = "qvlm-eval predictions", 2  # 1 called the form of the model "rung"


@dataclass(frozen=True)
class Header:
    """The first line of a file. fingerprint: everything that the answers depend on, by name. shard: (part from 1, parts)."""

    fingerprint: Mapping[str, Any]
    shard: tuple[int, int] = (1, 1)

    def line(self) -> str:
        """The header as a line of JSON."""
        content = {"format": FORMAT, "version": VERSION, **asdict(self)}
        return json.dumps(content, sort_keys=True) + "\n"


@dataclass(frozen=True)
class Predictions:
    """The content of a file, answers by question id.

    size: bytes up to the end of the last complete line; an interrupted run may have left part of another one behind it.
    """

    header: Header
    answers: dict[str, Answer]
    size: int

    def is_complete(self, ids: Sequence[str]) -> bool:
        """Returns whether these questions, at least one, and no others have an answer, and none is to be asked again."""
        return bool(ids) and set(self.answers) == set(ids) and not any(answer.failed for answer in self.answers.values())


class PredictionWriter:
    """Appends answers to a file and syncs it after every batch; a context manager. Nothing is written before `begin`.

    answers: those that the file holds, by question id.
    """

    def __init__(self, path: Path, header: Header) -> None:
        """Reads the file if it exists. Raises UserError when it is of another run, or cannot be written."""
        _check_writable(path)
        self._path, self._header = path, header
        self._file: IO[str] | None = None
        self._existing = read_own_predictions(path, header)
        existing_answers = {} if self._existing is None else self._existing.answers
        # Questions that could not be asked are tried again.
        self.answers = {question_id: answer for question_id, answer in existing_answers.items() if not answer.failed}

    def __enter__(self) -> PredictionWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()

    def begin(self) -> IO[str]:
        """Opens the file for appending, once; creates it, or removes failed questions and a partial last line from it."""
        if self._file is not None:
            return self._file
        if self._existing is None or len(self.answers) < len(self._existing.answers):
            write_predictions(self._path, Predictions(self._header, self.answers, 0))
        else:
            os.truncate(self._path, self._existing.size)
        self._file = self._path.open("a", encoding="ascii")
        return self._file

    def add(self, answers: Mapping[str, Answer]) -> None:
        """Appends a batch of answers, by question id; they are synced to disk when this returns."""
        file = self.begin()
        file.write("".join(_format_answer(question_id, answer) for question_id, answer in answers.items()))
        file.flush()
        os.fsync(file.fileno())
        self.answers |= answers


@contextmanager
def lock_predictions(path: Path) -> Iterator[None]:
    """Keeps other processes from writing a file of predictions, by a lock beside it, which is removed at the end.

    Raises UserError when another one is writing it, or when nothing can be written there.
    """
    _check_writable(path)
    target = path.resolve()
    missing = [folder for folder in target.parents if not folder.exists()]
    lock = target.with_name(f".{target.name}.lock")
    try:
        with hold_lock(lock, f"{path}: another qvlm-eval writes it", "wait for it, or give another --predictions"):
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
    finally:
        for folder in missing:
            with suppress(OSError):  # a folder that is not empty holds the predictions, and stays
                folder.rmdir()


def read_own_predictions(path: Path, header: Header) -> Predictions | None:
    """Returns the content of a file that the run of `header` has written; None when there is no file.

    Raises UserError when it is of another run.
    """
    if not path.exists():
        return None
    existing = read_predictions(path)
    _check_same_run(path, existing.header, header, "give another --predictions, or delete the file to start over")
    return existing


def _format_answer(question_id: str, answer: Answer) -> str:
    """Returns an answer as a line of JSON in ASCII, since a model may generate half a surrogate pair."""
    fields = {key: value for key, value in asdict(answer).items() if value}
    return json.dumps({"id": question_id, **fields}) + "\n"


def read_predictions(path: Path) -> Predictions:
    """Reads a file of predictions up to its last complete line.

    Raises UserError for a file that qvlm-eval did not write, that is damaged before its end, or that answers a question
    twice.
    """
    check_regular_file(path, "a file of predictions")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a file that qvlm-eval wrote") from error
    complete = raw[: raw.rfind(b"\n") + 1]
    lines = complete.split(b"\n")[:-1]
    if not lines:
        raise UserError(f"{path}: holds no predictions; delete it, or give another --predictions")
    header = _parse_header(path, lines[0])
    answers: dict[str, Answer] = {}
    for number, line in enumerate(lines[1:], start=2):
        question_id, answer = _parse_answer(f"{path}:{number}", line)
        if question_id in answers:
            raise UserError(f"{path}:{number}: answers question {question_id} a second time; delete the file and run again")
        answers[question_id] = answer
    return Predictions(header, answers, len(complete))


def _parse_header(path: Path, line: bytes) -> Header:
    try:
        content = json.loads(line)
        if content["format"] != FORMAT:
            raise ValueError(content["format"])
        part, parts = content["shard"]
        header = Header(dict(content["fingerprint"]), (int(part), int(parts)))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: is no file of predictions of qvlm-eval; give another --predictions") from error
    if content.get("version") != VERSION:
        raise UserError(
            f"{path}: version {content.get('version')}, this program writes {VERSION}; delete the file, and ask again"
        )
    return header


def _parse_answer(where: str, line: bytes) -> tuple[str, Answer]:
    try:
        content = json.loads(line)
        texts = {key: content[key] for key in ("text", "failed") if key in content}
        if not all(isinstance(value, str) for value in (content["id"], *texts.values())):
            raise ValueError("a value is no text")
        choices = tuple(float(choice) for choice in content.get("choices", ()))
        if not all(map(math.isfinite, choices)):
            raise ValueError("a likelihood is NaN or infinite")
        return content["id"], Answer(choices=choices, **texts)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{where}: is no prediction ({error}); delete the file and run again") from error


def _check_writable(path: Path) -> None:
    """Raises UserError when a file cannot be written at `path`; its folder need not exist yet."""
    if path.is_dir():
        raise UserError(f"--predictions {path}: is a folder; name a file in it")
    check_regular_file(path, "a file of predictions")
    nearest = next(folder for folder in path.absolute().parents if folder.exists())
    if not os.access(nearest, os.W_OK) or not nearest.is_dir():
        raise UserError(f"--predictions {path}: its folder cannot be written; choose another")


def _check_same_run(path: Path, header: Header, expected: Header, remedy: str) -> None:
    """Raises UserError that names the first value in which the header of a file differs from the expected one."""
    recorded = {**header.fingerprint, "shard": "{}/{}".format(*header.shard)}
    current = {**expected.fingerprint, "shard": "{}/{}".format(*expected.shard)}
    for name in (*current, *(name for name in recorded if name not in current)):
        if recorded.get(name) != current.get(name):
            raise UserError(
                f"{path}: holds answers of another run: {name} was {_shorten(recorded.get(name))}, now it is "
                f"{_shorten(current.get(name))}; {remedy}"
            )


def _shorten(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}…"


def merge_predictions(paths: Sequence[Path], ids: Iterable[str]) -> Predictions:
    """Merges the files of all shards of a run into the predictions of one run, in the order of the question ids.

    Raises UserError when the files are not all shards of one run, or when a question lacks an answer.
    """
    parts = [read_predictions(path) for path in paths]
    first = parts[0].header
    for path, part in zip(paths, parts, strict=True):
        _check_same_run(path, replace(part.header, shard=first.shard), first, "merge the shards of one run only")
    _check_shards(paths, [part.header.shard for part in parts])
    answers = {question_id: answer for part in parts for question_id, answer in part.answers.items()}
    expected = list(ids)
    if missing := [question_id for question_id in expected if question_id not in answers]:
        raise UserError(
            f"--merge: {len(missing)} of {len(expected)} questions lack an answer, such as {missing[0]}; finish the shards"
        )
    return Predictions(replace(first, shard=(1, 1)), {question_id: answers[question_id] for question_id in expected}, 0)


def _check_shards(paths: Sequence[Path], shards: Sequence[tuple[int, int]]) -> None:
    """Raises UserError unless the shards are all parts of the same number, each once."""
    count = shards[0][1]
    for path, (part, of) in zip(paths, shards, strict=True):
        if of != count:
            raise UserError(f"--merge: {path} is a shard of {of}, {paths[0]} one of {count}; they are of different runs")
        if shards.count((part, of)) > 1:
            raise UserError(f"--merge: {path} is shard {part}/{of}, which is given twice")
    if missing := set(range(1, count + 1)) - {part for part, _ in shards}:
        raise UserError(f"--merge: shard {min(missing)}/{count} is missing; give all of them")


def write_predictions(path: Path, predictions: Predictions) -> None:
    """Writes a whole file of predictions, through a temporary file. Raises UserError when it cannot be written."""
    _check_writable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [_format_answer(question_id, answer) for question_id, answer in predictions.answers.items()]
    text = predictions.header.line() + "".join(lines)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="ascii"))
