"""The page where people compare: blind, resumable, on this machine alone; what its votes say."""

import http.client
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from keysync_jax.cli import main
from keysync_jax.errors import UserError
from keysync_jax.evaluation.arena.contestants import SHOWN, broken_video, find_contestants, shown_alike
from keysync_jax.evaluation.arena.results import results
from keysync_jax.evaluation.arena.server import HOST, Arena, make_server
from keysync_jax.evaluation.arena.votes import (
    BROKEN,
    VOTES,
    Question,
    answered,
    load_votes,
    questions,
    save_vote,
)
from keysync_jax.media.video import read_frames
from tests.clips import write_video, write_voice

SYSTEMS = ("alpha", "beta", "gamma")
CLIPS = 3


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    voice = write_voice(tmp_path / "voice.wav", 0.5)
    for number, system in enumerate(SYSTEMS):
        (tmp_path / "dubs" / system).mkdir(parents=True)
        for clip in range(CLIPS):
            write_video(tmp_path / "dubs" / system / f"clip{clip}.mp4", 10 + number, voice=voice)
    return tmp_path / "dubs"


class Client:
    """A browser."""

    def __init__(self, port: int):
        self.port = port

    def ask(
        self, path: str, method: str = "GET", body: str | None = None, **headers: str
    ) -> tuple[int, Any, bytes]:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=20)
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, given)
        answer = connection.getresponse()
        found = answer.status, answer.headers, answer.read()
        connection.close()
        return found

    def next(self, voter: str) -> dict[str, Any]:
        status, _, body = self.ask(f"/next?voter={voter}")
        assert status == 200
        found: dict[str, Any] = json.loads(body)
        return found

    def vote(self, question: str, choice: str) -> int:
        body = json.dumps({"question": question, "choice": choice, "watched": 1.5})
        return self.ask("/vote", "POST", body, Content_Type="application/json")[0]


@pytest.fixture
def client(folder: Path) -> Iterator[Client]:
    with serving(folder) as port:
        yield Client(port)


class serving:  # noqa: N801
    """A server of a folder in a thread: a context manager that gives its port."""

    def __init__(self, folder: Path):
        self._server = make_server(Arena(folder, shown_alike(find_contestants(folder), folder)))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    def __enter__(self) -> int:
        self._thread.start()
        assert self._server.server_address[0] == "127.0.0.1"
        return int(self._server.server_address[1])

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def test_voters_are_asked_everything_and_go_on_where_they_were(folder: Path, client: Client) -> None:
    of = client.next("anna")["of"]
    assert of == CLIPS * 3 + 1  # Every pair of three systems, and a planted one.
    texts = []
    for number in range(4):
        found = client.next("anna")
        assert (found["done"], len(found["videos"])) == (number, 2)
        texts.append(json.dumps(found))
        assert client.vote(found["question"], ("left", "right", "tie", "left")[number]) == 200
        assert client.vote(found["question"], "left") == 409
    votes = load_votes(folder)
    assert [vote["choice"] for vote in votes] == ["left", "right", "tie", "left"]
    assert {vote["voter"] for vote in votes} == {"anna"}
    assert all(len(vote["hashes"]) == 2 and vote["watched"] == 1.5 for vote in votes)
    # Nothing that the page was sent names a system or a file.
    assert not any(name in text for text in texts for name in (*SYSTEMS, "clip", ".mp4", BROKEN))
    # Another server goes on; another voter begins, in another order.
    with serving(folder) as port:
        again = Client(port)
        assert again.next("anna")["done"] == 4
        assert again.next("bert")["done"] == 0
        for voter in ("anna", "bert"):
            while "question" in (found := again.next(voter)):
                assert again.vote(found["question"], "left") == 200
            assert found == {"done": of, "of": of}
    votes = load_votes(folder)
    assert len(votes) == 2 * of
    asked = {voter: [v for v in votes if v["voter"] == voter] for voter in ("anna", "bert")}
    assert len({json.dumps([asked[v][i]["clip"] for i in range(of)]) for v in asked}) == 2
    planted = [vote for vote in votes if vote["kind"] == "planted"]
    assert [BROKEN in (vote["left"], vote["right"]) for vote in planted] == [True, True]


def test_videos_can_be_sought(folder: Path, client: Client) -> None:
    found = client.next("anna")
    whole = {p.read_bytes() for p in (folder / SHOWN).glob("*.mp4")}
    status, headers, body = client.ask(f"/video/{found['videos'][0]}")
    assert (status, headers["Content-Type"], headers["Accept-Ranges"]) == (200, "video/mp4", "bytes")
    assert body in whole
    size = len(body)
    for asked, first, last in (("0-99", 0, 99), ("100-", 100, size - 1), ("-50", size - 50, size - 1),
                               (f"10-{size + 5}", 10, size - 1)):  # fmt: skip
        status, headers, part = client.ask(f"/video/{found['videos'][0]}", Range=f"bytes={asked}")
        assert (status, headers["Content-Range"]) == (206, f"bytes {first}-{last}/{size}")
        assert part == body[first : last + 1]
    for asked in (f"{size}-", "-0"):
        status, headers, part = client.ask(f"/video/{found['videos'][0]}", Range=f"bytes={asked}")
        assert (status, headers["Content-Range"], part) == (416, f"bytes */{size}", b"")
    assert client.ask(f"/video/{found['videos'][0]}", Range="bytes=1-2,4-5")[0] == 200


