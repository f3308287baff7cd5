"""ScienceQA (Lu et al., NeurIPS 2022): multiple choice with lettered options, scored by accuracy.

Reads the official files, words the prompts as LLaVA's question files do, finds the letter in a generated answer, and
averages by the columns of the paper's table.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from qvlm_export.calibrate.errors import UserError
from qvlm_export.evaluation.tasks.task import (
    Answers,
    Question,
    QuestionSet,
    Request,
    Score,
    Task,
    average_columns,
    find_file,
    find_folder,
    find_list,
    read_json,
    require_questions,
    validate_entry,
)

LETTERS = "ABCDE"
LAYOUT = "problems.json, pid_splits.json and images/<split>/<id>/image.png"
ASK_FOR_LETTER = "\nAnswer with the option's letter from the given choices directly."
SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
COLUMNS = ("NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12", "Avg")

# Tried in this order; each captures the letter of an option. The first must match the whole answer, the second its start.
_PATTERNS = tuple(
    re.compile(pattern)
    for pattern in (
        r"\A\s*\(?([A-E])\)?\.?\s*\Z",
        r"\A\s*\(?([A-E])(?:[.)]\s|\n)",
        r"The answer is \(?([A-E])\b",
        r"ANSWER: \(?([A-E])\b",
    )
)


class Problem(BaseModel):
    """An entry of problems.json, without the fields that neither prompt nor score needs."""

    model_config = ConfigDict(extra="ignore", strict=True)
    question: str
    choices: list[str] = Field(min_length=1, max_length=len(LETTERS))
    answer: int = Field(ge=0)
    hint: str
    image: str | None
    grade: str = Field(pattern=r"^grade(\d|1[0-2])$")
    subject: str
    split: str | None = None


def read(request: Request) -> QuestionSet:
    """Reads the problems of a split, in the order of pid_splits.json; their truth is the `Problem`.

    Raises UserError for files that are missing or wrong, or that do not belong together.
    """
    problems_file = find_file(request.data, ("problems.json",), LAYOUT)
    splits_file = find_file(request.data, ("pid_splits.json",), LAYOUT)
    problems, splits = read_json(problems_file), read_json(splits_file)
    if not isinstance(problems, dict) or not isinstance(splits, dict):
        raise UserError(f"{problems_file}: holds no object of problems by id; is it the official file?")
    ids = [str(problem_id) for problem_id in find_list(splits.get(request.split, []), None, splits_file)]
    if missing := [problem_id for problem_id in ids if problem_id not in problems]:
        raise UserError(
            f"{splits_file}: names problem {missing[0]} ({len(missing)} in all), which {problems_file.name} has not; "
            "the two files do not belong together"
        )
    truth = {i: _validate_problem(problems[i], f"{problems_file}: problem {i}") for i in ids}
    images = {problem_id: _image_path(request, problem_id, problem) for problem_id, problem in truth.items()}
    prompts = {problem_id: make_prompt(problem, request.form) for problem_id, problem in truth.items()}
    files: tuple[Path, ...] = (problems_file, splits_file)
    if request.questions is not None:
        files, prompts = (*files, request.questions), _read_prompts(request.questions, truth, request.form)
    questions = tuple(Question(i, prompts[i], images[i]) for i in ids)
    require_questions(questions, splits_file, request.split)
    if any(images.values()):
        find_folder(request.data, ("images",), LAYOUT)
    return QuestionSet(questions, truth, files)


def _validate_problem(content: Any, where: str) -> Problem:
    problem = validate_entry(Problem, content, where)
    if problem.answer >= len(problem.choices):
        raise UserError(f"{where}: answer {problem.answer} is none of its {len(problem.choices)} choices")
    if problem.subject not in SUBJECTS:
        raise UserError(f"{where}: subject is {problem.subject!r}; the official ones are {', '.join(SUBJECTS)}")
    return problem


def _image_path(request: Request, problem_id: str, problem: Problem) -> Path | None:
    """Returns the path of a problem's image, or None; the images of the splits minival and minitest are in val and test."""
    if not problem.image:
        return None
    return request.data / "images" / (problem.split or request.split) / problem_id / problem.image


