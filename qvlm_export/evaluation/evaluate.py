"""`qvlm-eval` without its command line: reads a task, asks a model its questions, keeps the answers, scores them."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qvlm_export.calibrate.checkpoint.calibrated import write_json
from qvlm_export.calibrate.errors import UserError
from qvlm_export.checkpoints.chat_templates import CHOICES, OWN
from qvlm_export.evaluation.ask import Manner, ask_all
from qvlm_export.evaluation.distributed import gather, world
from qvlm_export.evaluation.predictions import Header, Predictions, PredictionWriter, merge_predictions, write_predictions
from qvlm_export.evaluation.subjects import IN_TORCH, EvalModel, find_eval_model, open_eval_model
from qvlm_export.evaluation.tasks.memes import HATEFUL_MEMES
from qvlm_export.evaluation.tasks.scienceqa import SCIENCEQA
from qvlm_export.evaluation.tasks.task import FORMS, Question, QuestionSet, Request, Score, Task
from qvlm_export.evaluation.tasks.vqa import VIZWIZ, VQAV2
from qvlm_export.inference.torch_runner import check_device
from qvlm_export.pipeline.progress import Reporter

LOOKED_FOR = 50  # pictures, before a model is loaded
TASKS = {task.name: task for task in (SCIENCEQA, VQAV2, VIZWIZ, HATEFUL_MEMES)}


@dataclass(frozen=True)
class EvalOptions:
    """What the command line says. None: decided from task and model. model: None where predictions are merged."""

    model: str | None
    task: str
    data: Path
    rung: str = "auto"
    split: str | None = None
    form: str = FORMS[0]
    conversation: str = OWN
    pad_square: bool = False
    questions: Path | None = None
    limit: int | None = None
    shard: tuple[int, int] = (1, 1)
    merge: tuple[Path, ...] = ()
    predictions: Path | None = None
    submission: Path | None = None
    batch: int | None = None
    max_new_tokens: int | None = None
    runtime: str = "auto"
    device: str = "auto"
    fast: bool = False


@dataclass(frozen=True)
class Evaluation:
    """What was found. score: None where the split's answers are not public. failed: why, by question."""

    task: str
    split: str
    rung: str
    runtime: str
    shard: tuple[int, int]
    questions: int
    answers: int
    score: Score | None
    failed: dict[str, str] = field(default_factory=dict)
    predictions: Path | None = None
    submission: Path | None = None
    seconds: float = 0.0

    def summary(self) -> dict[str, Any]:
        """The result as JSON holds it; metrics are shares of 1."""
        return {
            "task": self.task,
            "split": self.split,
            "rung": self.rung,
            "runtime": self.runtime,
            "shard": list(self.shard),
            "questions": self.questions,
            "answers": self.answers,
            "metrics": None if self.score is None else dict(self.score.metrics),
            "counts": None if self.score is None else dict(self.score.counts),
            "unparsed": None if self.score is None else self.score.unparsed,
            "failed": self.failed,
            "predictions": None if self.predictions is None else str(self.predictions),
            "submission": None if self.submission is None else str(self.submission),
            "seconds": self.seconds,
        }


@dataclass(frozen=True)
class Job:
    """A checked command line with the questions it is about."""

    options: EvalOptions
    task: Task
    request: Request
    given: QuestionSet

    @property
    def asked(self) -> Sequence[Question]:
        """In the order of the official files."""
        return self.given.questions[: self.options.limit]

    @property
    def max_new_tokens(self) -> int:
        return self.options.max_new_tokens or self.task.max_new_tokens[self.options.form]


