"""What the service answers, its replicas a stand-in; without Ray."""

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from keysync_jax.errors import UserError
from keysync_jax.launch.ray_serve import Front, app
from keysync_jax.model import DEFAULT
from keysync_jax.pipeline.pairs import Outcome, Pair

pytest.importorskip("starlette", reason="Ray Serve is not installed")


class Replicas:
    """Replicas that do what they are told to: end, fail, or wait until they may go on."""

    def __init__(self) -> None:
        self.seen: list[Pair] = []
        self.breaks, self.reason = 0, ""
        self.may_begin, self.may_go_on = asyncio.Event(), asyncio.Event()
        self.dub = SimpleNamespace(remote=self._dub)

    def options(self, stream: bool) -> "Replicas":
        assert stream
        return self

    async def _dub(self, pair: Pair) -> AsyncIterator[Any]:
        await self.may_begin.wait()
        self.seen.append(pair)
        if len(self.seen) <= self.breaks:
            raise RuntimeError("the replica died")
        yield {"state": "running", "phase": "landmarks", "done": 3, "total": 15}
        await self.may_go_on.wait()
        pair.output.write_bytes(b"a dub")
        yield Outcome(pair, "failed" if self.reason else "done", self.reason)


def asked(front: Front, method: str, path: str, **body: Any) -> Coroutine[Any, Any, tuple[int, Any]]:
    async def ask() -> tuple[int, Any]:
        async def read() -> bytes:
            return json.dumps(body).encode()

        request = SimpleNamespace(method=method, url=SimpleNamespace(path=path), body=read)
        answer = await front(request)
        if hasattr(answer, "path"):
            return answer.status_code, Path(answer.path).read_bytes()
        return answer.status_code, json.loads(answer.body)

    return ask()


@pytest.fixture
def front(tmp_path: Path) -> Front:
    (tmp_path / "inputs").mkdir()
    for name in ("a.mp4", "b.mp4", "v.wav", "p.npy"):
        (tmp_path / "inputs" / name).write_bytes(name.encode())
    (tmp_path / "secret.npy").write_bytes(b"x")
    return Front(Replicas(), str(DEFAULT), str(tmp_path / "inputs"), str(tmp_path / "dubs"))


ROW = {"voice": "v.wav", "landmarks": "p.npy"}


def test_a_dub_is_queued_runs_and_is_there(front: Front) -> None:
    async def use() -> None:
        status, first = await asked(front, "POST", "/dubs", video="a.mp4", **ROW)
        assert status == 202
        assert (first["state"], first["before"]) == ("queued", 0)
        _, second = await asked(front, "POST", "/dubs", video="b.mp4", seed=3, **ROW)
        assert second["id"] != first["id"]
        assert second["before"] == 1
        front._replicas.may_begin.set()
        for _ in range(5):
            await asyncio.sleep(0)
        at = f"/dubs/{first['id']}"
        assert await asked(front, "GET", at) == (
            200,
            {"state": "running", "phase": "landmarks", "done": 3, "total": 15},
        )
        assert (await asked(front, "GET", f"{at}/video"))[0] == 404
        again = await asked(front, "POST", "/dubs", video="a.mp4", **ROW)
        assert again[1]["id"] == first["id"]
        front._replicas.may_go_on.set()
        await asyncio.gather(*front._tasks.values())
        assert await asked(front, "GET", at) == (200, {"state": "done"})
        assert await asked(front, "GET", f"{at}/video") == (200, b"a dub")
        assert sorted(pair.video.name for pair in front._replicas.seen) == ["a.mp4", "b.mp4"]  # Each once.
        assert {pair.settings.seed for pair in front._replicas.seen} == {0, 3}

    asyncio.run(use())


@pytest.mark.parametrize(("breaks", "state"), [(1, "done"), (4, "failed")])
def test_a_replica_that_dies_is_followed_by_another(front: Front, breaks: int, state: str) -> None:
    async def use() -> None:
        front._replicas.breaks = breaks
        front._replicas.may_begin.set()
        front._replicas.may_go_on.set()
        _, made = await asked(front, "POST", "/dubs", video="a.mp4", **ROW)
        await asyncio.gather(*front._tasks.values())
        assert (await asked(front, "GET", f"/dubs/{made['id']}"))[1]["state"] == state
        assert len(front._replicas.seen) == min(breaks + 1, 4)

    asyncio.run(use())


BAD = {
    "no voice": ({"video": "a.mp4"}, "names no voice"),
    "strange": ({"video": "a.mp4", "voice": "v.wav", "out": "x.mp4"}, "a request is JSON"),
    "missing": ({"video": "no.mp4", **ROW}, r"no\.mp4: cannot be read"),
    "above": ({"video": "a.mp4", "voice": "v.wav", "landmarks": "../secret.npy"}, "is not below the folder"),
    "absolute": ({"video": "/etc/hostname", **ROW}, "is not below the folder"),
    "large": ({"video": "a" * 20_000, **ROW}, "a request is JSON"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_request_that_cannot_be_used(front: Front, case: str) -> None:
    import re

    row, sentence = BAD[case]
    status, answer = asyncio.run(asked(front, "POST", "/dubs", **row))
    assert status == 400
    assert re.search(sentence, answer["error"])
    assert not front._states
    assert asyncio.run(asked(front, "GET", "/dubs/x"))[0] == 404


def test_the_application_says_what_is_missing() -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    with pytest.raises(UserError, match="the service needs inputs=PATH"):
        app({"model": "m"})
