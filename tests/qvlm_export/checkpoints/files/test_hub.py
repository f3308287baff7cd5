"""Models on the Hub: what is downloaded to find them, what pins them, and a sentence for every refusal."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

from qvlm_export.calibrate.errors import UserError
from qvlm_export.checkpoints.files.hub import find_checkpoint
from qvlm_export.checkpoints.files.hub_errors import explain_hub_error
from qvlm_export.checkpoints.files.snapshot import MAX_SETTINGS_BYTES, find_blob, find_origin
from tools.compatibility.hub_server import Hub, Repository

COMMIT, OLDER = "1" * 40, "2" * 40
FILES = {
    "config.json": b"{}",
    "tokenizer.model": b"t" * 30_000,  # a large file of the Hub, which is no weight
    "additional_chat_templates/short.jinja": b"{{ messages }}",
    "model.safetensors": b"w" * 50_000,
    "pytorch_model.bin": b"w" * 50_000,
    "original/consolidated.00.pth": b"w" * 50_000,
    "original/params.json": b"{}",
    "onnx/config.json": b"{}",
    "model.gguf": b"w" * 50_000,
    "trainer_state.json": b"{}",
    "modeling_llava.py": b"raise SystemExit",
}


@pytest.fixture
def repository(hub: Hub) -> Repository:
    """`someone/llava`, which has a tag."""
    hub.repositories["someone/llava"] = Repository(dict(FILES), COMMIT, {"v1": OLDER})
    return hub.repositories["someone/llava"]


def local_files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def set_token(monkeypatch: pytest.MonkeyPatch, token: str = "hf_wrong") -> None:
    monkeypatch.setenv("HF_TOKEN", token)


# What is downloaded


def test_only_configuration_and_tokenizer_are_downloaded(hub: Hub, repository: Repository) -> None:  # noqa: ARG001
    location = find_checkpoint("someone/llava")
    assert local_files(location.folder) == {"config.json", "tokenizer.model", "additional_chat_templates/short.jinja"}
    assert hub.served_weights() == 0
    assert location.snapshot is not None
    assert (location.snapshot.repository, location.snapshot.commit) == ("someone/llava", COMMIT)
    assert location.snapshot.files["model.safetensors"].size == 50_000
    assert find_origin(location.folder) == ("someone/llava", COMMIT)
    for name in ("tokenizer.model", "config.json"):
        assert find_blob(location.folder / name) == location.snapshot.files[name].blob
    assert location.snapshot.files["tokenizer.model"].sha256 == find_blob(location.folder / "tokenizer.model")


def test_an_alias_names_a_repository(hub: Hub) -> None:
    hub.repositories["llava-hf/llava-1.5-7b-hf"] = Repository({"config.json": b"{}"})
    snapshot = find_checkpoint("llava-7b").snapshot
    assert snapshot is not None
    assert snapshot.repository == "llava-hf/llava-1.5-7b-hf"


@pytest.mark.usefixtures("repository")
@pytest.mark.parametrize(("revision", "commit"), [(None, COMMIT), ("main", COMMIT), ("v1", OLDER), (OLDER, OLDER)])
def test_a_revision_pins_the_commit(revision: str | None, commit: str) -> None:
    location = find_checkpoint("someone/llava", revision)
    assert location.snapshot is not None
    assert (location.snapshot.commit, location.folder.name) == (commit, commit)


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("model", ["tiny", "{tmp}"])
def test_a_revision_of_a_local_model_is_refused(tmp_path: Path, model: str) -> None:
    with pytest.raises(UserError, match=r"--revision v1: .* is a local folder; leave it out"):
        find_checkpoint(model.format(tmp=tmp_path), "v1")


@pytest.mark.usefixtures("repository")
@pytest.mark.parametrize("revision", ["", "../../x", "a b", "-x", "/main", "main/", "x~1", "x^", "a:b", "\0", "x\n"])
def test_a_name_that_git_does_not_allow_for_a_revision_is_refused(hub: Hub, revision: str) -> None:
    with pytest.raises(UserError, match="is no name of a branch, tag or commit"):
        find_checkpoint("someone/llava", revision)
    assert hub.requests == []


def test_a_settings_file_of_gigabytes_is_refused(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qvlm_export.checkpoints.files.snapshot.MAX_SETTINGS_BYTES", 20_000)
    assert MAX_SETTINGS_BYTES > 10 * 20_000_000
    with pytest.raises(UserError, match=r"its tokenizer.model has 30000 bytes, so it is no tokenizer.model"):
        find_checkpoint("someone/llava")
    assert len(repository.files) == len(FILES)


# The cache


def no_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ARG001
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")


def offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ARG001
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def server_trouble(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ARG001
    hub.failures = [503] * 50


def lost_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories["someone/llava"].private = True
    set_token(monkeypatch)


@pytest.mark.usefixtures("repository")
@pytest.mark.parametrize("revision", [None, "v1", OLDER])
@pytest.mark.parametrize("trouble", [no_network, offline, server_trouble, lost_token])
def test_what_is_in_the_cache_needs_no_hub(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, trouble: Callable[..., None], revision: str | None
) -> None:
    before = find_checkpoint("someone/llava", revision)
    trouble(hub, monkeypatch)
    after = find_checkpoint("someone/llava", revision)
    assert (after.folder, after.snapshot and after.snapshot.files) == (before.folder, {})


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        (no_network, ["cannot be downloaded from http://127.0.0.1", "not completely in the cache", "check the network"]),
        (offline, ["not completely in the cache", "HF_HUB_OFFLINE"]),
        (server_trouble, ["the Hub cannot answer now (503)", "later"]),
        (lost_token, ["does not accept the token in HF_TOKEN", "`hf auth login`"]),
    ],
)
def test_what_is_not_in_the_cache_is_refused_with_the_reason(
    hub: Hub, repository: Repository, monkeypatch: pytest.MonkeyPatch, trouble: Callable[..., None], words: list[str]
) -> None:
    assert repository is hub.repositories["someone/llava"]
    trouble(hub, monkeypatch)
    assert_refused(words)


def test_a_hub_that_is_busy_for_a_moment_is_asked_again(hub: Hub, repository: Repository) -> None:
    hub.failures = [503, 429]
    assert find_checkpoint("someone/llava").folder.name == repository.commit


def test_a_cache_that_cannot_be_written_is_named(repository: Repository, tmp_path: Path) -> None:
    (tmp_path / "hub").write_text("a file where the cache should be")
    assert repository.commit == COMMIT
    assert_refused([f"cannot be stored in the cache {tmp_path / 'hub'}", "HF_HOME"])


# Refusals


def assert_refused(words: list[str], model: str = "someone/llava", revision: str | None = None) -> None:
    """Asserts that the model is refused in one line with these words."""
    with pytest.raises(UserError) as caught:
        find_checkpoint(model, revision)
    message = str(caught.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == [], message


def test_a_gated_repository(hub: Hub, repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    repository.gated, repository.admitted, hub.tokens = True, {"hf_admitted"}, {"hf_admitted", "hf_other"}
    page = f"{hub.url}/someone/llava"
    assert_refused(["--model someone/llava: is a gated repository", "no token", page, "`hf auth login`", "HF_TOKEN"])
    set_token(monkeypatch, "hf_other")
    assert_refused(["is a gated repository", "your token's account is not admitted", page])
    set_token(monkeypatch, "hf_admitted")
    assert find_checkpoint("someone/llava").folder.name == COMMIT


def test_a_wrong_token(hub: Hub, repository: Repository, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert repository is hub.repositories["someone/llava"]
    set_token(monkeypatch)
    assert_refused(["does not accept the token in HF_TOKEN", "`hf auth login`", "set HF_TOKEN"])
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "token").write_text("hf_wrong")
    assert_refused(["does not accept the token of `hf auth login`", "wrong or has expired"])


@pytest.mark.usefixtures("repository")
@pytest.mark.parametrize("token", ["hf_ä", "hf_\u200b"])
def test_a_token_that_is_none(monkeypatch: pytest.MonkeyPatch, token: str) -> None:
    set_token(monkeypatch, token)
    assert_refused(["token", "`hf auth login`"])


def test_a_mistyped_name(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--model some/lava: the Hub has no repository some/lava", "check the name"]
    assert_refused([*words, "it is private", "`hf auth login`"], "some/lava")
    hub.tokens = {"hf_good"}
    set_token(monkeypatch, "hf_good")
    assert_refused([*words, "your token cannot see it"], "some/lava")


@pytest.mark.usefixtures("repository")
@pytest.mark.parametrize("revision", ["v2", "3" * 40, "feature/x"])
def test_a_revision_that_does_not_exist(revision: str) -> None:
    assert_refused([f"someone/llava has no branch, tag or commit {revision}"], revision=revision)
    find_checkpoint("someone/llava")
    assert_refused([f"someone/llava has no branch, tag or commit {revision}"], revision=revision)


@pytest.mark.usefixtures("repository")
@pytest.mark.parametrize(
    ("status", "words"),
    [
        (403, ["no right to read someone/llava"]),
        (429, ["too many requests", "wait"]),
        (500, ["cannot answer now (500)"]),
        (451, ["cannot answer now (451)"]),
    ],
)
def test_other_answers(hub: Hub, status: int, words: list[str]) -> None:
    hub.failures = [status] * 50
    assert_refused(words)


def test_a_server_that_is_no_hub(hub: Hub, repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.compatibility.hub_server._describe_sibling", lambda *_: {"name": "config.json"})
    assert_refused([f"{hub.url} does not answer as the Hub does", "HF_ENDPOINT"])
    monkeypatch.undo()
    repository.commit = "main"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (HFValidationError("x"), "not a Hugging Face id"),
        (OfflineModeIsEnabled("x"), "HF_HUB_OFFLINE"),
        (httpx2.ConnectTimeout("timed out"), "(timed out)"),
        (httpx2.ProxyError("no proxy"), "(no proxy)"),
        (httpx2.ReadError(""), "(ReadError)"),
        (LocalEntryNotFoundError("nothing here\nand more"), "(nothing here)"),
        (PermissionError(13, "Permission denied"), "cannot be stored in the cache"),
        (KeyError("sha"), "does not answer as the Hub does"),
    ],
)
def test_every_kind_of_error_has_a_sentence(error: Exception, words: str) -> None:
    text = explain_hub_error(error, "a/b")
    assert words in text
    assert "\n" not in text


@pytest.mark.parametrize(
    "name",
    ["/x/models--a--b/snapshots/main", "/x/datasets--a--b/snapshots/" + COMMIT, "/x/models--a--b/other/" + COMMIT, "/"],
)
def test_other_folders_have_no_origin(name: str) -> None:
    assert find_origin(Path(name)) is None
