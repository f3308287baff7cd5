"""Compatibility cases of damage, on the tiny model: files in the way, kills, links, edited manifests, the system's refusals.

Where transformers has the same step, its side saves a model or loads one in the same situation.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoProcessor

from qvlm_export.calibrate.errors import DAMAGED_FILE_ERRORS
from qvlm_export.checkpoints.files.hub_errors import first_line
from qvlm_export.engines.manifest import seal
from qvlm_export.pipeline import publish
from tools.compatibility.case import COMMANDS, Case, Outcome, run_command

TINY = Path(str(files("qvlm_export") / "tiny"))
NONE = "–"  # transformers has no such step
EXPORT = ("--model", "tiny", "--backend", "onnx", "--scheme", "fp16")
ASK = ("--prompt", "How many objects are there?", "--max-new-tokens", "4")


def _export(folder: Path, *arguments: object, name: str = "x.plan") -> str:
    """Exports to `folder`; returns exit code and error."""
    return run_command("export", *EXPORT, "--out", folder / name, *arguments).in_words(folder)


def _save_over(folder: Path, name: str) -> str:
    """Has transformers save the processor into a folder where the user has a file of the name; returns what became of it."""
    target = folder / "saved"
    target.mkdir()
    (target / name).write_text("mine")
    AutoProcessor.from_pretrained(TINY).save_pretrained(target)
    return "saved, the file is overwritten" if (target / name).read_text() != "mine" else "saved, the file is kept"


def _try(action: Callable[[], object]) -> str:
    try:
        action()
    except DAMAGED_FILE_ERRORS as error:
        return f"{type(error).__name__}: {first_line(error)[:100]}"
    return "loads"


def _foreign_file(folder: Path) -> Outcome:
    (folder / "x.onnx.data").write_text("mine")
    words = _export(folder)
    kept = "kept" if (folder / "x.onnx.data").read_text() == "mine" else "lost"
    return Outcome(_save_over(folder, "tokenizer_config.json"), f"{words}; the file is {kept}")


def _foreign_folder(folder: Path) -> Outcome:
    (folder / "x.calibrated").mkdir()
    (folder / "x.calibrated" / "diary.txt").write_text("mine")
    words = _export(folder)
    return Outcome(NONE, f"{words}; the folder is {'kept' if (folder / 'x.calibrated' / 'diary.txt').exists() else 'lost'}")


def _own_export(folder: Path) -> Outcome:
    return Outcome(NONE, f"{_export(folder)}, again: {_export(folder)}")


def _other_export(folder: Path) -> Outcome:
    return Outcome(NONE, f"x: {_export(folder)}; x.vision: {_export(folder, name='x.vision.plan')}")


def _cannot_be_replaced(folder: Path) -> Outcome:
    """A rename that fails, as that of an immutable file; the older export must be whole."""
    _export(folder)
    before = {path.name: path.read_bytes() for path in folder.glob("x.*") if path.is_file()}
    moves = [publish.Move(None, folder / name, folder / "old" / name) for name in sorted(before) if name != "x.json"] + [
        publish.Move(None, folder / "x.json", folder / "old" / "x.json")
    ]

    def move(source: Path, target: Path) -> None:
        if source.name == "x.onnx":
            raise PermissionError(errno.EPERM, "Operation not permitted")
        os.replace(source, target)

    try:
        publish.publish(moves, move)
    except publish.UnfinishedError as error:
        words = str(error).replace(f"{folder}/", "")
    whole = before == {path.name: path.read_bytes() for path in folder.glob("x.*") if path.is_file()}
    return Outcome(NONE, f"refused: {words}; the older export is {'whole' if whole else 'damaged'}")


def _killed(folder: Path) -> Outcome:
    """Kills exports with --work-dir after a growing time, and resumes each."""
    kills = 0
    for number in range(10):
        out = folder / str(number)
        arguments = (*EXPORT[:4], "--samples", 2, "--out", out / "x.plan", "--work-dir", out / "work")
        program = [sys.executable, "-c", COMMANDS.format(name="export"), *map(str, arguments)]
        with subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and len(list(out.rglob("*"))) < 4 * number + 4:
                time.sleep(0.001)
            process.kill()
        kills += process.returncode == -signal.SIGKILL
        resumed, verified = run_command("export", *arguments, "--resume"), run_command("inspect", out / "x.plan", "--verify")
        if resumed.code or verified.code or [p.name for p in (out / "work").iterdir()] != ["calibrated"]:
            return Outcome(NONE, f"killed as it had {4 * number + 4} files: {resumed.in_words(folder)}")
    return Outcome(NONE, f"killed {kills} times: each resumed and verified, nothing left over")


def link_into_store(source: Path, store: Path) -> Path:
    """Copies files into a folder of blobs, named by hash; returns a folder of links to them, as the Hub's cache has it."""
    snapshot = store / "snapshots" / "main"
    for path in sorted(path for path in source.rglob("*") if path.is_file()):
        blob = store / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        link = snapshot / path.relative_to(source)
        for folder in (blob.parent, link.parent):
            folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def hard_link(source: Path, folder: Path) -> Path:
    """Returns a copy of a folder whose files are hard links."""
    shutil.copytree(source, folder, copy_function=os.link)
    return folder


