"""Goodput and losses of time from events, and hosts that are slow."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keysync_jax.errors import UserError
from keysync_jax.train.attempt import Attempt
from keysync_jax.train.config import CheckpointConfig, WatchConfig
from keysync_jax.train.events import Events, read_events
from keysync_jax.train.report import report
from keysync_jax.train.stragglers import Stragglers
from tests.train.smallest_config import smallest


def write(folder: Path, *rows: tuple[int, float, str, dict[str, Any]]) -> None:
    lines = ({"attempt": a, "time": t, "event": e, **values} for a, t, e, values in rows)
    (folder / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def steps(step: int, count: int, seconds: float, **parts: float) -> dict[str, Any]:
    waits = {"data": 0.0, "save": 0.0, "preview": 0.0} | parts
    return {"step": step, "steps": count, "seconds": seconds, "median": 1.0, **waits}


def test_a_run_of_two_attempts(tmp_path: Path) -> None:
    write(
        tmp_path,
        (1, 1000.0, "start", {"processes": 2}),
        (1, 1010.0, "joined", {}),
        (1, 1015.0, "ready", {"step": 0}),
        (1, 1045.0, "first_step", {"step": 1}),
        (1, 1098.0, "steps", steps(51, 50, 53.0, data=2.0, save=1.0)),
        (1, 1150.0, "steps", steps(101, 50, 52.0, data=2.0)),
        # Killed; the checkpoint of step 60 was the last.
        (2, 1200.0, "start", {"processes": 2}),
        (2, 1210.0, "joined", {}),
        (2, 1212.0, "ready", {"step": 60}),
        (2, 1214.0, "first_step", {"step": 61}),
        (2, 1264.0, "steps", steps(111, 50, 50.0)),
        (2, 1264.0, "straggler", {"step": 111, "sentence": "process 1 on b waits for data"}),
        (2, 1274.0, "stop", {"reason": "SIGTERM"}),
    )
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"attempt": 3, "time": 1300.0, "eve')  # Cut off.
    found = report(tmp_path)
    assert (found.attempts, found.wall, found.steps, found.median) == (2, 274.0, 111, 1.0)
    assert found.goodput == pytest.approx(111 / 274)
    expected = {
        "down": 50,
        "start": 20,
        "restore": 7,
        "compile": 32,
        "data": 4,
        "save": 1,
        "preview": 0,
        "lost": 41,
    }
    assert {cause: found.lost[cause] for cause in expected} == expected
    # Nothing of the time is left out.
    assert 111 * found.median + sum(found.lost.values()) == pytest.approx(274)
    assert found.stops == ["no word after step 101 (killed, or still running)", "SIGTERM at step 111"]
    table = found.table()
    assert table.startswith("goodput 40.5 %: 111 steps of 1.000 s in 274.0 s, 2 attempts")
    assert "steps done again" in table
    assert table.endswith("process 1 on b waits for data")


def test_a_folder_without_events(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no events.jsonl"):
        report(tmp_path)


def test_events_are_only_added_to(tmp_path: Path) -> None:
    first = Events(tmp_path, active=True)
    first.add("start", at=1.0)
    Events(tmp_path, active=False).add("start")
    second = Events(tmp_path, active=True)
    second.add("start", processes=2)
    assert [(e["attempt"], e["event"]) for e in read_events(tmp_path)] == [(1, "start"), (2, "start")]


def test_an_attempt_tells_how_it_ended_and_when_a_save_is_due(tmp_path: Path) -> None:
    config = smallest()
    config = config.__class__(
        **{**config.__dict__, "checkpoint": CheckpointConfig(minutes=1e-9), "watch": WatchConfig(stall=0)}
    )

    def fails() -> None:
        with Attempt(config, tmp_path) as attempt:
            attempt.first_step(1)
            with attempt.spending("data"):
                attempt.step(2)
            found.append(attempt.line(2))
            with attempt.saving(2):
                raise ZeroDivisionError("by zero")

    found: list[tuple[dict[str, float], bool]] = []
    with pytest.raises(ZeroDivisionError):
        fails()
    ((numbers, due),) = found
    assert due
    assert numbers["data_seconds_per_step"] >= 0
    events = read_events(tmp_path)
    assert [e["event"] for e in events] == ["first_step", "steps", "save_begin", "stop"]
    assert events[-1]["reason"] == "ZeroDivisionError: by zero"
    with Attempt(smallest(), tmp_path) as attempt:  # 15 minutes are not over.
        attempt.first_step(1)
        assert attempt.line(1)[1] is False


def test_a_slow_host_is_named_the_third_time() -> None:
    rng = np.random.default_rng(0)
    stragglers = Stragglers([f"node{i}" for i in range(8)])

    def row(slow: float) -> np.ndarray:
        seconds = np.abs(rng.normal(0.02, 0.002, (8, 3)))
        seconds[5, 0] = slow
        return seconds

    assert stragglers.add(row(0.5)) == stragglers.add(row(0.5)) == []
    assert stragglers.add(row(0.02)) == []  # The row is broken.
    assert stragglers.add(row(0.5)) == stragglers.add(row(0.5)) == []
    (sentence,) = stragglers.add(row(0.5))
    assert sentence.startswith("process 5 on node5 waits for data for 0.500 s a step, the median host 0.0")
    assert stragglers.add(row(0.5)) == []  # Told once.


def test_equal_hosts_are_never_slow() -> None:
    stragglers = Stragglers(["a", "b"])
    for _ in range(10):
        assert stragglers.add(np.array([[1e-4, 2e-4, 0.0], [2e-4, 1e-4, 0.0]])) == []
