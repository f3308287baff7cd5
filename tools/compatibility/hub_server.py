"""A server on localhost that imitates the Hugging Face Hub, counts the bytes that it serves, and fails on demand."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

LARGE_BYTES = 20_000  # from this size on, a file is stored as large ones are: named by its sha256, elsewhere
PIECE_BYTES = 2**14


@dataclass
class Repository:
    """files: by name. commit: of main; `revisions` names others. gated, private: who may read it; a token of `Hub.tokens`
    may read a private one, and a gated one if it is in `admitted`."""

    files: dict[str, bytes]
    commit: str = "1" * 40
    revisions: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False
    admitted: set[str] = field(default_factory=set)


@dataclass
class Hub:
    """The state of the server.

    url, store_url: of the Hub, and of the store that it sends large files from. Their hosts differ, as the real ones do, so
    a token must not go to the store. repositories: by id. tokens: the valid ones. served: bytes of content by file name.
    requests: "METHOD path" of each. drops: file name -> how many bytes are sent of each of the next answers before the
    connection is cut; each answer uses up one entry. failures: status codes of the next answers. ignore_ranges: whole files
    are sent. stalls: file name -> after how many bytes its answers wait, until the entry is taken away.
    """

    url: str = ""
    store_url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    tokens: set[str] = field(default_factory=set)
    served: Counter[str] = field(default_factory=Counter)
    requests: list[str] = field(default_factory=list)
    drops: dict[str, list[int]] = field(default_factory=dict)
    failures: list[int] = field(default_factory=list)
    ignore_ranges: bool = False
    stalls: dict[str, int] = field(default_factory=dict)

    def add_folder(self, repository: str, folder: Path, **settings: object) -> Repository:
        """Adds a repository with the files of a folder."""
        files = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
        self.repositories[repository] = Repository(files, **settings)  # type: ignore[arg-type]
        return self.repositories[repository]

    def served_weights(self) -> int:
        """Bytes that were served of weight files."""
        return sum(count for name, count in self.served.items() if name.endswith((".safetensors", ".bin")))


@contextmanager
def run_hub() -> Iterator[Hub]:
    """Runs the server until the context is left."""
    hub = Hub()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url, hub.store_url = (f"http://{host}:{server.server_address[1]}" for host in ("127.0.0.1", "localhost"))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def is_large(content: bytes) -> bool:
    return len(content) >= LARGE_BYTES


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_id(content: bytes) -> str:
    """The name that git gives a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    state: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        url = urlsplit(self.path)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        self.state.requests.append(f"{self.command} {url.path}")
        if self.state.failures and parts[1:2] != ["agent-harnesses"]:  # which huggingface_hub asks for on its own account
            self._refuse(self.state.failures.pop(0), "", "the server fails, as a test asked for")
        elif parts[0] == "lfs" and self.headers.get("Authorization"):
            self._refuse(400, "", "a token was sent to the store")
        elif parts[0] == "lfs":
            self._send_blob(parts[1])
        elif parts[:2] == ["api", "models"]:
            self._describe("/".join(parts[2:4]), parts[4:], "blobs" in parse_qs(url.query))
        elif (repository := self._open("/".join(parts[:2]), content=True)) and (
            commit := self._find_commit(repository, parts[3])
        ):
            self._resolve(repository, commit, "/".join(parts[4:]))

    def _describe(self, name: str, rest: list[str], blobs: bool) -> None:
        """Answers with the list of a repository's files. rest: the address after the repository."""
        repository = self._open(name, content=False)
        if repository is None or (commit := self._find_commit(repository, rest[1] if rest else "main")) is None:
            return
        if rest[:1] == ["tree"]:
            self._send_json([_describe(path, content) for path, content in repository.files.items()])
        else:
            siblings = [_describe_sibling(path, content, blobs) for path, content in repository.files.items()]
            self._send_json({"id": name, "modelId": name, "sha": commit, "siblings": siblings})

    def _open(self, name: str, *, content: bool) -> Repository | None:
        """Returns the repository, or answers why not. content: whether a file is asked for, which gates guard."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        repository = self.state.repositories.get(name)
        if token and token not in self.state.tokens:
            self._refuse(401, "", "Invalid credentials in Authorization header")
        elif repository is None or (repository.private and not token):
            self._refuse(404 if token else 401, "RepoNotFound", "Repository not found")
        elif content and repository.gated and token not in repository.admitted:
            self._refuse(403 if token else 401, "GatedRepo", f"Access to model {name} is restricted")
        else:
            return repository
        return None

    def _find_commit(self, repository: Repository, revision: str) -> str | None:
        """Returns the commit of a revision, or answers that there is none."""
        commits = {"main": repository.commit, **repository.revisions}
        commits |= {commit: commit for commit in commits.values()}
        if revision not in commits:
            self._refuse(404, "RevisionNotFound", "Invalid rev id")
        return commits.get(revision)

    def _resolve(self, repository: Repository, commit: str, name: str) -> None:
        if name not in repository.files:
            return self._refuse(404, "EntryNotFound", "Entry not found")
        content = repository.files[name]
        if is_large(content):
            headers = {"X-Repo-Commit": commit, "X-Linked-Size": len(content), "X-Linked-Etag": f'"{sha256(content)}"'}
            return self._send(302, b"", {**headers, "Location": f"{self.state.store_url}/lfs/{sha256(content)}"})
        return self._send_file(name, content, {"X-Repo-Commit": commit, "ETag": f'"{git_id(content)}"'})

    def _send_blob(self, digest: str) -> None:
        files = ((n, c) for repository in self.state.repositories.values() for n, c in repository.files.items())
        name, content = next((name, content) for name, content in files if is_large(content) and sha256(content) == digest)
        self._send_file(name, content, {"ETag": f'"{digest}"'})

    def _send_file(self, name: str, content: bytes, headers: Mapping[str, object]) -> None:
        """Sends a file, or the range that is asked for."""
        status, asked, headers = 200, self.headers.get("Range"), {"Accept-Ranges": "bytes", **headers}
        if asked and not self.state.ignore_ranges:
            first, last = asked.removeprefix("bytes=").split("-")
            start, stop = int(first), min(int(last) + 1 if last else len(content), len(content))
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
            status, content = 206, content[start:stop]
        drops = self.state.drops.get(name, [])
        limit = drops.pop(0) if drops and self.command == "GET" else None
        self._send(status, content, headers, name, limit)

    def _send_json(self, content: object) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self._send(status, json.dumps({"error": message}).encode(), headers)

    def _send(
        self, status: int, content: bytes, headers: Mapping[str, object], name: str = "", limit: int | None = None
    ) -> None:
        """Sends an answer. limit: bytes after which the connection is cut."""
        self.send_response(status)
        for key, value in {**headers, "Content-Length": len(content)}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == "HEAD":
            return
        body = content if limit is None else content[:limit]
        for start in range(0, len(body), PIECE_BYTES):
            while start >= self.state.stalls.get(name, len(body)):
                time.sleep(0.02)
            piece = body[start : start + PIECE_BYTES]
            try:
                self.wfile.write(piece)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True
                return
            self.state.served[name] += len(piece) if name else 0
        if limit is not None:
            self.close_connection = True


def _describe(path: str, content: bytes) -> dict[str, object]:
    """An entry of a repository's tree."""
    entry: dict[str, object] = {"type": "file", "path": path, "size": len(content), "oid": git_id(content)}
    return entry | ({"lfs": {"oid": sha256(content), "size": len(content), "pointerSize": 130}} if is_large(content) else {})


def _describe_sibling(path: str, content: bytes, blobs: bool) -> dict[str, object]:
    """An entry of a repository's description. blobs: with sizes and hashes."""
    if not blobs:
        return {"rfilename": path}
    entry: dict[str, object] = {"rfilename": path, "size": len(content), "blobId": git_id(content)}
    lfs = {"sha256": sha256(content), "size": len(content), "pointerSize": 130}
    return entry | ({"lfs": lfs} if is_large(content) else {})
