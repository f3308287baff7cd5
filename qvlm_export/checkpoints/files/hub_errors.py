"""Says in one sentence why the Hugging Face Hub did not give a file, and what to do about it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

import httpx2
from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    DisabledRepoError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)

from qvlm_export.calibrate.errors import UserError

BUSY = (429, 500, 502, 503, 504)  # answers that may be others a moment later
LOG_IN = "run `hf auth login`, or set HF_TOKEN"
# What requests of huggingface_hub raise. ValueError covers answers that are no JSON, and tokens that no header can hold;
# LookupError and TypeError answers that are JSON of another form than the Hub's.
HUB_ERRORS = (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError, LookupError, TypeError)
# Why the Hub refuses a request -> the sentence that says so, after the option and its value.
REFUSALS = {
    "gated": "is a gated repository, and no token was sent; accept its terms at {page}, then {log_in}",
    "not admitted": "is a gated repository, and your token's account is not admitted; ask for access at {page}",
    "revision": "{repository} has no branch, tag or commit {revision}; {page}/commits lists them",
    "disabled": "was disabled by the Hub or its author ({page}); give a local folder",
    "token": "the Hub does not accept the token {source}, which is wrong or has expired; for another one {log_in}",
    "absent": "the Hub has no repository {repository}, or it is private; check the name, and for a private one {log_in}",
    "not visible": "the Hub has no repository {repository}, or your token cannot see it; check the name, and its rights",
    "forbidden": "your token has no right to read {repository}; change that in your settings, or for another one {log_in}",
    "many": "the Hub had too many requests from you (429); wait a few minutes and run the same command",
    "trouble": "the Hub cannot answer now ({status}); run the same command later, or give a local folder",
}


@contextmanager
def hub_errors(where: str, repository: str, revision: str | None = None) -> Iterator[None]:
    """Turns every error of a request to the Hub into a UserError.

    where: the option and its value, which begin the message. revision: as asked for by the user, None for the default.
    """
    try:
        yield
    except HUB_ERRORS as error:
        raise UserError(f"{where}: {explain_hub_error(error, repository, revision)}") from error


def explain_hub_error(error: BaseException, repository: str, revision: str | None = None) -> str:
    """Returns the cause and the cure of an error of a request to the Hub, in one sentence."""
    cause, cache = _find_cause(error), constants.HF_HUB_CACHE
    match cause:
        case HFValidationError():
            text = "no such folder, and not a Hugging Face id"
        case HfHubHTTPError():
            text = _explain_answer(cause, repository, revision)
        case OfflineModeIsEnabled():
            text = f"is not completely in the cache {cache}, and HF_HUB_OFFLINE forbids to download it; unset that once"
        case LocalEntryNotFoundError() | httpx2.HTTPError() | httpx2.InvalidURL():
            text = (
                f"cannot be downloaded from {constants.ENDPOINT} ({first_line(cause)}) and is not completely in the cache; "
                "check the network, or give a local folder"
            )
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            text = f"the disk of the cache {cache} is full; free some, or let HF_HOME name a folder on another disk"
        case OSError() if not isinstance(cause, FileMetadataError):  # which is raised for answers without their headers
            text = f"cannot be stored in the cache {cache} ({first_line(cause)}); HF_HOME can name another place"
        case UnicodeError():
            text = f"the stored token holds other than plain letters, so it is none; {LOG_IN} again"
        case _:
            text = f"{constants.ENDPOINT} does not answer as the Hub does ({first_line(cause)}); check HF_ENDPOINT"
    return text


def _explain_answer(error: HfHubHTTPError, repository: str, revision: str | None) -> str:
    """Explains a request that the Hub refused."""
    return REFUSALS[_find_refusal(error, has_token=get_token() is not None)].format(
        repository=repository,
        revision=revision,
        page=f"{constants.ENDPOINT}/{repository}",
        source="in HF_TOKEN" if os.environ.get("HF_TOKEN") else "of `hf auth login`",
        status=error.response.status_code,
        log_in=LOG_IN,
    )


def _find_refusal(error: HfHubHTTPError, *, has_token: bool) -> str:
    """Returns a key of REFUSALS, by the code of the Hub's answer and whether a token was sent."""
    status = error.response.status_code
    match error:
        case GatedRepoError():
            key = "not admitted" if has_token and status != 401 else "gated"
        case RevisionNotFoundError():
            key = "revision"
        case DisabledRepoError():
            key = "disabled"
        case _ if status in (401, 404):  # without a token, the Hub answers 401 for what does not exist
            key = ("token" if status == 401 else "not visible") if has_token else "absent"
        case _:
            key = {403: "forbidden", 429: "many"}.get(status, "trouble")
    return key


def _find_cause(error: BaseException) -> BaseException:
    """Returns what lies behind the errors that huggingface_hub raises because a file is not in the cache."""
    while isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or the name of its class when it has no message."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
