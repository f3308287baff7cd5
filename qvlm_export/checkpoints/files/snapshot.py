"""One commit of a repository on the Hugging Face Hub: the list of its files, and its folder in huggingface_hub's cache.

Only configuration, tokenizer and processor files are downloaded here; `headers.py` and `download.py` see to the weights.
Where the Hub cannot be reached, what the cache holds counts.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, RevisionNotFoundError
from huggingface_hub.utils import tqdm

from qvlm_export.calibrate.errors import UserError
from qvlm_export.checkpoints.files.hub_errors import BUSY, HUB_ERRORS, explain_hub_error, hub_errors

# All that configuration, tokenizer, processor and the indices of sharded weights are read from. No file is among them that
# a training run leaves, and no code.
SETTINGS = (
    "config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json",
    "video_preprocessor_config.json", "chat_template.json", "chat_template.jinja", "additional_chat_templates/*.jinja",
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "adapter_config.json",
    "model.safetensors.index.json", "pytorch_model.bin.index.json",
)  # fmt: skip
MAX_SETTINGS_BYTES = 2**28  # of one such file; the largest tokenizers have a tenth of it
TIMEOUT_SECONDS = 10.0
WAITS = (1.0, 4.0)  # seconds before a request is repeated that the Hub was too busy for
COMMIT, BLOB = re.compile(r"[0-9a-f]{40}"), re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
SHA256_DIGITS = 64


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository. blob: its name in the cache. sha256: None where the Hub has none, as for small files."""

    size: int
    blob: str
    sha256: str | None


@dataclass(frozen=True)
class Snapshot:
    """A commit. folder: in the cache, with symbolic links to what is downloaded.

    files: of the repository; {} when the Hub does not list them. obstacle: why it does not, in words; empty when it does.
    """

    repository: str
    commit: str
    folder: Path
    files: Mapping[str, RemoteFile]
    obstacle: str = ""


def find_snapshot(repository: str, revision: str | None, where: str) -> Snapshot:
    """Returns the commit that `revision` (a branch, tag or commit; None: main) names, after downloading its small files.

    where: the option and its value, for errors. Raises UserError when it is neither on the Hub nor in the cache.
    """
    unreachable: BaseException | None = None
    listing: tuple[str, dict[str, RemoteFile]] | None = None
    with hub_errors(where, repository, revision):
        try:
            listing = _list_files(repository, revision)
        except RevisionNotFoundError:
            raise
        except (httpx2.HTTPError, OfflineModeIsEnabled) as error:  # a model in the cache needs neither network nor token
            unreachable = error
    if listing is not None:
        _check_sizes(listing[1], where)
    try:
        folder = Path(
            snapshot_download(
                repository,
                revision=revision,
                allow_patterns=list(SETTINGS),
                local_files_only=unreachable is not None,
                tqdm_class=_NoBar,
            )
        )
        if listing is not None and folder.name != listing[0]:  # the branch has moved since it was listed
            listing = _list_files(repository, folder.name)
    except HUB_ERRORS as error:
        cause = unreachable if isinstance(error, LocalEntryNotFoundError) and unreachable is not None else error
        raise UserError(f"{where}: {explain_hub_error(cause, repository, revision)}") from error
    if listing is not None:
        return Snapshot(repository, folder.name, folder, listing[1])
    return Snapshot(
        repository, folder.name, folder, {}, "" if unreachable is None else explain_hub_error(unreachable, repository)
    )


class _NoBar(tqdm):
    """A progress bar of huggingface_hub that is not shown: small files need none."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **{**settings, "disable": True})


def _list_files(repository: str, revision: str | None) -> tuple[str, dict[str, RemoteFile]]:
    """Returns the commit of a revision and its files, after a few tries where the Hub is busy."""
    for wait in (*WAITS, None):
        try:
            info = HfApi().model_info(repository, revision=revision, files_metadata=True, timeout=TIMEOUT_SECONDS)
            break
        except HfHubHTTPError as error:
            if wait is None or error.response.status_code not in BUSY:
                raise
        except (httpx2.ReadError, httpx2.RemoteProtocolError):  # the connection was dropped
            if wait is None:
                raise
        time.sleep(wait)
    files = {}
    for file in info.siblings or ():
        if isinstance(file.size, int) and isinstance(file.blob_id, str):
            sha256 = None if file.lfs is None else file.lfs.sha256
            files[file.rfilename] = RemoteFile(file.size, sha256 or file.blob_id, sha256)
    if not isinstance(info.sha, str) or not COMMIT.fullmatch(info.sha):
        raise ValueError(f"it names no commit of {repository}")
    return info.sha, files


def _check_sizes(files: Mapping[str, RemoteFile], where: str) -> None:
    for name in SETTINGS:
        if name in files and files[name].size > MAX_SETTINGS_BYTES:
            raise UserError(f"{where}: its {name} has {files[name].size} bytes, so it is no {name}; give another repository")


def find_origin(folder: Path) -> tuple[str, str] | None:
    """Returns (repository, commit) of a folder in a cache of huggingface_hub, by its path; None for any other folder."""
    path = folder.resolve()
    if len(path.parts) < 4 or path.parent.name != "snapshots" or not COMMIT.fullmatch(path.name):
        return None
    kind, _, name = path.parents[1].name.partition(constants.REPO_ID_SEPARATOR)
    return (name.replace(constants.REPO_ID_SEPARATOR, "/"), path.name) if kind == "models" and name else None


def find_blob(path: Path) -> str | None:
    """Returns the name of a file's content in the cache of huggingface_hub; None for files elsewhere.

    It is the sha256 (64 digits) of large files, and git's name (40 digits) of small ones.
    """
    blob = path.resolve()
    return blob.name if blob.parent.name == "blobs" and BLOB.fullmatch(blob.name) else None
