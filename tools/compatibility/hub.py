"""Cases of downloads: a server on localhost imitates the Hub and counts the bytes of weights that it serves."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import qvlm_export
from tools.compatibility.case import Case, Outcome, run_command
from tools.compatibility.hub_server import Hub, run_hub

NAME = "someone/llava"
LOAD = """
import sys
from transformers import AutoModelForImageTextToText
try:
    AutoModelForImageTextToText.from_pretrained(sys.argv[1], **({"revision": sys.argv[2]} if sys.argv[2:] else {}))
    print("loads")
except Exception as error:
    print(f"{type(error).__name__}: {' '.join(str(error).split())[:90]}")
"""
Prepare = Callable[[Hub], Mapping[str, str] | None]


def make_case(title: str, prepare: Prepare, *, cached: bool = False, model: str = NAME, again: bool = False) -> Case:
    """A case of loading `model`, or exporting it.

    prepare: puts the Hub into the state of the case, and returns environment variables. cached: the model is downloaded
    before. again: the second run is what counts, with a Hub that works.
    """

    def run(folder: Path) -> Outcome:
        transformers = _measure(prepare, cached, again, lambda variables: _load(model, variables), folder / "a")
        ours = _measure(prepare, cached, again, lambda variables: _export(model, folder, variables), folder / "b", headers=1)
        return Outcome(transformers.replace(f"{folder}/", ""), ours.replace(f"{folder}/", ""))

    return Case(title, run)


def _measure(
    prepare: Prepare, cached: bool, again: bool, command: Callable[[Mapping[str, str]], str], home: Path, headers: int = 0
) -> str:
    """Runs a command with an empty cache in `home`; returns what it says, and the share of the weights that was served.

    headers: how many requests for headers come first, which are not cut.
    """
    with run_hub() as hub:
        folder = Path(qvlm_export.__file__).parent / "tiny"
        hub.add_folder(NAME, folder)
        variables = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        if cached:
            command(variables)
        changed = {**variables, **(prepare(hub) or {})}
        for cuts in hub.drops.values():
            cuts[:0] = [10**9] * headers
        if again:
            command(changed)
            hub.drops.clear()
        hub.served.clear()
        said = command(changed)
        share = hub.served_weights() / (folder / "model.safetensors").stat().st_size
        return f"{said.replace(hub.url, 'https://…')}; {share:.0%} of the weights served"


def _load(model: str, variables: Mapping[str, str]) -> str:
    process = subprocess.run(
        [sys.executable, "-c", LOAD, *model.split("@")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **variables},
    )
    return (process.stdout.strip().splitlines() or [f"exit code {process.returncode}"])[-1]


def _export(model: str, folder: Path, variables: Mapping[str, str], *more: str) -> str:
    name, *revision = model.split("@")
    arguments = ["--model", name, "--out", folder / "out" / "x.plan", "--backend", "onnx", "--scheme", "fp16", *more]
    if revision:
        arguments += ["--revision", *revision]
    return run_command("export", *arguments, variables=variables).in_words(folder)


def _dry_run(folder: Path) -> Outcome:
    def command(variables: Mapping[str, str]) -> str:
        return _export(NAME, folder, variables, "--dry-run")

    return Outcome("–", _measure(lambda _: None, False, False, command, folder / "home"))


def _drop_twice(hub: Hub) -> None:
    hub.drops["model.safetensors"] = [3_000_000, 1_000_000]


def _drop_for_good(hub: Hub) -> None:
    hub.drops["model.safetensors"] = [5_000_000] + [0] * 99


def _gate(hub: Hub) -> None:
    hub.repositories[NAME].gated = True


def _gate_with_token(hub: Hub) -> Mapping[str, str]:
    hub.repositories[NAME].gated, hub.tokens = True, {"hf_other"}
    return {"HF_TOKEN": "hf_other"}


def _cut_network(_: Hub) -> Mapping[str, str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return {"HF_ENDPOINT": f"http://127.0.0.1:{free.getsockname()[1]}"}


CASES: tuple[Case, ...] = (
    Case("`--dry-run` of a model on the Hub", _dry_run),
    make_case("the connection is cut twice", _drop_twice),
    make_case("the connection is lost at 70 %", _drop_for_good),
    make_case("the same command again, with a connection", _drop_for_good, again=True),
    make_case("a gated repository without a token", _gate),
    make_case("a gated repository that the token's account is not admitted to", _gate_with_token),
    make_case("a wrong token", lambda _: {"HF_TOKEN": "hf_wrong"}),
    make_case("a mistyped name", lambda _: None, model="someone/lava"),
    make_case("a revision that does not exist", lambda _: None, model=f"{NAME}@v2"),
    make_case("no network, the model in the cache", _cut_network, cached=True),
    make_case("no network, the model not in the cache", _cut_network),
    make_case("HF_HUB_OFFLINE=1, the model in the cache", lambda _: {"HF_HUB_OFFLINE": "1"}, cached=True),
)
