"""A stand-in of the Hugging Face Hub on loopback: what its client asks for, and what can go wrong."""

import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

LARGE = (".pt", ".bin", ".safetensors")
"""Endings of the files that are in the store, to which the hub redirects."""


@dataclass
class Repo:
    """A repository: commit -> path -> content, and the names of commits.

    `status` and `code` (`X-Error-Code`) answer every request instead, unless it brings the `token`.
    """

    commits: dict[str, dict[str, bytes]]
    branches: dict[str, str]
    status: int = 200
    code: str = ""
    token: str = ""


@dataclass
class Seen:
    """One request; names of headers in small letters."""

    method: str
    path: str
    headers: dict[str, str]
    store: bool


@dataclass
class StandIn:
    """The servers' state; tests read `seen` and set `faults`.

    Attributes:
      faults: of the answers with bytes, by the file's path; each is used once, in order.
    """

    endpoint: str = ""
    store: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    faults: dict[str, list[Callable[["Answer"], None]]] = field(default_factory=dict)
    seen: list[Seen] = field(default_factory=list)

    def put(self, repo: str, files: dict[str, bytes], branch: str = "main") -> str:
        """A commit of these files; returns its name."""
        digest = hashlib.sha1()
        for path, content in sorted(files.items()):
            digest.update(path.encode() + hashlib.sha1(content).digest())
        commit, known = digest.hexdigest(), self.repos.setdefault(repo, Repo({}, {}))
        known.commits[commit] = files
        known.branches[branch] = commit
        return commit

    @property
    def fetched(self) -> list[str]:
        """Paths of the files whose bytes were asked for."""
        return [
            seen.path for seen in self.seen if seen.method == "GET" and seen.store is _is_large(seen.path)
        ]


@dataclass
class Answer:
    """Bytes on their way; a fault changes them.

    Attributes:
      length: that the headers claim.
      body: that is sent before the connection is closed.
      pieces: sent in its place, as they come.
    """

    status: int
    length: int
    body: bytes
    pieces: Iterator[bytes] | None = None


def drop_after(count: int) -> Callable[[Answer], None]:
    """The connection ends after some bytes."""

    def fault(answer: Answer) -> None:
        answer.body = answer.body[:count]

    return fault


def truncate(count: int) -> Callable[[Answer], None]:
    """A shorter file, correctly announced."""

    def fault(answer: Answer) -> None:
        answer.body = answer.body[:count]
        answer.length = len(answer.body)

    return fault


def garble(answer: Answer) -> None:
    """As many other bytes."""
    answer.body = bytes(b ^ 1 for b in answer.body)


def refuse(status: int) -> Callable[[Answer], None]:
    """An error in place of the bytes."""

    def fault(answer: Answer) -> None:
        answer.status, answer.body, answer.length = status, b"", 0

    return fault


def _is_large(path: str) -> bool:
    return path.endswith(LARGE)


@contextmanager
def stand_in() -> Iterator[StandIn]:
    """Two servers, the hub and its store, for the block."""
    state = StandIn()
    servers = [_server(state, store) for store in (False, True)]
    state.endpoint, state.store = (f"http://127.0.0.1:{s.server_address[1]}" for s in servers)
    threads = [threading.Thread(target=s.serve_forever, args=(0.01,), daemon=True) for s in servers]
    for thread in threads:
        thread.start()
    try:
        yield state
    finally:
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            server.server_close()
            thread.join()


def _server(state: StandIn, store: bool) -> ThreadingHTTPServer:
    class Handler(_Handler):
        pass

    Handler.state, Handler.store = state, store
    return ThreadingHTTPServer(("127.0.0.1", 0), Handler)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: StandIn
    store: bool

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(self.path.partition("?")[0])
        if "/resolve/" not in path:  # What the client asks for its own sake.
            return self._error(404, "")
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.state.seen.append(Seen(self.command, path, headers, self.store))
        owner, name, _, *rest = path.strip("/").split("/")
        repo = self.state.repos.get(f"{owner}/{name}")
        if repo is None:
            return self._error(404, "RepoNotFound")
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if not self.store and repo.status != 200 and not (repo.token and token == repo.token):
            return self._error(repo.status, repo.code)
        # A revision may have slashes (refs/pr/1); the client quotes them.
        revision = unquote(self.path.strip("/").split("/")[3])
        file = "/".join(rest[revision.count("/") + 1 :])
        commit = repo.branches.get(revision, revision)
        if commit not in repo.commits:
            return self._error(404, "RevisionNotFound")
        if file not in repo.commits[commit]:
            return self._error(404, "EntryNotFound")
        return self._file(repo.commits[commit][file], commit, f"/{owner}/{name}/resolve/{commit}/{file}")

    def _file(self, content: bytes, commit: str, path: str) -> None:
        if _is_large(path) and not self.store:
            self.send_response(302)
            self.send_header("Location", self.state.store + path)
            self.send_header("X-Linked-Etag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Linked-Size", str(len(content)))
            self.send_header("X-Repo-Commit", commit)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        first = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        answer = Answer(206 if first else 200, len(content) - first, content[first:])
        if self.command == "GET" and (faults := self.state.faults.get(path.rpartition("/")[2])):
            faults.pop(0)(answer)
        if answer.status >= 400:
            return self._error(answer.status, "")
        self.send_response(answer.status)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{git}"')
        self.send_header("Content-Length", str(answer.length))
        self.end_headers()
        if self.command == "GET":
            for piece in answer.pieces or [answer.body]:
                self.wfile.write(piece)
            self.close_connection = answer.pieces is not None or len(answer.body) < answer.length

    def _error(self, status: int, code: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


def cached_files(cache: Path) -> list[str]:
    """Names of everything in the client's cache that is a file of a repository, and of what was begun."""
    files = [path for path in cache.rglob("*") if path.is_file()]
    return sorted(p.name for p in files if "snapshots" in p.parts or p.suffix == ".incomplete")
