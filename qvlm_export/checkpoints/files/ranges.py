"""Reads files of the Hugging Face Hub in pieces (HTTP ranges), so that headers of weights are read without the weights."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, cast

import httpx2
from huggingface_hub import get_session, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

from qvlm_export.checkpoints.files.hub_errors import BUSY
from qvlm_export.checkpoints.files.snapshot import Snapshot

BLOCK_BYTES = 2**17  # read at once; holds the header of most files
MAX_READ_BYTES = 2**28  # of one file in all, so that no mistake downloads the weights
TIMEOUT_SECONDS = 10.0  # without a byte, after which a connection counts as dropped
WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds before a dropped connection is tried again; a byte received begins them anew


@contextmanager
def open_range(snapshot: Snapshot, name: str, start: int, stop: int | None = None) -> Iterator[tuple[int, Iterator[bytes]]]:
    """Requests the bytes from `start` to `stop` (None: to the end) of a file; yields where they begin, and them in pieces.

    They begin at 0 when the server ignores ranges. Leaving the context ends the transfer. Raises the errors of
    huggingface_hub and httpx2.
    """
    url = hf_hub_url(snapshot.repository, name, revision=snapshot.commit)
    headers = {
        **build_hf_headers(),
        "Range": f"bytes={start}-{'' if stop is None else stop - 1}",
        "Accept-Encoding": "identity",  # ranges count stored bytes
    }
    with get_session().stream("GET", url, headers=headers, timeout=TIMEOUT_SECONDS) as response:
        if response.status_code >= 400:
            response.read()
        hf_raise_for_status(response)
        begin = start if response.status_code == httpx2.codes.PARTIAL_CONTENT else 0
        yield begin, response.iter_bytes()


def is_transient(error: BaseException) -> bool:
    """Returns whether the same request may succeed a moment later."""
    return isinstance(error, httpx2.TransportError) or (
        isinstance(error, HfHubHTTPError) and error.response.status_code in BUSY
    )


class _Ranges(io.RawIOBase):
    """The file as an unbuffered stream, each read of which is a request."""

    def __init__(self, snapshot: Snapshot, name: str, size: int) -> None:
        self._snapshot, self._name, self._size = snapshot, name, size
        self._position, self._allowed = 0, MAX_READ_BYTES

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = min(len(buffer), self._size - self._position)
        if count <= 0:
            return 0
        self._allowed -= count
        if self._allowed < 0:
            raise ValueError(f"its header is longer than {MAX_READ_BYTES} bytes")
        content = _read(self._snapshot, self._name, self._position, self._position + count)
        buffer[:count] = content
        self._position += count
        return count


def _read(snapshot: Snapshot, name: str, start: int, stop: int) -> bytes:
    """Returns the bytes from `start` to `stop`, after a few tries. Raises ValueError when the server sends others."""
    waits = iter(WAITS)
    while True:
        try:
            with open_range(snapshot, name, start, stop) as (begin, pieces):
                if begin != start:
                    raise ValueError("it sends no parts of files")
                content = bytearray()
                for piece in pieces:
                    content += piece
                    if len(content) >= stop - start:
                        return bytes(content[: stop - start])
            raise ValueError(f"it sent {len(content)} bytes of {stop - start}")
        except httpx2.HTTPError as error:
            wait = next(waits, None)
            if wait is None or not is_transient(error):
                raise
            time.sleep(wait)


def open_remote(snapshot: Snapshot, name: str) -> BinaryIO:
    """Opens a file of the repository, which must be in `snapshot.files`, for reading and seeking; nothing is stored.

    Reading raises ValueError beyond MAX_READ_BYTES, and the errors of huggingface_hub and httpx2.
    """
    raw = _Ranges(snapshot, name, snapshot.files[name].size)
    return cast(BinaryIO, io.BufferedReader(raw, BLOCK_BYTES))
