"""Threads behind bounded queues, calls that are under way, and clocks: order, bounds, faults, ends."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from keysync_jax.errors import UserError
from keysync_jax.pipeline.flow import Clock, ahead, results, spread


def threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith(("ahead", "device clock", "spread"))]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert not threads()


class Source:
    """Items 0, 1, ... with a record of how many were taken, and where and whether it was closed."""

    def __init__(self, stop: int = 10**9, fault: BaseException | None = None):
        self.taken, self.closed_in, self._stop, self._fault = 0, "", stop, fault

    def __iter__(self) -> Iterator[int]:
        try:
            while self.taken < self._stop:
                self.taken += 1
                yield self.taken - 1
            if self._fault is not None:
                raise self._fault
        finally:
            self.closed_in = threading.current_thread().name


def settled(source: Source) -> int:
    """Items taken, once no more are for a while."""
    before = -1
    while before != source.taken:
        before = source.taken
        time.sleep(0.1)
    return before


def test_items_come_in_order_and_no_more_than_asked_are_taken_before() -> None:
    source = Source(20)
    with ahead(source, 3) as items:
        assert settled(source) == 4  # three wait in the queue, one for room
        assert next(items) == 0
        assert settled(source) == 5
        assert list(items) == list(range(1, 20))
        assert next(items, None) is None
    assert source.closed_in == "ahead"


@pytest.mark.parametrize("fault", [UserError("no picture"), KeyboardInterrupt(), MemoryError()])
def test_a_fault_is_raised_whole_where_its_item_is_asked_for(fault: BaseException) -> None:
    with ahead(Source(2, fault), 5) as items:
        assert [next(items), next(items)] == [0, 1]
        for _ in range(2):
            with pytest.raises(type(fault)) as caught:
                next(items)
            assert caught.value is fault
    assert "__iter__" in [entry.name for entry in caught.traceback]  # where it was raised, in the thread


@pytest.mark.parametrize("end", ["early", ValueError, KeyboardInterrupt])
def test_the_thread_ends_with_the_block(end: Any) -> None:
    source = Source()

    def use() -> None:
        with ahead(source, 2) as items:
            next(items)
            if end != "early":
                raise end

    if end == "early":
        use()
    else:
        with pytest.raises(end):
            use()
    assert source.closed_in == "ahead"


def test_threads_after_one_another_end_in_any_state() -> None:
    source, slow = Source(), threading.Event()

    def waiting(items: Iterator[int]) -> Iterator[int]:
        for item in items:
            slow.wait(0.2)
            yield item

    with pytest.raises(KeyboardInterrupt), ahead(source, 1) as first, ahead(waiting(first), 1):
        raise KeyboardInterrupt
    assert source.closed_in == "ahead"


def test_work_is_spread_over_threads_in_the_order_of_its_items() -> None:
    source, busy, most = Source(20), [0], [0]
    lock = threading.Lock()

    def work(item: int) -> int:
        with lock:
            busy[0] += 1
            most[0] = max(most[0], busy[0])
        time.sleep(0.02 * (item % 3))
        with lock:
            busy[0] -= 1
        return 10 * item

    made = spread(work, source, 3)
    assert next(made) == 0
    assert source.taken == 4
    assert list(made) == [10 * i for i in range(1, 20)]
    assert most[0] == 3


def test_a_fault_of_spread_work_comes_in_its_items_place() -> None:
    def work(item: int) -> int:
        if item == 2:
            raise UserError("no picture")
        return item

    made = spread(work, range(9), 4)
    assert [next(made), next(made)] == [0, 1]
    with pytest.raises(UserError, match="no picture"):
        next(made)
    begun = spread(work, Source(), 2)
    assert next(begun) == 0
    begun.close()  # type: ignore[attr-defined]


def test_a_clock_counts_each_moment_once() -> None:
    clock = Clock()
    for start, end in ((1.0, 3.0), (2.0, 4.0), (2.5, 3.5), (6.0, 7.0)):
        clock.ran(start, end)
    assert clock.busy == 4.0


def test_a_call_is_dispatched_before_the_last_one_is_waited_for() -> None:
    dispatched: list[int] = []

    def calls() -> Iterator[jax.Array]:
        for i in range(4):
            dispatched.append(i)
            yield jnp.full(2, i)

    seen = [(list(dispatched), int(x[0]), type(x)) for x in results(calls())]
    assert seen == [
        ([0, 1], 0, np.ndarray),
        ([0, 1, 2], 1, np.ndarray),
        ([0, 1, 2, 3], 2, np.ndarray),
        ([0, 1, 2, 3], 3, np.ndarray),
    ]
    assert list(results(iter(()))) == []


def test_a_call_that_is_under_way_is_finished_when_the_next_cannot_be_dispatched() -> None:
    def calls() -> Iterator[jax.Array]:
        yield jnp.ones(2)
        raise KeyboardInterrupt

    made = results(calls())
    np.testing.assert_array_equal(next(made), np.ones(2))
    with pytest.raises(KeyboardInterrupt):
        next(made)


def test_clocks_count_what_is_busy_and_not_what_waits() -> None:
    def slow() -> Iterator[int]:
        for i in range(3):
            time.sleep(0.05)
            yield i

    clock = Clock()
    for _ in clock.timed(slow()):
        time.sleep(0.1)
    assert 0.15 <= clock.busy < 0.4


def test_the_device_is_busy_from_a_calls_dispatch_until_its_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while the host does something else; calls that wait for the device are not counted twice."""

    def wait(ready: float) -> None:
        time.sleep(max(ready - time.perf_counter(), 0))

    monkeypatch.setattr(jax, "block_until_ready", wait)
    monkeypatch.setattr(jax, "device_get", wait)
    device, start = Clock(), time.perf_counter()
    calls = (start + 0.1 * (i + 1) for i in range(3))  # each is ready 0.1 s after the one before
    for _ in results(calls, device):
        time.sleep(0.15)
    # 0.2 of the first two, then what is left of the third's 0.1 when it is dispatched.
    assert 0.19 <= device.busy < 0.32
    assert time.perf_counter() - start >= 0.45
