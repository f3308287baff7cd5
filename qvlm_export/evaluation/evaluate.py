"""Evaluation of a model on a benchmark: `qvlm-eval` without its command line.

Reads the questions of a task, lets the model answer those that its file of predictions does not hold yet, and scores all
answers. A run may be split into shards by hand or by torchrun, and be continued after it was interrupted.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qvlm_export.calibrate.checkpoint.files import write_json
from qvlm_export.calibrate.checkpoint.regular_file import check_regular_file
from qvlm_export.calibrate.errors import UserError
from qvlm_export.checkpoints.chat_templates import CHOICES, OWN
from qvlm_export.evaluation.ask import AskSettings, ask_all
from qvlm_export.evaluation.distributed import gather, world
from qvlm_export.evaluation.eval_model import EvalModel, find_eval_model, open_eval_model
from qvlm_export.evaluation.predictions import (
    Header,
    Predictions,
    PredictionWriter,
    lock_predictions,
    merge_predictions,
    read_own_predictions,
    write_predictions,
)
from qvlm_export.evaluation.tasks.memes import HATEFUL_MEMES
from qvlm_export.evaluation.tasks.scienceqa import SCIENCEQA
from qvlm_export.evaluation.tasks.task import FORMS, Question, QuestionSet, Request, Score, Task
from qvlm_export.evaluation.tasks.vqa import VIZWIZ, VQAV2
from qvlm_export.inference.forms import IN_TORCH
from qvlm_export.inference.torch_runner import check_device
from qvlm_export.pipeline.progress import Reporter

CHECKED_IMAGES = 50  # looked for before a model is loaded
TASKS = {task.name: task for task in (SCIENCEQA, VQAV2, VIZWIZ, HATEFUL_MEMES)}


@dataclass(frozen=True)
class EvalOptions:
    """The options of the command line; None leaves a value to the task or the model.

    model: an export, a calibrated checkpoint or a float checkpoint; None when shards are merged. model_form: "auto" or one
    of `MODEL_FORMS`. form: how prompts are worded, one of `FORMS` in `tasks/task.py`. conversation: the chat format.
    questions: a file of prompts that replaces the task's own. limit: only the first questions. shard: (part, parts), part
    counted from 1. merge: predictions of all shards, which are scored together. runtime, fast: of graph and engine.
    device: of the torch forms. revision: of a model on the Hub.
    """

    model: str | None
    task: str
    data: Path
    model_form: str = "auto"
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
    revision: str | None = None


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation.

    shard: (part, parts). questions: how many were selected, in all shards. answers: how many of them have an answer here.
    score: None when the answers of the split are not public. failed: why a question could not be asked, by question id.
    predictions, submission: the files that were written. seconds: the time for answering.
    """

    task: str
    split: str
    model_form: str
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
        """Returns the result as JSON values; metrics lie between 0 and 1."""
        return {
            "task": self.task,
            "split": self.split,
            "model_form": self.model_form,
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
    """Checked options, the task they name, and its questions."""

    options: EvalOptions
    task: Task
    request: Request
    question_set: QuestionSet

    @property
    def questions(self) -> Sequence[Question]:
        """The questions up to --limit, in the order of the official files."""
        return self.question_set.questions[: self.options.limit]

    @property
    def max_new_tokens(self) -> int:
        """The longest answer in tokens: of the options, else of the task."""
        return self.options.max_new_tokens or self.task.max_new_tokens[self.options.form]


def evaluate(options: EvalOptions, reporter: Reporter) -> Evaluation | None:
    """Evaluates a model as the options say, or merges and scores the predictions of shards.

    Returns None in every process of torchrun but the first. Raises UserError for bad input, before a model is loaded where
    possible.
    """
    job, process = read_job(options), world()
    if options.merge and process.rank > 0:
        return None
    if options.merge:
        merged = merge_predictions(options.merge, [q.id for q in job.questions])
        _check_same_questions(merged.header, job)
        if options.predictions is not None:
            with lock_predictions(options.predictions):
                write_predictions(options.predictions, merged)
        return _score_and_submit(job, merged, options.predictions, 0.0)
    if options.model is None:
        raise UserError("give a model or an export, or --merge with the predictions of its shards")
    if process.size > 1 and options.shard != (1, 1):
        raise UserError("--shard: torchrun splits the questions itself; leave --shard out, or torchrun")
    eval_model = find_eval_model(options.model, options.model_form, reporter, options.revision)
    _check_model(job, eval_model)
    shard = options.shard if process.size == 1 else (process.rank + 1, process.size)
    start = time.monotonic()
    predictions = _answer_questions(job, eval_model, shard, reporter)
    path = predictions_path(job, eval_model, shard)
    if process.size > 1:
        answers = gather(predictions.answers)
        if answers is None:
            return None
        predictions = Predictions(Header(predictions.header.fingerprint), {q.id: answers[q.id] for q in job.questions}, 0)
        path = predictions_path(job, eval_model, (1, 1))
        with lock_predictions(path):
            write_predictions(path, predictions)
    return _score_and_submit(job, predictions, path, time.monotonic() - start)


def read_job(options: EvalOptions) -> Job:
    """Checks the options and reads the questions. Raises UserError for wrong options or data."""
    if options.task not in TASKS:
        raise UserError(f"--task {options.task}: unknown; choose one of {', '.join(TASKS)}")
    task = TASKS[options.task]
    request = Request(options.data, options.split or task.splits[0], options.form, options.questions)
    for option, value, allowed in (
        ("--split", request.split, task.splits),
        ("--form", options.form, FORMS),
        ("--conversation", options.conversation, CHOICES),
    ):
        if value not in allowed:
            raise UserError(f"{option} {value}: unknown; choose one of {', '.join(allowed)}")
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
    _check_images(job)
    _check_submission(job)
    return job


def _check_images(job: Job) -> None:
    """Raises UserError when none of the first images is there, so that the directory must be wrong.

    A single missing image is no error: its question counts as failed.
    """
    paths = [question.image for question in job.questions if question.image is not None][:CHECKED_IMAGES]
    if paths and not any(path.is_file() for path in paths):
        raise UserError(f"--data {job.request.data}: holds no {paths[0]}, nor the next pictures; unpack them there")


def _check_model(job: Job, eval_model: EvalModel) -> None:
    """Raises UserError for options that do not suit the model."""
    options, manifest = job.options, eval_model.manifest
    if options.pad_square and eval_model.config.tiles is not None:
        raise UserError("--pad-square: this model cuts pictures into tiles, as they are; leave it out")
    if options.batch is not None and manifest is not None and eval_model.model_form not in IN_TORCH:
        max_batch = manifest.limits.max_batch
        if options.batch > max_batch:
            raise UserError(
                f"--batch {options.batch}: the export takes {max_batch}; export with --max-batch {options.batch}"
            )


def _check_submission(job: Job) -> None:
    """Raises UserError when there is nothing to score and no submission, or when the submission cannot be written."""
    options, path = job.options, job.options.submission
    if path is None:
        if not job.question_set.truth and options.shard == (1, 1):
            raise UserError(
                f"--split {job.request.split}: its answers are not public, so nothing can be scored; --submission FILE "
                "writes what the server takes"
            )
        return
    if job.task.submission is None:
        raise UserError(f"--submission: {job.task.name} has none; leave it out")
    if options.limit is not None or options.shard != (1, 1):
        raise UserError("--submission: needs the answers to all questions; leave --limit and --shard out")
    check_regular_file(path, "a submission")
    if not path.absolute().parent.is_dir():
        raise UserError(f"--submission {path}: is no file in a folder that is there; name another")


def _data_fingerprint(job: Job) -> dict[str, Any]:
    """Returns what identifies the questions and how they are put, by the names that error messages give to them."""
    digest = hashlib.sha256()
    for path in job.question_set.files:
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
        # The prompts come last: they differ with form, too, and an error message names the first difference only.
        "prompts": hashlib.sha256(json.dumps([question.prompt for question in job.questions]).encode()).hexdigest(),
    }


