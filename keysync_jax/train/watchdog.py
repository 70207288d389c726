"""Ends a run that hangs: a deadlock keeps every heartbeat alive, so only the steps tell.

A process without a step for too long shows where each of its threads is, and ends with a code that asks for
another start (docs/launching.md).
"""

import faulthandler
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import IO, NoReturn, Self

RESTART = 42
"""Exit code of a process that should be started again with the same command."""

_MEDIANS = 20
_REMEMBERED = 101
_LAST_WORDS_SECONDS = 5.0


def leave(code: int) -> NoReturn:
    """Ends this process at once, without JAX's farewell, which would wait for processes that are gone."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


class Watchdog:
    """A thread that wants to hear of a step from time to time; a context manager.

    Nothing is asked of it before the first step, which compiles.

    Args:
      stall: seconds without a step that are too long, unless 20 median steps take longer; 0: never.
      last_words: is called with a sentence before the end, in a thread of its own that has 5 seconds.
      end: ends the process; another one in tests.
    """

    def __init__(
        self,
        stall: float,
        last_words: Callable[[str], object] = lambda sentence: None,
        end: Callable[[int], object] = leave,
        stream: IO[str] | None = None,
    ):
        self._stall, self._last_words, self._end, self._stream = stall, last_words, end, stream
        self._seconds: deque[float] = deque(maxlen=_REMEMBERED)
        self._step, self._since = 0, 0.0
        self._resting = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def step(self, number: int) -> None:
        """Step `number` is done."""
        now = time.monotonic()
        if self._since:
            self._seconds.append(now - self._since)
        self._step, self._since = number, now

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Around what may take long for good reasons; the next step's time begins at its end."""
        self._resting = True
        try:
            yield
        finally:
            if self._since:
                self._since = time.monotonic()
            self._resting = False

    @property
    def limit(self) -> float:
        """Seconds without a step that are too long."""
        median = statistics.median(self._seconds) if self._seconds else 0.0
        return max(self._stall, _MEDIANS * median)

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self._stall / 4)):
            since = self._since
            if since and not self._resting and time.monotonic() - since > self.limit:
                self._bark(time.monotonic() - since)
                return

    def _bark(self, seconds: float) -> None:
        stream = self._stream or sys.stderr
        sentence = f"no step since step {self._step}, {seconds:.0f} s ago (watch.stall), so this process ends"
        with suppress(OSError, ValueError):
            print(f"keysync: {sentence}; where its threads are:", file=stream, flush=True)
            faulthandler.dump_traceback(stream, all_threads=True)
        # What hangs may be the disk.
        words = threading.Thread(target=self._last_words, args=(sentence,), daemon=True)
        words.start()
        words.join(_LAST_WORDS_SECONDS)
        self._end(RESTART)

    def __enter__(self) -> Self:
        if self._stall:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(_LAST_WORDS_SECONDS)
