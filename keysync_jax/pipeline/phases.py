"""Progress of a run's phases, and afterwards their time, compilation and peak memory."""

import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax.monitoring
from tqdm import tqdm

from keysync_jax.pipeline.flow import Clock

Advance = Callable[[int], object]
"""Is told how many units were done."""

Told = Callable[[str, int, int], object]
"""Is told a phase's name, how many of its units are done, and how many there are."""

PARTS = ("device", "decoder", "encoder")
"""Of the machine, whose busy time a phase may tell; the rest of the phase they wait."""

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
_FROM_DISK_EVENT = "/jax/compilation_cache/cache_hits"


@dataclass(frozen=True)
class Phase:
    """What one phase took.

    Attributes:
      seconds: wall time.
      compiled, compile_seconds: programs compiled meanwhile and what they took, all threads together.
      peak_bytes: peak host memory of the process up to the end of the phase.
      busy: seconds in which each of `PARTS` that the phase has was busy.
    """

    name: str
    seconds: float
    compiled: int
    compile_seconds: float
    peak_bytes: int
    busy: Mapping[str, float] = field(default_factory=dict)


@dataclass
class Phases:
    """Collects the phases of a run; shows a bar with the time left where `show` is set.

    Attributes:
      told: is told where a phase is: its name, units done, and all of them.
    """

    show: bool = True
    told: Told | None = None
    done: list[Phase] = field(default_factory=list)

    @contextmanager
    def phase(self, name: str, total: int, unit: str, start: int = 0, **parts: Clock) -> Iterator[Advance]:
        """Runs a phase of `total` units, of which `start` were done by an earlier run.

        Args:
          parts: a clock for each of `PARTS` that the phase has.
        """
        before, compiles_before = time.perf_counter(), _Compiles.snapshot()
        with tqdm(
            total=total,
            initial=start,
            desc=f"{name:<14}",
            unit=f" {unit}",
            disable=not self.show,
            file=sys.stderr,
        ) as bar:
            yield bar.update if self.told is None else _telling(self.told, bar, name, total, start)
        count, seconds = (now - then for now, then in zip(_Compiles.snapshot(), compiles_before, strict=True))
        took = time.perf_counter() - before
        busy = {part: clock.busy for part, clock in parts.items()}
        self.done.append(Phase(name, took, int(count), seconds, peak_bytes(), busy))

    def table(self) -> str:
        """A table of the phases and their total; of the parts of the machine, busy / waiting seconds."""
        total = Phase(
            "total",
            sum(p.seconds for p in self.done),
            sum(p.compiled for p in self.done),
            sum(p.compile_seconds for p in self.done),
            peak_bytes(),
        )
        shown = [part for part in PARTS if any(part in p.busy for p in self.done)]
        lines = [f"{'phase':<14} {'seconds':>9} {'compiling':>10} {'programs':>9} {'peak memory':>12}"]
        lines[0] += "".join(f" {part:>15}" for part in shown)
        for p in (*self.done, total):
            times = f"{p.seconds:9.1f} {p.compile_seconds:10.1f} {p.compiled:9d}"
            parts = "".join(f" {_busy_and_waiting(p, part):>15}" for part in shown)
            lines.append(f"{p.name:<14} {times} {p.peak_bytes / 2**30:8.2f} GiB{parts}".rstrip())
        return "\n".join(lines)


def _telling(told: Told, bar: Any, name: str, total: int, start: int) -> Advance:
    done = start
    told(name, done, total)

    def advance(count: int) -> None:
        nonlocal done
        done += count
        bar.update(count)
        told(name, done, total)

    return advance


def _busy_and_waiting(phase: Phase, part: str) -> str:
    """Seconds; empty where the phase does without the part."""
    if part not in phase.busy:
        return ""
    busy = phase.busy[part]
    return f"{busy:.1f} / {max(phase.seconds - busy, 0):.1f}"


def peak_bytes() -> int:
    """Peak resident host memory of this process."""
    # Where there is such a file. `ru_maxrss` of a started process begins at what its parent held at the fork.
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class _Compiles:
    """Counts the programs that XLA compiled in this process, and the seconds they took."""

    count = 0
    seconds = 0.0
    lock = threading.Lock()

    @classmethod
    def snapshot(cls) -> tuple[int, float]:
        return cls.count, cls.seconds

    @classmethod
    def listen(cls, event: str, duration_secs: float, **_: str | int) -> None:
        if event == _COMPILE_EVENT:
            with cls.lock:
                cls.count += 1
                cls.seconds += duration_secs

    @classmethod
    def listen_hits(cls, event: str, **_: str | int) -> None:
        """A program that was found on disk is announced as compiled as well."""
        if event == _FROM_DISK_EVENT:
            with cls.lock:
                cls.count -= 1


jax.monitoring.register_event_duration_secs_listener(_Compiles.listen)
jax.monitoring.register_event_listener(_Compiles.listen_hits)
