"""Predictions as JSONL: a first line that says of what, then one line an answer, written as they come.

A killed run leaves a file that the same command goes on with; a file of anything else is refused. Files of shards merge
into the one that a single run would have written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from qvlm_export.calibrate.checkpoint.calibrated import write_atomically
from qvlm_export.calibrate.errors import UserError
from qvlm_export.evaluation.tasks.task import Answer

FORMAT, VERSION = "qvlm-eval predictions", 1


@dataclass(frozen=True)
class Header:
    """fingerprint: everything that answers depend on, by name. shard: part and number of parts, from 1."""

    fingerprint: Mapping[str, Any]
    shard: tuple[int, int] = (1, 1)

    def line(self) -> str:
        content = {"format": FORMAT, "version": VERSION, **asdict(self)}
        return json.dumps(content, sort_keys=True) + "\n"


@dataclass(frozen=True)
class Predictions:
    """A file as read. size: bytes up to the last whole line; what a killed run left behind it does not count."""

    header: Header
    answers: dict[str, Answer]
    size: int


class PredictionWriter:
    """Adds answers to a file, synced to disk batch by batch. A context manager. Nothing is written before `begin`."""

    def __init__(self, path: Path, header: Header) -> None:
        """Reads what the same command left. Raises UserError when the file is of another run, or cannot be written."""
        _check_place(path)
        self._path, self._header = path, header
        self._file: IO[str] | None = None
        self._found = read_predictions(path) if path.exists() else None
        if self._found is not None:
            _check_same(path, self._found.header, header, "give another --predictions, or delete the file to begin anew")
        earlier = {} if self._found is None else self._found.answers
        # What could not be asked is tried again.
        self.answers = {one: answer for one, answer in earlier.items() if not answer.failed}

    def __enter__(self) -> PredictionWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()

    def begin(self) -> IO[str]:
        """Makes the file, or takes from it what a kill left half and what is tried again; once only."""
        if self._file is not None:
            return self._file
        if self._found is None or len(self.answers) < len(self._found.answers):
            write_predictions(self._path, Predictions(self._header, self.answers, 0))
        else:
            os.truncate(self._path, self._found.size)
        self._file = self._path.open("a", encoding="ascii")
        return self._file

    def add(self, answers: Mapping[str, Answer]) -> None:
        """Writes a batch; it is on disk when this returns."""
        file = self.begin()
        file.write("".join(_line(one, answer) for one, answer in answers.items()))
        file.flush()
        os.fsync(file.fileno())
        self.answers |= answers


def _line(one: str, answer: Answer) -> str:
    """ASCII, as a model may say half a surrogate pair."""
    said = {key: value for key, value in asdict(answer).items() if value}
    return json.dumps({"id": one, **said}) + "\n"


def read_predictions(path: Path) -> Predictions:
    """Raises UserError for a file that is none of ours, is damaged in the middle, or answers a question twice."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a file that qvlm-eval wrote") from error
    whole = raw[: raw.rfind(b"\n") + 1]
    lines = whole.split(b"\n")[:-1]
    if not lines:
        raise UserError(f"{path}: holds no predictions; delete it, or give another --predictions")
    header = _header(path, lines[0])
    answers: dict[str, Answer] = {}
    for number, line in enumerate(lines[1:], start=2):
        one, answer = _answer(f"{path}:{number}", line)
        if one in answers:
            raise UserError(f"{path}:{number}: answers question {one} a second time; delete the file and run again")
        answers[one] = answer
    return Predictions(header, answers, len(whole))


def _header(path: Path, line: bytes) -> Header:
    try:
        content = json.loads(line)
        if content["format"] != FORMAT:
            raise ValueError(content["format"])
        part, parts = content["shard"]
        header = Header(dict(content["fingerprint"]), (int(part), int(parts)))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: is no file of predictions of qvlm-eval; give another --predictions") from error
    if content.get("version") != VERSION:
        raise UserError(f"{path}: version {content.get('version')}, this program writes {VERSION}; delete the file")
    return header


def _answer(where: str, line: bytes) -> tuple[str, Answer]:
    try:
        content = json.loads(line)
        said = {key: content[key] for key in ("text", "failed") if key in content}
        if not all(isinstance(value, str) for value in (content["id"], *said.values())):
            raise ValueError("a value is no text")
        return content["id"], Answer(choices=tuple(float(c) for c in content.get("choices", ())), **said)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{where}: is no prediction ({error}); delete the file and run again") from error


def _check_place(path: Path) -> None:
    if path.is_dir():
        raise UserError(f"--predictions {path}: is a folder; name a file in it")
    nearest = next(folder for folder in path.absolute().parents if folder.exists())
    if not os.access(nearest, os.W_OK) or not nearest.is_dir():
        raise UserError(f"--predictions {path}: its folder cannot be written; choose another")


def _check_same(path: Path, found: Header, wanted: Header, cure: str) -> None:
    """Raises UserError naming the first thing in which two runs differ."""
    ours = {**found.fingerprint, "shard": "{}/{}".format(*found.shard)}
    theirs = {**wanted.fingerprint, "shard": "{}/{}".format(*wanted.shard)}
    for name in (*theirs, *(name for name in ours if name not in theirs)):
        if ours.get(name) != theirs.get(name):
            raise UserError(
                f"{path}: holds answers of another run: {name} was {_short(ours.get(name))}, now it is "
                f"{_short(theirs.get(name))}; {cure}"
            )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}…"


def merge_predictions(paths: Sequence[Path], ids: Iterable[str]) -> Predictions:
    """The answers of all shards, in the order of `ids`. Raises UserError when they are not the parts of one run."""
    parts = [read_predictions(path) for path in paths]
    first = parts[0].header
    for path, part in zip(paths, parts, strict=True):
        _check_same(path, replace(part.header, shard=first.shard), first, "merge the shards of one run only")
    _check_shards(paths, [part.header.shard for part in parts])
    answers = {one: answer for part in parts for one, answer in part.answers.items()}
    wanted = list(ids)
    if missing := [one for one in wanted if one not in answers]:
        raise UserError(
            f"--merge: {len(missing)} of {len(wanted)} questions lack an answer, such as {missing[0]}; finish the shards"
        )
    return Predictions(replace(first, shard=(1, 1)), {one: answers[one] for one in wanted}, 0)


def _check_shards(paths: Sequence[Path], shards: Sequence[tuple[int, int]]) -> None:
    count = shards[0][1]
    for path, (part, of) in zip(paths, shards, strict=True):
        if of != count:
            raise UserError(f"--merge: {path} is a shard of {of}, {paths[0]} one of {count}; they are of different runs")
        if shards.count((part, of)) > 1:
            raise UserError(f"--merge: {path} is shard {part}/{of}, which is given twice")
    if missing := set(range(1, count + 1)) - {part for part, _ in shards}:
        raise UserError(f"--merge: shard {min(missing)}/{count} is missing; give all of them")


def write_predictions(path: Path, found: Predictions) -> None:
    """The whole file at once, through a temporary file."""
    _check_place(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = found.header.line() + "".join(_line(one, answer) for one, answer in found.answers.items())
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="ascii"))