def test_nobody_else_is_answered(folder: Path, client: Client) -> None:
    for path in ("/", "/arena.js", "/arena.css"):
        status, headers, body = client.ask(path)
        assert (status, headers["Content-Security-Policy"].startswith("default-src 'none'")) == (200, True)
        assert body
    # A name of somebody else's that leads here; files; unknown addresses; a form of another page.
    assert client.ask("/next?voter=a", Host=f"evil.example:{client.port}")[0] == 421
    question = client.next("anna")["question"]
    body = json.dumps({"question": question, "choice": "left", "watched": 0})
    assert client.ask("/vote", "POST", body, Content_Type="text/plain")[0] == 404
    assert client.ask("/video/../dubs/alpha/clip0.mp4")[0] == 404
    assert client.ask("/video/")[0] == 404
    assert client.ask("/next")[0] == 400
    json_type = {"Content_Type": "application/json"}
    assert client.ask("/vote", "POST", "[1]", **json_type)[0] == 400
    assert client.ask("/vote", "POST", body.replace("left", "both"), **json_type)[0] == 409
    assert client.ask("/vote", "POST", "x" * 20_000, **json_type)[0] == 413
    assert not (folder / VOTES).exists()


def test_orders_differ_by_voter_and_sides_are_fair() -> None:
    systems = {name: [f"c{i}" for i in range(20)] for name in SYSTEMS}
    asked = {voter: questions(systems, voter, 0) for voter in ("anna", "bert")}
    assert asked["anna"] == questions(systems, "anna", 0)
    assert asked["anna"] != asked["bert"]
    plain = [q for q in asked["anna"] if q.kind == "plain"]
    assert len({q.key for q in plain}) == len(plain) == 60
    first = sum(q.left < q.right for q in plain)
    assert 18 <= first <= 42
    kinds = [q.kind for q in asked["anna"]]
    assert (kinds.count("planted"), kinds.count("repeat")) == (5, 4)
    for i, q in enumerate(asked["anna"]):
        if q.kind == "repeat":
            assert Question(q.clip, q.right, q.left, "plain") in asked["anna"][:i]


def test_a_vote_that_was_cut_off_is_asked_again(tmp_path: Path) -> None:
    question = Question("c", "a", "b", "plain")
    save_vote(tmp_path, "anna", question, "left", {})
    with (tmp_path / VOTES).open("a") as file:
        file.write('{"voter": "anna", "clip": "c2", "le')
    assert len(load_votes(tmp_path)) == 1
    save_vote(tmp_path, "anna", Question("c3", "a", "b", "plain"), "tie", {})
    votes = load_votes(tmp_path)
    assert [vote["clip"] for vote in votes] == ["c", "c3"]
    assert answered(votes, "anna") == {question.key, Question("c3", "b", "a", "plain").key}
    (tmp_path / VOTES).write_text("no votes\n" * 5)
    with pytest.raises(UserError, match="5 lines are no votes, the first is line 1"):
        load_votes(tmp_path)


def test_a_planted_video_runs_backwards(folder: Path) -> None:
    video = folder / "alpha" / "clip0.mp4"
    found = broken_video(video)
    there, back = (list(read_frames(path)) for path in (video, found))
    assert len(there) == len(back)
    for a, b in ((0, -1), (-1, 0)):
        difference = abs(there[a].astype(int) - back[b])
        assert difference.mean() < 4 < abs(there[a].astype(int) - back[a]).mean()


def test_what_the_votes_say(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["arena", str(folder), "--results"]) == 2
    assert "no votes yet" in capsys.readouterr().err
    systems = {name: [f"c{i}" for i in range(8)] for name in SYSTEMS}
    order = {name: rank for rank, name in enumerate(SYSTEMS)}
    for voter in ("anna", "bert", "carl"):
        for number, question in enumerate(questions(systems, voter, 0)):
            better = min((question.left, question.right), key=lambda name: order.get(name, 9))
            choice = "tie" if number % 5 == 4 else "left" if better == question.left else "right"
            save_vote(folder, voter, question, choice, {})
    assert main(["arena", str(folder), "--results"]) == 0
    text = capsys.readouterr().out
    assert "72 votes of 3 voters" in text
    ratings = text.split("\n\n")[1].splitlines()[1:4]
    assert [line.split()[:2] for line in ratings] == [["alpha", "1"], ["beta", "2"], ["gamma", "3"]]
    assert results(load_votes(folder)) == text.strip()
    assert "planted pairs found" in text
    assert "left chosen" in text


def test_folders_without_a_pair_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "clip.mp4").touch()
    assert main(["arena", str(tmp_path)]) == 2
    assert "no two folders of systems" in capsys.readouterr().err
    assert main(["arena", str(tmp_path / "nowhere")]) == 2
