"""The page where people compare dubs: blind, on this machine alone, every vote on the disk before the next.

Systems have no name in anything that the page is sent: a video's address is a random word that means nothing
after the server ends. Answers to requests for a part of a video (Range) let browsers seek and loop.
"""

import json
import re
import secrets
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from keysync_jax.errors import UserError
from keysync_jax.evaluation.arena.contestants import Contestants, broken_video
from keysync_jax.evaluation.arena.votes import (
    BROKEN,
    CHOICES,
    Question,
    answered,
    load_votes,
    questions,
    save_vote,
)
from keysync_jax.files import sha256_once

HOST = "127.0.0.1"
CHUNK = 1 << 18
LONGEST_NAME = 80
LARGEST_BODY = 10_000

POLICY = (
    "default-src 'none'; style-src 'self'; script-src 'self'; media-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

PAGES = {
    "/": ("arena.html", "text/html; charset=utf-8"),
    "/arena.css": ("arena.css", "text/css; charset=utf-8"),
    "/arena.js": ("arena.js", "text/javascript; charset=utf-8"),
}


class Arena:
    """What is asked and answered; for the threads of a server.

    Args:
      folder: where the votes are kept.
      seed: of the orders.
    """

    def __init__(self, folder: Path, contestants: Contestants, seed: int = 0) -> None:
        self.folder, self.contestants, self.seed = folder, contestants, seed
        self._lock = threading.Lock()
        self._videos: dict[str, Path] = {}
        self._asked: dict[str, tuple[str, Question, tuple[Path, Path], float]] = {}
        self._votes = load_votes(folder)

    def next(self, voter: str) -> dict[str, Any]:
        """The next question of a voter, in words that say nothing of the systems."""
        with self._lock:
            asked = questions(
                {name: list(clips) for name, clips in self.contestants.items()}, voter, self.seed
            )
            done = answered(self._votes, voter)
            left = [question for question in asked if question.key not in done]
            if not left:
                return {"done": len(asked), "of": len(asked)}
            question = left[0]
            paths = self._path(question, question.left), self._path(question, question.right)
            word = secrets.token_urlsafe(9)
            self._asked[word] = voter, question, paths, time.time()
            videos = [self._word(path) for path in paths]
            return {"question": word, "videos": videos, "done": len(asked) - len(left), "of": len(asked)}

    def _path(self, question: Question, system: str) -> Path:
        if system != BROKEN:
            return self.contestants[system][question.clip]
        whole = question.left if question.right == BROKEN else question.right
        return broken_video(self.contestants[whole][question.clip])

    def _word(self, path: Path) -> str:
        word = secrets.token_urlsafe(9)
        self._videos[word] = path
        return word

    def video(self, word: str) -> Path | None:
        """The video of an address."""
        return self._videos.get(word)

    def vote(self, word: str, choice: str, watched: float) -> bool:
        """Saves an answer; False where the question is not open."""
        with self._lock:
            if word not in self._asked or choice not in CHOICES:
                return False
            voter, question, paths, since = self._asked.pop(word)
            if question.key in answered(self._votes, voter):
                return False
            further = {
                "seed": self.seed,
                "time": round(time.time(), 1),
                "seconds": round(time.time() - since, 1),
                "watched": round(watched, 1),
                "hashes": [sha256_once(path) for path in paths],
            }
            save_vote(self.folder, voter, question, choice, further)
            self._votes = load_votes(self.folder)
            return True


def make_server(arena: Arena, port: int = 0) -> ThreadingHTTPServer:
    """A server of an arena on this machine's own address; port 0: any that is free.

    Raises:
      UserError: the port is taken.
    """

    class Handler(_Handler):
        pass

    Handler.arena = arena
    try:
        server = ThreadingHTTPServer((HOST, port), Handler)
    except (OSError, OverflowError) as error:
        raise UserError(f"port {port} cannot be used ({getattr(error, 'strerror', None) or error})") from None
    server.daemon_threads = True
    return server


class _Handler(BaseHTTPRequestHandler):
    """Answers the page."""

    arena: Arena
    protocol_version = "HTTP/1.1"
    timeout = 60

    def do_GET(self) -> None:
        if not self._is_ours():
            return
        url = urlsplit(self.path)
        if url.path in PAGES:
            name, kind = PAGES[url.path]
            self._send(resources.files(__package__).joinpath(name).read_bytes(), kind)
        elif url.path == "/next":
            voter = parse_qs(url.query).get("voter", [""])[0].strip()[:LONGEST_NAME]
            if not voter:
                self._refuse(HTTPStatus.BAD_REQUEST)
                return
            self._json(self.arena.next(voter))
        elif url.path.startswith("/video/") and (video := self.arena.video(url.path[len("/video/") :])):
            self._send_video(video)
        else:
            self._refuse(HTTPStatus.NOT_FOUND)

    def do_POST(self) -> None:
        if not self._is_ours():
            return
        # A page of another site can send no JSON without being asked for permission first.
        length = self.headers.get("Content-Length", "")
        if self.path != "/vote" or self.headers.get_content_type() != "application/json":
            self._refuse(HTTPStatus.NOT_FOUND)
            return
        if not length.isdecimal() or int(length) > LARGEST_BODY:
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
            return
        try:
            body = json.loads(self.rfile.read(int(length)))
            saved = self.arena.vote(str(body["question"]), str(body["choice"]), float(body["watched"]))
        except (ValueError, KeyError, TypeError):
            self._refuse(HTTPStatus.BAD_REQUEST)
            return
        self._json({"saved": saved}, HTTPStatus.OK if saved else HTTPStatus.CONFLICT)

    def _is_ours(self) -> bool:
        """Whether the request came to this address by its own name: another name can be made to lead here."""
        host = (self.headers.get("Host") or "").rpartition(":")[0]
        if host in (HOST, "localhost"):
            return True
        self._refuse(HTTPStatus.MISDIRECTED_REQUEST)
        return False

    def _json(self, content: Mapping[str, Any], status: HTTPStatus = HTTPStatus.OK) -> None:
        self._send(json.dumps(content).encode(), "application/json", status)

    def _send(self, body: bytes, kind: str, status: HTTPStatus = HTTPStatus.OK) -> None:
        self._head(status, kind, len(body))
        self.wfile.write(body)

    def _refuse(self, status: HTTPStatus) -> None:
        # What was not read of a request would be taken for the next one.
        self.close_connection = True
        self._send(status.phrase.encode(), "text/plain", status)

    def _head(self, status: HTTPStatus, kind: str, length: int, **further: str) -> None:
        self.send_response(status)
        headers = {
            "Content-Type": kind,
            "Content-Length": str(length),
            "Content-Security-Policy": POLICY,
            "X-Content-Type-Options": "nosniff",
            "Cache-Control": "no-store",
            **{name.replace("_", "-"): value for name, value in further.items()},
        }
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _send_video(self, path: Path) -> None:
        size, kind = path.stat().st_size, "video/mp4"
        part = _part(self.headers.get("Range"), size)
        if part is None:
            self._head(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, kind, 0, Content_Range=f"bytes */{size}")
            return
        first, last, is_part = part
        if is_part:
            place = f"bytes {first}-{last}/{size}"
            self._head(
                HTTPStatus.PARTIAL_CONTENT, kind, last - first + 1, Accept_Ranges="bytes", Content_Range=place
            )
        else:
            self._head(HTTPStatus.OK, kind, size, Accept_Ranges="bytes")
        with path.open("rb") as file:
            file.seek(first)
            left = last - first + 1
            while left > 0 and (piece := file.read(min(CHUNK, left))):
                self.wfile.write(piece)
                left -= len(piece)

    def handle(self) -> None:
        # Browsers break off what they have seen enough of.
        with suppress(BrokenPipeError, ConnectionResetError):
            super().handle()

    def log_message(self, *_: object) -> None:
        """Prints nothing."""


def _part(asked: str | None, size: int) -> tuple[int, int, bool] | None:
    """First and last byte of what was asked for, and whether it is a range; None where there is none of it.

    What is no single range of bytes is answered with the whole.
    """
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", (asked or "").strip())
    if found is None or found.groups() == ("", ""):
        return 0, size - 1, False
    first, last = found.groups()
    if not first:
        return (max(0, size - int(last)), size - 1, True) if int(last) and size else None
    end = min(int(last), size - 1) if last else size - 1
    return (int(first), end, True) if int(first) <= end else None