def make_prompt(problem: Problem, form: str) -> str:
    """Returns the prompt as in LLaVA's question files.

    form: v1.3 is QCM (question, context, options); v1.5 is CQM (context, question, options), and asks for the letter alone.
    """
    lettered, hint = list(zip(LETTERS, problem.choices, strict=False)), problem.hint.strip()
    if form == "v1.3":
        options = " ".join(f"({letter}) {choice}" for letter, choice in lettered)
        text = f"{problem.question}\nContext: {hint or 'N/A'}\nOptions: {options}"
    else:
        options = "\n".join(f"{letter}. {choice}" for letter, choice in lettered)
        text = f"Context: {hint}\n{problem.question}\n{options}" if hint else f"{problem.question}\n{options}"
    return text.replace("  ", " ").strip() + (ASK_FOR_LETTER if form == "v1.5" else "")


def _read_prompts(path: Path, truth: dict[str, Problem], form: str) -> dict[str, str]:
    """Reads prompts from LLaVA's question file, a list of {id, image, conversations}: the first turn of each conversation.

    Raises UserError when the file does not hold exactly the problems of `truth`.
    """
    prompts: dict[str, str] = {}
    for number, entry in enumerate(find_list(read_json(path), None, path)):
        try:
            problem_id, text = str(entry["id"]), str(entry["conversations"][0]["value"])
        except (KeyError, IndexError, TypeError) as error:
            raise UserError(f"{path}: entry {number} has no id and conversations; is it LLaVA's question file?") from error
        if problem_id in prompts:
            raise UserError(f"{path}: question {problem_id} stands twice; make the file again")
        prompts[problem_id] = text.replace("<image>", "").strip() + (ASK_FOR_LETTER if form == "v1.5" else "")
    if differing := set(truth) ^ set(prompts):
        raise UserError(f"{path}: and the split differ in {len(differing)} questions, such as {min(differing)}")
    return prompts


def parse(text: str, choices: int) -> int | None:
    """Returns the index of the option that an answer names; None when it names none, or one that does not exist.

    Accepted are `B`, `B. …`, `The answer is B.` and `ANSWER: B.`, with or without parentheses. choices: how many options
    there are.
    """
    for pattern in _PATTERNS:
        if match := pattern.search(text):
            index = LETTERS.index(match[1])
            return index if index < choices else None
    return None


def score(question_set: QuestionSet, answers: Answers) -> Score:
    """Scores answers by accuracy, for each column of the paper's table; unparsed answers count as wrong."""
    correct: dict[str, list[float]] = {column: [] for column in COLUMNS}
    unparsed = 0
    for question_id, answer in answers.items():
        problem: Problem = question_set.truth[question_id]
        chosen = None if answer.failed else parse(answer.text, len(problem.choices))
        unparsed += chosen is None and not answer.failed
        for column in columns_of(problem):
            correct[column].append(float(chosen == problem.answer))
    return average_columns(correct, unparsed)


def columns_of(problem: Problem) -> list[str]:
    """Returns the columns in which a problem counts: its subject, its contexts (text, image or none), grades, average."""
    contexts = [name for name, context in (("TXT", problem.hint), ("IMG", problem.image)) if context] or ["NO"]
    grade = "G1-6" if int(problem.grade.removeprefix("grade")) <= 6 else "G7-12"
    return [SUBJECTS[problem.subject], *contexts, grade, "Avg"]


SCIENCEQA = Task(
    name="scienceqa",
    splits=("test", "val", "train", "minitest", "minival", "minitrain", "trainval"),
    layout=LAYOUT,
    main="Avg",
    read=read,
    score=score,
    max_new_tokens={"v1.5": 16, "v1.3": 1024},
    own_questions=True,
)
