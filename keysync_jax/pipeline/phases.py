"""Progress of a run's phases, and afterwards their time, compilation and peak memory."""

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import jax.monitoring
from tqdm import tqdm

Advance = Callable[[int], object]
"""Is told how many units were done."""

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
_FROM_DISK_EVENT = "/jax/compilation_cache/cache_hits"


@dataclass(frozen=True)
class Phase:
    """What one phase took.

    Attributes:
      seconds: wall time, of which `compile_seconds` compiling `compiled` programs.
      peak_bytes: peak host memory of the process up to the end of the phase.
    """

    name: str
    seconds: float
    compiled: int
    compile_seconds: float
    peak_bytes: int


@dataclass
class Phases:
    """Collects the phases of a run; shows a bar with the time left where `show` is set."""

    show: bool = True
    done: list[Phase] = field(default_factory=list)

    @contextmanager
    def phase(self, name: str, total: int, unit: str, start: int = 0) -> Iterator[Advance]:
        """Runs a phase of `total` units, of which `start` were done by an earlier run."""
        before, compiles_before = time.perf_counter(), _Compiles.snapshot()
        with tqdm(
            total=total,
            initial=start,
            desc=f"{name:<14}",
            unit=f" {unit}",
            disable=not self.show,
            file=sys.stderr,
        ) as bar:
            yield bar.update
        count, seconds = (now - then for now, then in zip(_Compiles.snapshot(), compiles_before, strict=True))
        took = time.perf_counter() - before
        self.done.append(Phase(name, took, int(count), seconds, peak_bytes()))

    def table(self) -> str:
        """A table of the phases and their total."""
        total = Phase(
            "total",
            sum(p.seconds for p in self.done),
            sum(p.compiled for p in self.done),
            sum(p.compile_seconds for p in self.done),
            peak_bytes(),
        )
        lines = [f"{'phase':<14} {'seconds':>9} {'compiling':>10} {'programs':>9} {'peak memory':>12}"]
        for p in (*self.done, total):
            times = f"{p.seconds:9.1f} {p.compile_seconds:10.1f} {p.compiled:9d}"
            lines.append(f"{p.name:<14} {times} {p.peak_bytes / 2**30:8.2f} GiB")
        return "\n".join(lines)


def peak_bytes() -> int:
    """Peak resident host memory of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class _Compiles:
    """Counts the programs that XLA compiled in this process, and the seconds they took."""

    count = 0
    seconds = 0.0

    @classmethod
    def snapshot(cls) -> tuple[int, float]:
        return cls.count, cls.seconds

    @classmethod
    def listen(cls, event: str, duration_secs: float, **_: str | int) -> None:
        if event == _COMPILE_EVENT:
            cls.count += 1
            cls.seconds += duration_secs

    @classmethod
    def listen_hits(cls, event: str, **_: str | int) -> None:
        """A program that was found on disk is announced as compiled as well."""
        if event == _FROM_DISK_EVENT:
            cls.count -= 1


jax.monitoring.register_event_duration_secs_listener(_Compiles.listen)
jax.monitoring.register_event_listener(_Compiles.listen_hits)