def _fingerprint(job: Job, eval_model: EvalModel) -> dict[str, Any]:
    """Returns everything that the answers depend on, by name.

    The batch size is not among it, as prompts of a batch have equal length and do not influence each other.
    """
    in_torch = eval_model.model_form in IN_TORCH
    return {
        **_data_fingerprint(job),
        "model": eval_model.identity,
        "model_form": eval_model.model_form,
        "runtime": check_device(job.options.device) if in_torch else job.options.runtime,
        "fast": job.options.fast,
        "max_new_tokens": job.max_new_tokens,
    }


def _check_same_questions(header: Header, job: Job) -> None:
    """Raises UserError when merged predictions answer other questions than those of the options."""
    for name, expected in _data_fingerprint(job).items():
        if (recorded := header.fingerprint.get(name)) != expected:
            raise UserError(
                f"--merge: the predictions were made with {name} {recorded}, not {expected}; give the same options"
            )


def _answer_questions(job: Job, eval_model: EvalModel, shard: tuple[int, int], reporter: Reporter) -> Predictions:
    """Answers the questions of a shard that its file of predictions lacks; returns all answers of the shard, in order."""
    path, header = predictions_path(job, eval_model, shard), Header(_fingerprint(job, eval_model), shard)
    questions = job.questions[shard[0] - 1 :: shard[1]]
    ids = [question.id for question in questions]
    existing = read_own_predictions(path, header)
    if (
        existing is not None
        and sorted(existing.answers) == sorted(ids)
        and not any(a.failed for a in existing.answers.values())
    ):
        reporter.note(f"{path}: {len(ids)} of {len(ids)} answers are there already")
        return Predictions(header, {question_id: existing.answers[question_id] for question_id in ids}, 0)
    with lock_predictions(path), PredictionWriter(path, header) as writer:
        if foreign := set(writer.answers) - set(ids):
            raise UserError(f"{path}: answers question {min(foreign)}, which is not asked; delete the file")
        unanswered = [question for question in questions if question.id not in writer.answers]
        if len(unanswered) < len(questions):
            reporter.note(f"{path}: {len(questions) - len(unanswered)} of {len(questions)} answers are there already")
        if unanswered:
            _run_model(job, eval_model, unanswered, writer, reporter)
        elif not questions:  # with more shards than questions some are empty, and need a file for --merge
            writer.begin()
        return Predictions(header, {question_id: writer.answers[question_id] for question_id in ids}, 0)


