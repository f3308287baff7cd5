"""ScienceQA (Lu et al., NeurIPS 2022): multiple choice with lettered options; its files, prompts, parsing and columns."""

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
    by_group,
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

# In the order they are tried; each names the letter. The first two must be the whole answer or begin it.
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
    """One entry of problems.json; what scoring does not need is left out."""

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
    """The problems of a split in the order of pid_splits.json. Raises UserError for files that do not belong together."""
    problems_file = find_file(request.data, ("problems.json",), LAYOUT)
    splits_file = find_file(request.data, ("pid_splits.json",), LAYOUT)
    problems, splits = read_json(problems_file), read_json(splits_file)
    if not isinstance(problems, dict) or not isinstance(splits, dict):
        raise UserError(f"{problems_file}: holds no object of problems by id; is it the official file?")
    ids = [str(one) for one in find_list(splits.get(request.split, []), None, splits_file)]
    if missing := [one for one in ids if one not in problems]:
        raise UserError(
            f"{splits_file}: names problem {missing[0]} ({len(missing)} in all), which {problems_file.name} has not; "
            "the two files do not belong together"
        )
    truth = {one: _problem(problems[one], f"{problems_file}: problem {one}") for one in ids}
    images = {one: _image(request, one, p) for one, p in truth.items()}
    prompts = {one: prompt_of(problem, request.form) for one, problem in truth.items()}
    files: tuple[Path, ...] = (problems_file, splits_file)
    if request.questions is not None:
        files, prompts = (*files, request.questions), _own_prompts(request.questions, truth, request.form)
    questions = tuple(Question(one, prompts[one], images[one]) for one in ids)
    require_questions(questions, splits_file, request.split)
    if any(images.values()):
        find_folder(request.data, ("images",), LAYOUT)
    return QuestionSet(questions, truth, files)


def _problem(content: Any, where: str) -> Problem:
    problem = validate_entry(Problem, content, where)
    if problem.answer >= len(problem.choices):
        raise UserError(f"{where}: answer {problem.answer} is none of its {len(problem.choices)} choices")
    if problem.subject not in SUBJECTS:
        raise UserError(f"{where}: subject is {problem.subject!r}; the official ones are {', '.join(SUBJECTS)}")
    return problem


def _image(request: Request, one: str, problem: Problem) -> Path | None:
    """The splits minival and minitest have their pictures in val and test."""
    if not problem.image:
        return None
    return request.data / "images" / (problem.split or request.split) / one / problem.image


def prompt_of(problem: Problem, form: str) -> str:
    """As in LLaVA's question files: v1.3 is QCM (question, context, options), v1.5 is CQM, and asks for the letter alone."""
    lettered, hint = list(zip(LETTERS, problem.choices, strict=False)), problem.hint.strip()
    if form == "v1.3":
        options = " ".join(f"({letter}) {choice}" for letter, choice in lettered)
        text = f"{problem.question}\nContext: {hint or 'N/A'}\nOptions: {options}"
    else:
        options = "\n".join(f"{letter}. {choice}" for letter, choice in lettered)
        text = f"Context: {hint}\n{problem.question}\n{options}" if hint else f"{problem.question}\n{options}"
    return text.replace("  ", " ").strip() + (ASK_FOR_LETTER if form == "v1.5" else "")


def _own_prompts(path: Path, truth: dict[str, Problem], form: str) -> dict[str, str]:
    """The first turns of LLaVA's question file: a list of {id, image, conversations}."""
    prompts: dict[str, str] = {}
    for number, entry in enumerate(find_list(read_json(path), None, path)):
        try:
            one, text = str(entry["id"]), str(entry["conversations"][0]["value"])
        except (KeyError, IndexError, TypeError) as error:
            raise UserError(f"{path}: entry {number} has no id and conversations; is it LLaVA's question file?") from error
        if one in prompts:
            raise UserError(f"{path}: question {one} stands twice; make the file again")
        prompts[one] = text.replace("<image>", "").strip() + (ASK_FOR_LETTER if form == "v1.5" else "")
    if differing := set(truth) ^ set(prompts):
        raise UserError(f"{path}: and the split differ in {len(differing)} questions, such as {min(differing)}")
    return prompts


def parse(text: str, choices: int) -> int | None:
    """The option that an answer names, None for one that names none or one that is not there.

    Taken are `B`, `B. …`, `The answer is B.` and `ANSWER: B.`, with or without parentheses.
    """
    for pattern in _PATTERNS:
        if found := pattern.search(text):
            index = LETTERS.index(found[1])
            return index if index < choices else None
    return None


def score(given: QuestionSet, answers: Answers) -> Score:
    """Accuracy by the columns of the paper's table; unparsed answers are wrong."""
    right: dict[str, list[float]] = {column: [] for column in COLUMNS}
    unparsed = 0
    for one, answer in answers.items():
        problem: Problem = given.truth[one]
        chosen = None if answer.failed else parse(answer.text, len(problem.choices))
        unparsed += chosen is None and not answer.failed
        for column in columns_of(problem):
            right[column].append(float(chosen == problem.answer))
    return by_group(right, unparsed)


def columns_of(problem: Problem) -> list[str]:
    """Subject, contexts, grades, average: a problem with hint and picture counts in both."""
    contexts = [name for name, there in (("TXT", problem.hint), ("IMG", problem.image)) if there] or ["NO"]
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
