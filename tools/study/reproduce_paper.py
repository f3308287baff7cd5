"""Reproduces the ScienceQA table of Q-VLM (arXiv 2410.08119): float, W8A8, W6A6 and W4A4, method by method.

    python -m tools.tiny.make_eval_sets --out build/tiny-eval
    python -m tools.study.reproduce_paper --model tiny --data build/tiny-eval/scienceqa --max-new-tokens 32
    python -m tools.study.reproduce_paper --model llava-v1.3-7b --data ScienceQA --work paper --conversation llava_v1 \\
        --device cuda

Each cell calibrates on images and answers of the train split, writes a calibrated checkpoint and runs it with fake
quantization in torch on all questions of the test split (`qvlm-eval --model-form fake-quant`). A run that was killed
continues where it stopped: finished checkpoints and answers stay in --work, under names that hash everything they depend on.
docs/reproduction.md says what to download.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qvlm_export.calibrate.blockwise.blocks import make_blocks
from qvlm_export.calibrate.blockwise.job import CalibrationJob
from qvlm_export.calibrate.checkpoint.calibrated import CalibratedWriter
from qvlm_export.calibrate.checkpoint.files import write_json
from qvlm_export.calibrate.checkpoint.safetensors_source import INDEX_FILE
from qvlm_export.calibrate.checkpoint.samples import Sample
from qvlm_export.calibrate.errors import UserError
from qvlm_export.checkpoints.chat_templates import CHOICES, OWN, prompt_text
from qvlm_export.checkpoints.checkpoint import Checkpoint, open_checkpoint
from qvlm_export.evaluation.ask import pad_to_square
from qvlm_export.evaluation.eval_model import checkpoint_identity
from qvlm_export.evaluation.evaluate import EvalOptions, evaluate
from qvlm_export.evaluation.tasks.scienceqa import LETTERS, SCIENCEQA
from qvlm_export.evaluation.tasks.task import FORMS, Request
from qvlm_export.inputs.images import open_image
from qvlm_export.inputs.samples import encode_answered, load_processor
from qvlm_export.pipeline.fetch import fetch_weights
from qvlm_export.pipeline.progress import Reporter
from tools.bench.ours import ROWS, schemes_of

COLUMNS = ("W8A8", "W6A6", "W4A4")
METHODS = ("rtn", "awq", "qvlm", "fast", "full")
LINES = {row.name: row.line for row in ROWS}

# ScienceQA averages of arXiv 2410.08119, by model, method and column.
PUBLISHED: dict[str, dict[str, dict[str, float]]] = {
    "LLaVA-v1.3-7B": {
        "FP": {"FP": 89.81},
        "AWQ": {"W6A6": 86.23, "W4A4": 74.02},
        "QLoRA": {"W6A6": 88.43, "W4A4": 77.53},
        "Q-VLM": {"W6A6": 89.34, "W4A4": 79.79},
    },
    "LLaVA-v1.3-13B": {
        "FP": {"FP": 90.00},
        "AWQ": {"W8A8": 88.94, "W6A6": 87.57, "W4A4": 77.91},
        "QLoRA": {"W8A8": 89.32, "W6A6": 88.87, "W4A4": 78.64},
        "Q-VLM": {"W8A8": 89.82, "W6A6": 89.70, "W4A4": 80.78},
    },
    "LLaVA-v1.5-7B": {"FP": {"FP": 66.79}, "Q-VLM": {"W6A6": 66.67, "W4A4": 57.70}},
    "LLaVA-v1.5-13B": {"FP": {"FP": 71.61}, "Q-VLM": {"W6A6": 72.27, "W4A4": 68.84}},
}


@dataclass(frozen=True)
class Setting:
    """Settings that all cells of a table share.

    form: of the prompts, as in qvlm-eval. device: of the evaluation. float_vision: tower and projector stay float.
    """

    model: str
    data: Path
    work: Path
    form: str
    conversation: str
    pad_square: bool
    samples: int
    limit: int | None
    max_new_tokens: int | None
    device: str
    float_vision: bool


def calibration_samples(setting: Setting, checkpoint: Checkpoint) -> list[Sample]:
    """The first questions of the train split that have an image, encoded with the right answer.

    Raises UserError if there are fewer than `setting.samples`.
    """
    train = SCIENCEQA.read(Request(setting.data, "train", setting.form))
    questions = [question for question in train.questions if question.image is not None][: setting.samples]
    if len(questions) < setting.samples:
        raise UserError(f"--samples {setting.samples}: the train split has {len(questions)} problems with a picture")
    processor = load_processor(checkpoint.folder)
    samples = []
    for question in questions:
        letter = LETTERS[train.truth[question.id].answer]
        answer = f"The answer is {letter}." if setting.form == "v1.3" else letter
        where = f"train {question.id}"
        image = open_image(question.image, where)
        images = [pad_to_square(image, processor) if setting.pad_square else image]
        text = prompt_text(processor, question.prompt, 1, setting.conversation)
        samples.append(encode_answered(processor, checkpoint.config, text, answer, images, where=where))
    return samples


def calibrated_folder(setting: Setting, checkpoint: Checkpoint, samples: Sequence[Sample], method: str, column: str) -> Path:
    """Folder of the calibrated checkpoint of a cell, which is made unless it exists."""
    dependencies = [checkpoint_identity(checkpoint), method, column, setting.form, setting.conversation, setting.pad_square]
    dependencies += [setting.samples, setting.float_vision, file_hash(setting.data / "problems.json")]
    dependencies += [importlib.metadata.version("qvlm-export")]
    folder = setting.work / f"{method}-{column}-{hashlib.sha256(json.dumps(dependencies).encode()).hexdigest()[:12]}"
    if (folder / INDEX_FILE).exists():
        return folder
    blocks = make_blocks(checkpoint.hf_config)
    schemes = schemes_of(checkpoint, blocks, column)
    if setting.float_vision:
        schemes = {name: scheme for name, scheme in schemes.items() if name.startswith("language_model.")}
    job = CalibrationJob(blocks, checkpoint.source, schemes, samples)
    load_processor(checkpoint.folder).save_pretrained(folder)
    writer = CalibratedWriter(folder)
    calibrator = next(row.calibrator for row in ROWS if row.name == method)
    torch.manual_seed(0)
    with Reporter().stage(f"{method} {column}") as stage:
        summary = calibrator(job, writer, lambda done, total, _: stage.fraction(done / total))
    writer.finish(checkpoint.config_json, summary)
    return folder


def file_hash(path: Path) -> str:
    """SHA-256 of the file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def ask(setting: Setting, model: str, name: str) -> dict[str, Any]:
    """The summary of `qvlm-eval` on the model; answers are stored as NAME.jsonl in the work folder."""
    options = EvalOptions(
        model, "scienceqa", setting.data, form=setting.form, conversation=setting.conversation,
        pad_square=setting.pad_square, limit=setting.limit, max_new_tokens=setting.max_new_tokens,
        device=setting.device, predictions=setting.work / f"{name}.jsonl",
    )  # fmt: skip
    evaluation = evaluate(options, Reporter())
    if evaluation is None:  # in all processes of torchrun but the first
        raise UserError("start this program without torchrun: it runs in one process")
    return evaluation.summary()