def predictions_path(job: Job, eval_model: EvalModel, shard: tuple[int, int]) -> Path:
    """Returns the file of a shard's predictions: --predictions, or a file named after model, task, split and form.

    The part is added to the name when there are several shards, unless --predictions names the file of one --shard.
    """
    default = f"{eval_model.name}.{job.task.name}-{job.request.split}.{eval_model.model_form}.jsonl"
    path = job.options.predictions or Path(default)
    if shard == (1, 1) or (job.options.predictions is not None and job.options.shard == shard):
        return path
    return path.with_name(f"{path.stem}.{shard[0]}-of-{shard[1]}{path.suffix}")


def _run_model(
    job: Job, eval_model: EvalModel, questions: Sequence[Question], writer: PredictionWriter, reporter: Reporter
) -> None:
    """Opens the model and adds its answers to the file of predictions, batch by batch."""
    options = job.options
    with open_eval_model(eval_model, options.runtime, options.device, options.fast, options.batch) as model:
        batch = options.batch or model.manifest.limits.max_batch
        manner = AskSettings(job.max_new_tokens, job.task.choices, options.conversation, options.pad_square, batch)
        with reporter.stage(job.task.name) as stage:
            done = 0
            for answers in ask_all(model, questions, manner):
                writer.add(answers)
                done += len(answers)
                stage.fraction(done / len(questions))
                for answer in answers.values():
                    if answer.failed:
                        reporter.note(f"not asked: {answer.failed}")


def _score_and_submit(job: Job, predictions: Predictions, path: Path | None, seconds: float) -> Evaluation:
    """Scores the answers and writes the submission if there is to be one."""
    submission = job.options.submission
    if submission is not None and job.task.submission is not None:
        write_json(submission, job.task.submission(job.question_set, predictions.answers))
    return Evaluation(
        task=job.task.name,
        split=job.request.split,
        model_form=str(predictions.header.fingerprint["model_form"]),
        runtime=str(predictions.header.fingerprint["runtime"]),
        shard=predictions.header.shard,
        questions=len(job.questions),
        answers=len(predictions.answers),
        score=job.task.score(job.question_set, predictions.answers) if job.question_set.truth else None,
        failed={question_id: a.failed for question_id, a in predictions.answers.items() if a.failed},
        predictions=path,
        submission=submission,
        seconds=seconds,
    )
