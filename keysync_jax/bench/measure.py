"""Seconds, memory and operations of one program; compiling apart from running."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from keysync_jax.ahead.chips import device_peak
from keysync_jax.backend import computing
from keysync_jax.bench.workloads import Workload, random_arrays
from keysync_jax.pipeline.phases import peak_bytes
from keysync_jax.train.flops import training_flops

_STORE = "jax_enable_compilation_cache"


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, several times over.

    Attributes:
      median, lowest, highest: of the calls after the warm-up.
      calls: how many.
    """

    median: float
    lowest: float
    highest: float
    calls: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Timing":
        return cls(statistics.median(seconds), min(seconds), max(seconds), len(seconds))


@dataclass(frozen=True)
class Measured:
    """One row of the table.

    Attributes:
      compile_seconds: tracing, lowering and compiling, with nothing taken from a store.
      frames: video frames of one call.
      flop: matrix products and convolutions of one call, counted from the program's shapes.
      peak: bf16 operations a second of the device by its maker's sheet; None where it is not known.
      device_bytes: arguments, result and temporaries by the compiler's count.
      host_bytes: peak of the process until then.
      other: the same work in PyTorch, where it was measured beside it.
    """

    name: str
    note: str
    compile_seconds: float
    timing: Timing
    frames: int
    flop: int
    peak: float | None
    device_bytes: int
    host_bytes: int
    other: Timing | None = None

    @property
    def frames_per_second(self) -> float:
        return self.frames / self.timing.median

    @property
    def flop_per_second(self) -> float:
        return self.flop / self.timing.median

    @property
    def share_of_peak(self) -> float | None:
        return None if self.peak is None else self.flop_per_second / self.peak

    @property
    def ratio(self) -> float | None:
        """Our median over PyTorch's, of calls that took turns in the same process."""
        return None if self.other is None else self.timing.median / self.other.median


Call = Callable[[], Any]


def measure(
    workload: Workload, repeats: int, beside: Callable[[dict[str, Any]], Call] | None = None
) -> Measured:
    """Compiles and times a workload on the default device.

    Args:
      repeats: timed calls, after one that is not.
      beside: makes, of the same parameters and inputs (`params/NAME`, `inputs/NAME`), a call of other code
        that waits for its result; the two take turns, so that what else the machine does hits both.
    """
    device = jax.devices()[0]
    compiled, seconds = _compiled(workload)
    params, inputs = random_arrays(workload.params), random_arrays(workload.inputs, seed=1)
    other = None if beside is None else beside({"params": params, "inputs": inputs})
    on_device = jax.device_put((params, inputs), device)
    del params, inputs

    def ours() -> None:
        jax.block_until_ready(compiled(*on_device))

    mine, theirs = _take_turns([ours, *([other] if other else [])], repeats)
    memory = compiled.memory_analysis()
    return Measured(
        workload.name,
        workload.note,
        seconds,
        mine,
        workload.frames,
        flop_of(workload),
        device_peak(device.device_kind),
        memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes,
        peak_bytes(),
        theirs,
    )


def flop_of(workload: Workload) -> int:
    """Operations of one call: 2 a multiply-add of matrix products and convolutions."""
    jaxpr = jax.make_jaxpr(workload.run)(workload.params, workload.inputs).jaxpr
    return training_flops(jaxpr, [False] * len(jaxpr.invars))[0]


def _compiled(workload: Workload) -> tuple[Any, float]:
    """The program and the seconds it took to make it, whatever is in the store of compiled programs."""
    with nothing_stored(), computing(workload.dtype):
        before = time.perf_counter()
        compiled = jax.jit(workload.run).lower(workload.params, workload.inputs).compile()
        return compiled, time.perf_counter() - before


@contextmanager
def nothing_stored() -> Iterator[None]:
    """In the block programs are compiled, whatever is in the store of compiled programs."""
    stored = getattr(jax.config, _STORE)
    jax.config.update(_STORE, False)
    try:
        yield
    finally:
        jax.config.update(_STORE, stored)


@contextmanager
def fresh_store(folder: Path) -> Iterator[None]:
    """In the block programs are kept in this folder alone: each is compiled once, none is there before.

    Args:
      folder: an empty one.
    """
    ours = {"jax_compilation_cache_dir": str(folder), "jax_persistent_cache_min_compile_time_secs": 0.0}
    before = {name: getattr(jax.config, name) for name in ours}
    _use_store(ours)
    try:
        yield
    finally:
        _use_store(before)


def _use_store(settings: Mapping[str, Any]) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # JAX opens a store once.


def _take_turns(calls: Sequence[Call], repeats: int) -> tuple[Timing, Timing | None]:
    """Times of the first call and, where there is one, of the second."""
    for call in calls:
        call()
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for call, taken in zip(calls, seconds, strict=True):
            before = time.perf_counter()
            call()
            taken.append(time.perf_counter() - before)
    timings = [Timing.of(taken) for taken in seconds]
    return timings[0], timings[1] if len(timings) > 1 else None
