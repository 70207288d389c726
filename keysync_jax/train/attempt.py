"""What the loop tells of one attempt of a run: where time goes, which host is slow, when a save is due."""

import logging
import os
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import jax
import numpy as np

from keysync_jax.train.config import AnyTrainConfig, ProfileConfig
from keysync_jax.train.events import Events
from keysync_jax.train.hosts import gathered_numbers, is_loss
from keysync_jax.train.stragglers import Stragglers
from keysync_jax.train.watchdog import Watchdog

log = logging.getLogger(__name__)


class Attempt:
    """Watches over the steps of one attempt. A context manager, which writes down how it ends.

    Args:
      folder: of the run's logs.
      hosts: names of the processes' hosts; of one process where empty.
    """

    def __init__(self, config: AnyTrainConfig, folder: Path, hosts: Sequence[str] = ()):
        self._config, self._folder = config, folder
        self.events = Events(folder, jax.process_index() == 0)
        self.watchdog = Watchdog(config.watch.stall, self._last_words)
        self._stragglers = Stragglers(hosts or [""] * jax.process_count())
        self._profile = Profile(config.profile, folder / "profile")
        self._spent: dict[str, float] = defaultdict(float)
        self._seconds: list[float] = []
        self._since = self._saved = time.monotonic()
        self._step = 0
        self._reason = "complete"

    @contextmanager
    def spending(self, what: str) -> Iterator[None]:
        """Counts the time of the block: "data", "place", "dispatch", "save" or "preview"."""
        begun = time.monotonic()
        try:
            yield
        finally:
            self._spent[what] += time.monotonic() - begun

    def begins(self, step: int) -> None:
        """Step `step` is about to be started."""
        self._profile.begins(step)

    def first_step(self, step: int) -> None:
        """The first step is done: its compilation does not count as time of steps."""
        self.events.add("first_step", step=step)
        self._spent.clear()
        self._since, self._step = time.monotonic(), step
        self.watchdog.step(step)

    def step(self, step: int) -> None:
        """Step `step` has been started, and the one before it is done."""
        self._seconds.append(time.monotonic() - self._since - sum(self._seconds))
        self.watchdog.step(step)
        self._profile.done(step)

    def line(self, step: int) -> tuple[dict[str, float], bool]:
        """At a line of metrics, in every process: numbers for it, and whether a checkpoint is due by time."""
        steps, spent = step - self._step, self._spent
        now = time.monotonic()
        per_step = [spent[name] / max(steps, 1) for name in ("data", "place", "dispatch")]
        rows = gathered_numbers(np.array([*per_step, now - self._saved], np.float32))
        for sentence in self._stragglers.add(rows[:, :3]):
            log.warning("%s", sentence)
            self.events.add("straggler", step=step, sentence=sentence)
        if steps:
            # Within a step's time is what the host waited for; the median step is one without it.
            parts = {name: spent[name] for name in ("data", "save", "preview")}
            median = float(np.median(self._seconds)) if self._seconds else (now - self._since) / steps
            self.events.add(
                "steps", step=step, steps=steps, seconds=now - self._since, median=median, **parts
            )
        self._spent.clear()
        self._seconds.clear()
        self._since, self._step = now, step
        due = 0 < self._config.checkpoint.minutes * 60 <= float(rows[0, 3])
        # Of the host that waits longest: the others wait for it.
        return {"data_seconds_per_step": float(rows[:, 0].max())}, due

    @contextmanager
    def saving(self, step: int) -> Iterator[None]:
        """Around the part of a save that steps wait for."""
        self.events.add("save_begin", step=step)
        with self.spending("save"), self.watchdog.resting():
            yield
        self._saved = time.monotonic()

    def stopped(self, reason: str) -> None:
        """What the attempt ends for, where not because it is complete or by an exception."""
        self._reason = reason

    def _last_words(self, sentence: str) -> None:
        self.events.add("stop", reason=f"process {jax.process_index()}: {sentence}")

    def __enter__(self) -> Self:
        self.watchdog.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.watchdog.__exit__(kind, error, trace)
        self._profile.close()
        if is_loss(error):
            self._reason = "another process was lost"
        elif error is not None:
            self._reason = f"{type(error).__name__}: {str(error)[:300]}".rstrip(": ")
        self.events.add("stop", reason=self._reason)


class Profile:
    """JAX's profiler: a port to ask it at, and a trace of some steps.

    Args:
      folder: of the trace.
    """

    def __init__(self, config: ProfileConfig, folder: Path):
        self._folder = folder
        self._first, self._last = config.steps or (0, 0)
        self._tracing = False
        if config.port:
            _listen(config.port + _place_on_host())

    def begins(self, step: int) -> None:
        """Begins the trace before its first step; a run that goes on within the steps traces the rest."""
        if not self._tracing and self._first <= step <= self._last and jax.process_index() == 0:
            jax.profiler.start_trace(str(self._folder))
            self._tracing = True

    def done(self, step: int) -> None:
        """Ends the trace once the step after the last one has been started: then that one is done."""
        if self._tracing and step > self._last:
            self.close()

    def close(self) -> None:
        """Writes a trace that is under way."""
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()


def _listen(port: int) -> None:
    try:
        jax.profiler.start_server(port)
        log.warning("the profiler listens at port %d", port)
    except (RuntimeError, ValueError) as error:
        log.warning("the profiler cannot listen at port %d (%s)", port, error)


def _place_on_host() -> int:
    """Number of this process among those of its host, where a scheduler tells."""
    told = next(
        (os.environ[n] for n in ("SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK") if n in os.environ), "0"
    )
    return int(told) if told.isdigit() else 0