def evaluate(options: EvalOptions, reporter: Reporter) -> Evaluation | None:
    """The whole command. Raises UserError for bad input, before a model is loaded where that can be seen.

    None in all processes of torchrun but the first.
    """
    job, here = read_job(options), world()
    if options.merge and here.rank > 0:
        return None
    if options.merge:
        merged = merge_predictions(options.merge, [q.id for q in job.asked])
        _check_data(merged.header, job)
        if options.predictions is not None:
            write_predictions(options.predictions, merged)
        return _evaluation(job, merged, options.predictions, 0.0)
    if options.model is None:
        raise UserError("give a model or an export, or --merge with the predictions of its shards")
    if here.size > 1 and options.shard != (1, 1):
        raise UserError("--shard: torchrun splits the questions itself; leave --shard out, or torchrun")
    subject = find_eval_model(options.model, options.rung)
    _check_subject(job, subject)
    shard = options.shard if here.size == 1 else (here.rank + 1, here.size)
    began = time.monotonic()
    found = _answers(job, subject, shard, reporter)
    path = predictions_path(job, subject, shard)
    if here.size > 1:
        everything = gather(found.answers)
        if everything is None:
            return None
        found = Predictions(Header(found.header.fingerprint), {q.id: everything[q.id] for q in job.asked}, 0)
        path = predictions_path(job, subject, (1, 1))
        write_predictions(path, found)
    return _evaluation(job, found, path, time.monotonic() - began)


def read_job(options: EvalOptions) -> Job:
    """Reads the questions. Raises UserError for options or data that are wrong."""
    if options.task not in TASKS:
        raise UserError(f"--task {options.task}: unknown; choose one of {', '.join(TASKS)}")
    task = TASKS[options.task]
    request = Request(options.data, options.split or task.splits[0], options.form, options.questions)
    for option, value, known in (
        ("--split", request.split, task.splits),
        ("--form", options.form, FORMS),
        ("--conversation", options.conversation, CHOICES),
    ):
        if value not in known:
            raise UserError(f"{option} {value}: unknown; choose one of {', '.join(known)}")
    if options.questions is not None and not task.own_questions:
        raise UserError(f"--questions: {task.name} makes its prompts from its own files; leave it out")
    part, parts = options.shard
    if not 1 <= part <= parts:
        raise UserError(f"--shard {part}/{parts}: give part/parts, such as 1/4 to 4/4")
    for option, number in (
        ("--limit", options.limit),
        ("--batch", options.batch),
        ("--max-new-tokens", options.max_new_tokens),
    ):
        if number is not None and number < 1:
            raise UserError(f"{option} {number}: must be at least 1")
    job = Job(options, task, request, task.read(request))
    _check_pictures(job)
    _check_submission(job)
    return job


def _check_pictures(job: Job) -> None:
    """One picture that is missing is counted and named; where none is there, it is the wrong directory."""
    pictures = [question.image for question in job.asked if question.image is not None][:LOOKED_FOR]
    if pictures and not any(path.is_file() for path in pictures):
        raise UserError(f"--data {job.request.data}: holds no {pictures[0]}, nor the next pictures; unpack them there")


def _check_subject(job: Job, subject: EvalModel) -> None:
    """Raises UserError for options that this model cannot take."""
    options, manifest = job.options, subject.manifest
    if options.pad_square and subject.config.tiles is not None:
        raise UserError("--pad-square: this model cuts pictures into tiles, as they are; leave it out")
    if options.batch is not None and manifest is not None and subject.rung not in IN_TORCH:
        most = manifest.limits.max_batch
        if options.batch > most:
            raise UserError(f"--batch {options.batch}: the export takes {most}; export with --max-batch {options.batch}")


def _check_submission(job: Job) -> None:
    options, path = job.options, job.options.submission
    if path is None:
        if not job.given.truth and options.shard == (1, 1):
            raise UserError(
                f"--split {job.request.split}: its answers are not public, so nothing can be scored; --submission FILE "
                "writes what the server takes"
            )
        return
    if job.task.submission is None:
        raise UserError(f"--submission: {job.task.name} has none; leave it out")
    if options.limit is not None or options.shard != (1, 1):
        raise UserError("--submission: needs the answers to all questions; leave --limit and --shard out")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise UserError(f"--submission {path}: is no file in a folder that is there; name another")


def _data_fingerprint(job: Job) -> dict[str, Any]:
    """What is asked, and how it is put, by the name that a refusal gives it."""
    digest = hashlib.sha256()
    for path in job.given.files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return {
        "task": job.task.name,
        "split": job.request.split,
        "data": digest.hexdigest(),
        "form": job.request.form,
        "conversation": job.options.conversation,
        "pad_square": job.options.pad_square,
        "limit": job.options.limit,
        # Last, as forms differ in it too, and a refusal names the first difference.
        "prompts": hashlib.sha256(json.dumps([question.prompt for question in job.asked]).encode()).hexdigest(),
    }