def run(setting: Setting, methods: Sequence[str], columns: Sequence[str]) -> list[dict[str, Any]]:
    """All cells, the float model first: method, column, seconds of calibration, and the summary of qvlm-eval."""
    checkpoint = open_checkpoint(setting.model)
    SCIENCEQA.read(
        Request(setting.data, "test", setting.form)
    )  # so that a mistake in the data shows before hours of calibration
    checkpoint = fetch_weights(checkpoint, Reporter())
    samples = calibration_samples(setting, checkpoint)
    setting.work.mkdir(parents=True, exist_ok=True)
    cells = [{"method": "float", "column": "FP", **ask(setting, setting.model, f"float-{identity(setting, checkpoint)}")}]
    for method in methods:
        for column in columns:
            began = time.monotonic()
            folder = calibrated_folder(setting, checkpoint, samples, method, column)
            seconds = time.monotonic() - began
            summary = ask(setting, str(folder), f"{folder.name}-answers-{identity(setting, checkpoint)}")
            cells.append({"method": method, "column": column, "calibration_seconds": seconds, **summary})
            print(f"{LINES[method]}, {column}: {100 * summary['metrics']['Avg']:.2f}", flush=True)
    return cells


def identity(setting: Setting, checkpoint: Checkpoint) -> str:
    """Hash of all that answers depend on besides the calibrated weights, such as --limit and --form."""
    parts = [checkpoint_identity(checkpoint), setting.form, setting.conversation, setting.pad_square, setting.limit]
    parts += [setting.max_new_tokens, setting.device, file_hash(setting.data / "problems.json")]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def table(cells: Sequence[dict[str, Any]], model: str) -> str:
    """Markdown table of ScienceQA averages in percent: those measured here, then the published ones."""
    columns = [column for column in ("FP", *COLUMNS) if any(cell["column"] == column for cell in cells)]
    lines = [f"| {model} | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for method in dict.fromkeys(cell["method"] for cell in cells):
        averages = {c["column"]: f"{100 * c['metrics']['Avg']:.2f}" for c in cells if c["method"] == method}
        lines.append(f"| {LINES.get(method, method)} | {' | '.join(averages.get(column, '') for column in columns)} |")
    for published, rows in PUBLISHED.items():
        for method, values in rows.items():
            entries = [f"{values[column]:.2f}" if column in values else "" for column in columns]
            lines.append(f"| published: {published}, {method} | {' | '.join(entries)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="as in qvlm-export")
    parser.add_argument("--data", type=Path, required=True, help="ScienceQA: problems.json, pid_splits.json, images/")
    parser.add_argument("--work", type=Path, default=Path("build/paper"), help="calibrated checkpoints and answers")
    parser.add_argument("--methods", nargs="+", metavar="ROW", choices=[row.name for row in ROWS], default=METHODS)
    parser.add_argument("--columns", nargs="+", choices=COLUMNS, default=COLUMNS)
    parser.add_argument("--form", choices=FORMS, default="v1.3")
    parser.add_argument("--conversation", choices=CHOICES, default=OWN)
    parser.add_argument("--pad-square", action="store_true")
    parser.add_argument("--samples", type=int, default=64, help="of the train split, for calibration")
    parser.add_argument("--limit", type=int, help="only the first test questions")
    parser.add_argument("--max-new-tokens", type=int, help="of an answer; the default depends on --form")
    parser.add_argument("--device", default="auto", help="of the evaluation: auto, cpu or cuda; calibration runs on the CPU")
    parser.add_argument(
        "--float-vision", action="store_true", help="leave tower and projector float, as the public code does"
    )
    parser.add_argument("--out", type=Path, help="write all cells as JSON")
    args = parser.parse_args()
    setting = Setting(
        args.model, args.data, args.work, args.form, args.conversation, args.pad_square, args.samples, args.limit,
        args.max_new_tokens, args.device, args.float_vision,
    )  # fmt: skip
    try:
        cells = run(setting, args.methods, args.columns)
    except UserError as error:
        raise SystemExit(f"error: {' '.join(str(error).split())}") from None
    print(f"\n{table(cells, args.model)}")
    if args.out is not None:
        keys = ("method", "column", "metrics", "counts", "unparsed", "questions", "answers")
        write_json(args.out, [{key: cell[key] for key in keys} for cell in cells])


if __name__ == "__main__":
    main()
