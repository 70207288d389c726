"""Worker processes that end when the process that started them ends, however it ends."""

import ctypes
import errno
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from itertools import islice
from multiprocessing import connection, resource_tracker
from multiprocessing.context import SpawnProcess
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Generic, NoReturn, Self, TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")

GRACE_SECONDS = 5.0
"""Time that workers get to remove their temporary files when they are told to stop."""

_LOOK_SECONDS = 0.5
"""Time between looks whether a signal has come."""

_PR_SET_PDEATHSIG = 1

_TERMINATED = 128 + signal.SIGTERM
"""Exit code of a worker that was told to stop."""


class CrashedError(Exception):
    """A worker ended while it was at a task, which is to blame as far as can be told: native code crashed."""


class Workers(Generic[Task, Result]):
    """Processes that call one function on tasks; a context manager.

    Each is a fresh interpreter, started when it is needed first and again after a crash. It ignores SIGINT,
    which a terminal sends to all: this process decides. When the block ends, by an exception too, SIGTERM
    tells the workers to stop; they unwind what they are at, so that their temporary files go, and those that
    take longer than `GRACE_SECONDS` are killed. When this process is killed, the system kills them.

    Args:
      function: of a module's top level. What it takes, returns and raises goes through pickle; of an
        exception neither cause nor context survives that.
      count: number of processes.
    """

    def __init__(self, function: Callable[[Task], Result], count: int):
        self._workers = [_Worker(function) for _ in range(count)]
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(count, "worker")

    def submit(self, task: Task) -> "Future[Result]":
        """Gives a task to the next worker that is free.

        The future raises what the function raised; `CrashedError` where the task ended its worker; OSError
        where a worker could not start, or was killed, as systems do when memory runs out.
        """
        return self._threads.submit(self._run, task)

    def in_order(self, tasks: Iterable[Task], ahead: int) -> "Iterator[tuple[Task, Future[Result]]]":
        """Every task with its finished future, in order; up to `ahead` are under way or wait to be taken."""
        waiting, running = iter(tasks), deque[tuple[Task, Future[Result]]]()
        while True:
            running.extend((task, self.submit(task)) for task in islice(waiting, ahead - len(running)))
            if not running:
                return
            # Not without end: Python misses a signal that comes just before it begins to wait for a lock.
            while not wait([running[0][1]], _LOOK_SECONDS).done:
                pass
            yield running.popleft()

    def _run(self, task: Task) -> Result:
        worker = self._idle.get()
        try:
            return worker.run(task)
        finally:
            self._idle.put(worker)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ends = time.monotonic() + GRACE_SECONDS
        for worker in self._workers:
            worker.tell_to_stop()
        for worker in self._workers:
            worker.kill_after(max(0.0, ends - time.monotonic()))
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.close()


class _Worker:
    """One process, from this process's side; one thread at a time runs tasks on it."""

    def __init__(self, function: Callable[[Any], Any]):
        self._function = function
        self._process: SpawnProcess | None = None
        self._pipe: connection.Connection | None = None
        self._starting = threading.Lock()
        self._stopped = False

    def run(self, task: Any) -> Any:
        pipe = self._started()
        try:
            pipe.send(task)
            done, result = pipe.recv()
        except (EOFError, ConnectionError):
            self._raise_ended(was_ready=True)
        if not done:
            raise result
        return result

    def _started(self) -> connection.Connection:
        """The pipe to the process, which is ready."""
        if self._pipe is not None:
            return self._pipe
        with self._starting:
            if self._stopped:
                raise CancelledError
            self._process, pipe = _spawn(self._function)
        self._pipe = pipe
        try:
            pipe.recv()
        except (EOFError, ConnectionError):
            self._raise_ended(was_ready=False)
        return pipe

    def _raise_ended(self, was_ready: bool) -> NoReturn:
        assert self._process is not None
        self._process.join()
        code = self._process.exitcode
        self.close()
        if code in (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGBUS, _TERMINATED):
            why = "a worker process was killed, as systems do when memory runs out; fewer workers take less"
            raise OSError(errno.ENOMEM, why)
        if not was_ready:
            raise OSError(errno.EAGAIN, f"a worker process could not start (exit code {code})")
        raise CrashedError(
            f"ended its process (exit code {code}; a crash in a decoder, or too little memory)"
        )

    def tell_to_stop(self) -> None:
        with self._starting:
            self._stopped = True
        if (process := self._process) is not None:
            process.terminate()

    def kill_after(self, seconds: float) -> None:
        process = self._process
        if process is not None and not connection.wait([process.sentinel], seconds):
            process.kill()

    def close(self) -> None:
        if self._pipe is not None:
            self._pipe.close()
        if self._process is not None:
            self._process.join()
        self._process = self._pipe = None


def _spawn(function: Callable[[Any], Any]) -> tuple[SpawnProcess, connection.Connection]:
    """A new process and this process's end of the pipe to it."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=_serve, args=(theirs, function), daemon=True
    )
    # The process is born with SIGINT blocked, as it cannot ignore it from its first moment on. When
    # multiprocessing starts its tracker it unblocks SIGINT, so that must be there before.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
    return process, ours


def _serve(pipe: connection.Connection, function: Callable[[Any], Any]) -> None:
    """What a worker does: a result for every task, until nobody is there to take it."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _stop)
    with suppress(EOFError, ConnectionError):
        pipe.send(None)
        while True:
            task = pipe.recv()
            try:
                answer = pickle.dumps((True, function(task)))
            except Exception as error:
                answer = pickle.dumps((False, _portable(error)))
            pipe.send_bytes(answer)


def _stop(*_: object) -> NoReturn:
    sys.exit(_TERMINATED)


def _portable(error: Exception) -> Exception:
    """The exception, or what can be said of it where it does not survive pickling; with its traceback."""
    trace = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(f"In a worker process:\n{trace}")
    return error


def end_with_parent() -> None:
    """Lets this process, one of multiprocessing's, be killed when its parent ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    assert parent.pid is not None
    if not _killed_by_kernel(parent.pid):
        threading.Thread(target=_follow, args=(parent.sentinel,), daemon=True).start()


def _killed_by_kernel(parent: int) -> bool:
    """Asks Linux to kill this process with its parent; False where that cannot be asked."""
    if sys.platform != "linux":
        return False
    try:
        asked = ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) == 0
    except (OSError, AttributeError):
        return False
    if os.getppid() != parent:  # It ended before it was asked.
        os._exit(1)
    return asked


def _follow(sentinel: int) -> None:
    connection.wait([sentinel])
    os.kill(os.getpid(), signal.SIGKILL)
