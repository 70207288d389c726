"""Work that goes on before its result is asked for: on the device, and in threads behind bounded queues."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from queue import Full, Queue, SimpleQueue
from typing import Any, Generic, TypeVar, cast

import jax

S = TypeVar("S")
T = TypeVar("T")

_POLL_SECONDS = 0.05
"""After how long a thread that waits for room looks whether it is to end."""


@dataclass
class Clock:
    """Seconds in which one part of a machine (device, decoder, encoder) was busy."""

    busy: float = 0.0
    _until: float = field(default=0.0, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def ran(self, start: float, end: float) -> None:
        """Counts a stretch of `time.perf_counter`; where stretches overlap, each moment once."""
        with self._lock:
            self.busy += max(end - max(start, self._until), 0.0)
            self._until = max(self._until, end)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Counts the time of the block."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.busy += time.perf_counter() - start

    def timed(self, items: Iterable[T]) -> Iterator[T]:
        """The items, counting the time that each takes to come."""
        source = iter(items)
        while True:
            with self.running():
                try:
                    item = next(source)
                except StopIteration:
                    return
            yield item


@contextmanager
def ahead(items: Iterable[T], count: int) -> Iterator[Iterator[T]]:
    """Takes items in a thread, up to `count` before they are asked for, from the beginning of the block on.

    What taking one raises is raised where that item is asked for, with its traceback. At the end of the block
    the thread has ended, after the item that it was taking, and a generator was closed in it.

    JAX's settings (`backend.computing`) are each thread's own: items that compile programs set them.
    """
    reading = _Ahead(iter(items), count)
    try:
        yield reading
    finally:
        reading.stop()


class _Ahead(Iterator[T], Generic[T]):
    """The reading side of `ahead`; the queue holds (item, None), or (None, what ended the items)."""

    def __init__(self, items: Iterator[T], count: int):
        self._items = items
        self._queue: Queue[tuple[T | None, BaseException | None]] = Queue(count)
        self._stopped = threading.Event()
        self._ended: BaseException | None = None
        self._thread = threading.Thread(target=self._take_all, name="ahead", daemon=True)
        self._thread.start()

    def __next__(self) -> T:
        if self._ended is None:
            item, self._ended = self._queue.get()
        if self._ended is not None:
            if isinstance(self._ended, StopIteration):
                raise StopIteration
            raise self._ended
        return cast(T, item)

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _take_all(self) -> None:
        try:
            while not self._stopped.is_set():
                self._put(next(self._items), None)
        except BaseException as error:
            self._put(None, error)
        finally:
            close = getattr(self._items, "close", None)
            if close is not None:
                close()

    def _put(self, item: T | None, error: BaseException | None) -> None:
        while not self._stopped.is_set():
            with suppress(Full):
                self._queue.put((item, error), timeout=_POLL_SECONDS)
                return


def spread(function: Callable[[T], S], items: Iterable[T], threads: int) -> Iterator[S]:
    """What a function makes of each item, in their order, in up to `threads` threads.

    No more items are taken than are worked on, and one. What the function raises comes in its item's place.
    """
    pool, under_way = ThreadPoolExecutor(threads, "spread"), deque[Future[S]]()
    try:
        for item in items:
            under_way.append(pool.submit(function, item))
            if len(under_way) > threads:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def results(calls: Iterable[Any], device: Clock | None = None) -> Iterator[Any]:
    """What asynchronous calls return, on the host; each is waited for after the next was dispatched.

    Where dispatching the next fails or is interrupted, the call under way is finished and yielded first.

    Args:
      calls: arrays on devices (or trees of them); taking an item dispatches its call.
      device: is told how long the device was busy.
    """
    calls = iter(calls)
    under_way: list[Any] = []
    with _watching(device or Clock()) as watch:
        while True:
            try:
                under_way.append(next(calls))
                watch.put((time.perf_counter(), under_way[-1]))
            except BaseException as stop:
                yield from map(jax.device_get, under_way)
                if isinstance(stop, StopIteration):
                    return
                raise
            if len(under_way) > 1:
                yield jax.device_get(under_way.pop(0))


@contextmanager
def _watching(device: Clock) -> Iterator["SimpleQueue[tuple[float, Any] | None]"]:
    """A queue for (time, result) of every call; a thread sees when each is ready.

    A call is counted from its dispatch, or from the end of the one before it, to its result.
    """
    calls: SimpleQueue[tuple[float, Any] | None] = SimpleQueue()

    def watch() -> None:
        while (call := calls.get()) is not None:
            dispatched, result = call
            with suppress(Exception):  # It is raised where the result is asked for.
                jax.block_until_ready(result)
            device.ran(dispatched, time.perf_counter())

    thread = threading.Thread(target=watch, name="device clock", daemon=True)
    thread.start()
    try:
        yield calls
    finally:
        calls.put(None)
        thread.join()
