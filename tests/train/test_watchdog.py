"""A run that hangs ends itself, with the stacks of its threads and a code that asks for another start."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from keysync_jax.train.loop import StopSignals
from keysync_jax.train.watchdog import RESTART, Watchdog

HANGING = """
import time
from keysync_jax.train.watchdog import Watchdog
with Watchdog(0.4, lambda sentence: print("last:", sentence, flush=True)) as watchdog:
    time.sleep(1)  # The first step compiles.
    for step in range(3):
        watchdog.step(step)
    time.sleep(60)  # in_a_collective
"""


def test_a_step_that_sleeps() -> None:
    began = time.monotonic()
    run = subprocess.run([sys.executable, "-c", HANGING], capture_output=True, text=True, timeout=50)
    assert run.returncode == RESTART == 42, run.stderr
    assert 1.4 < time.monotonic() - began < 40
    assert "no step since step 2" in run.stderr
    assert 'File "<string>", line 8' in run.stderr  # Where the main thread hangs.
    assert run.stdout.startswith("last: no step since step 2")


def test_last_words_that_hang_do_not_keep_it_alive(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("keysync_jax.train.watchdog._LAST_WORDS_SECONDS", 0.1)
    ended = threading.Event()
    codes: list[int] = []

    def end(code: int) -> None:
        codes.append(code)
        ended.set()

    with (
        (tmp_path / "stacks").open("w") as stream,
        Watchdog(0.05, lambda sentence: time.sleep(30), end, stream) as watchdog,
    ):
        watchdog.step(1)
        assert ended.wait(20)
    assert codes == [RESTART]


def test_it_waits_for_what_is_slow_for_good_reasons() -> None:
    codes: list[int] = []
    with Watchdog(0.2, end=codes.append) as watchdog:
        time.sleep(0.5)  # Before the first step.
        watchdog.step(1)
        with watchdog.resting():
            time.sleep(0.5)
        watchdog.step(2)
    time.sleep(0.3)  # It is over.
    assert codes == []


def test_the_limit_grows_with_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    watchdog = Watchdog(600)
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    watchdog.step(1)
    for step, seconds in enumerate((2.0, 1.0, 900.0, 2.0), 2):
        now += seconds
        watchdog.step(step)
    assert watchdog.limit == 600
    for step in range(6, 20):
        now += 50
        watchdog.step(step)
    assert watchdog.limit == 20 * 50


def test_signals_outside_the_main_thread_are_left_alone() -> None:
    found: list[object] = []

    def loop() -> None:
        try:
            with StopSignals() as signals:
                found.append(signals.received(1))
        except ValueError as error:  # Python's, of signal.signal.
            found.append(error)

    thread = threading.Thread(target=loop)
    thread.start()
    thread.join()
    assert found == [None]