def _links(link: Callable[[Path, Path], Path]) -> Callable[[Path], Outcome]:
    def run(folder: Path) -> Outcome:
        _export(folder / "export")
        seen = link(folder / "export", folder / "seen")
        shutil.copytree(TINY, folder / "model")
        model = link(folder / "model", folder / "model-seen")
        answer = run_command("run", seen / "x.plan", *ASK)
        theirs = _try(lambda: (AutoConfig.from_pretrained(model), AutoProcessor.from_pretrained(model)))
        return Outcome(f"a checkpoint {theirs}", f"{answer.in_words(folder)}: {answer.stdout.strip()}")

    return run


def _edited(edit: Callable[[dict[str, Any]], None]) -> Callable[[Path], Outcome]:
    def run(folder: Path) -> Outcome:
        _export(folder)
        content = json.loads((folder / "x.json").read_text())
        edit(content)
        (folder / "x.json").write_text(json.dumps(seal(content)))
        return Outcome(NONE, run_command("run", folder / "x.plan", *ASK).in_words(folder))

    return run


def _nested(folder: Path) -> Outcome:
    shutil.copytree(TINY, folder / "model")
    path = folder / "model" / "config.json"
    path.write_text(path.read_text().replace("{", '{"x": ' + "[" * 700 + "]" * 700 + ",", 1))
    ours = run_command("export", "--model", folder / "model", "--backend", "onnx", "--out", folder / "x.plan")
    return Outcome(_try(lambda: repr(AutoConfig.from_pretrained(folder / "model"))), ours.in_words(folder))


def _small_files(folder: Path) -> Outcome:
    """Both sides write under a limit for the size of files."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100 * 1024, limit[1]))
    try:
        processor = AutoProcessor.from_pretrained(TINY)
        theirs, ours = _try(lambda: processor.save_pretrained(folder / "saved")), _export(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    return Outcome(theirs.replace("loads", "saved"), f"{ours}; left over: {sorted(p.name for p in folder.glob('*x.*'))}")


def _option(*arguments: str) -> Callable[[Path], Outcome]:
    return lambda folder: Outcome(NONE, _export(folder, *arguments)[:200])


def _set_outside_name(content: dict[str, Any]) -> None:
    content["files"]["language_onnx"]["name"] = "../x.onnx"


def _set_layers(content: dict[str, Any]) -> None:
    content["config"]["text"]["num_layers"] = 10**9


CASES: tuple[Case, ...] = (
    Case("a file of the user's stands where an output goes (X.onnx.data)", _foreign_file),
    Case("a folder of the user's stands there (X.calibrated), though this export writes none", _foreign_folder),
    Case("an intact export is exported again", _own_export),
    Case("`--out x.vision.plan` beside the export x", _other_export),
    Case("a file of the older export cannot be replaced", _cannot_be_replaced),
    Case("an export with `--work-dir` is killed anywhere", _killed),
    Case("files are symbolic links into a store", _links(link_into_store)),
    Case("files are hard links", _links(hard_link)),
    Case("a manifest edited and sealed again names a file outside the folder", _edited(_set_outside_name)),
    Case("a manifest edited and sealed again has a billion layers", _edited(_set_layers)),
    Case("JSON nested 700 deep in config.json", _nested),
    Case("`--memory inf`", _option("--memory", "inf")),
    Case("`--max-batch 10^18`", _option("--max-batch", "1" + "0" * 18)),
    Case("a file of 100 KiB at most, `ulimit -f`", _small_files),
)