def _fingerprint(job: Job, subject: EvalModel) -> dict[str, Any]:
    """Everything that answers depend on. Not the batch: prompts of one length are computed apart from each other."""
    in_torch = subject.rung in IN_TORCH
    return {
        **_data_fingerprint(job),
        "model": subject.identity,
        "rung": subject.rung,
        "runtime": check_device(job.options.device) if in_torch else job.options.runtime,
        "fast": job.options.fast,
        "max_new_tokens": job.max_new_tokens,
    }


def _check_data(header: Header, job: Job) -> None:
    """Raises UserError where merged predictions answer other questions than those of the command line."""
    for name, now in _data_fingerprint(job).items():
        if (was := header.fingerprint.get(name)) != now:
            raise UserError(f"--merge: the predictions were made with {name} {was}, not {now}; give the same options")


def _answers(job: Job, subject: EvalModel, shard: tuple[int, int], reporter: Reporter) -> Predictions:
    """Asks what is not answered yet. The answers of this shard, in order."""
    path, header = predictions_path(job, subject, shard), Header(_fingerprint(job, subject), shard)
    mine = job.asked[shard[0] - 1 :: shard[1]]
    with PredictionWriter(path, header) as writer:
        if strangers := set(writer.answers) - {question.id for question in mine}:
            raise UserError(f"{path}: answers question {min(strangers)}, which is not asked; delete the file")
        waiting = [question for question in mine if question.id not in writer.answers]
        if len(waiting) < len(mine):
            reporter.note(f"{path}: {len(mine) - len(waiting)} of {len(mine)} answers are there already")
        if waiting:
            _ask(job, subject, waiting, writer, reporter)
        elif not mine:  # of more shards than questions, some are empty, and merge all the same
            writer.begin()
        return Predictions(header, {question.id: writer.answers[question.id] for question in mine}, 0)


def predictions_path(job: Job, subject: EvalModel, shard: tuple[int, int]) -> Path:
    """Where answers are kept. The part is in the name, unless the user named the file of a --shard."""
    path = job.options.predictions or Path(f"{subject.name}.{job.task.name}-{job.request.split}.{subject.rung}.jsonl")
    if shard == (1, 1) or (job.options.predictions is not None and job.options.shard == shard):
        return path
    return path.with_name(f"{path.stem}.{shard[0]}-of-{shard[1]}{path.suffix}")


def _ask(job: Job, subject: EvalModel, questions: Sequence[Question], writer: PredictionWriter, reporter: Reporter) -> None:
    options = job.options
    with open_eval_model(subject, options.runtime, options.device, options.fast, options.batch) as model:
        batch = options.batch or model.manifest.limits.max_batch
        manner = Manner(job.max_new_tokens, job.task.choices, options.conversation, options.pad_square, batch)
        with reporter.stage(job.task.name) as stage:
            done = 0
            for answers in ask_all(model, questions, manner):
                writer.add(answers)
                done += len(answers)
                stage.fraction(done / len(questions))
                for answer in answers.values():
                    if answer.failed:
                        reporter.note(f"not asked: {answer.failed}")


def _evaluation(job: Job, found: Predictions, path: Path | None, seconds: float) -> Evaluation:
    """Scores the answers, and writes the submission."""
    submission = job.options.submission
    if submission is not None and job.task.submission is not None:
        write_json(submission, job.task.submission(job.given, found.answers))
    return Evaluation(
        task=job.task.name,
        split=job.request.split,
        rung=str(found.header.fingerprint["rung"]),
        runtime=str(found.header.fingerprint["runtime"]),
        shard=found.header.shard,
        questions=len(job.asked),
        answers=len(found.answers),
        score=job.task.score(job.given, found.answers) if job.given.truth else None,
        failed={one: answer.failed for one, answer in found.answers.items() if answer.failed},
        predictions=path,
        submission=submission,
        seconds=seconds,
    )
