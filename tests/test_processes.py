"""Worker processes: results in order, errors whole, and nothing left of them however this process ends."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

import pytest

from keysync_jax import processes
from keysync_jax.errors import UserError
from keysync_jax.files import temporary
from keysync_jax.processes import CrashedError, Workers
from tests.processes import children, hidden_names, is_alive, wait_until

ROOT = Path(__file__).parents[1]


def square(number: int) -> int:
    time.sleep(0.05 * (number % 3))
    return number * number


def fail(number: int) -> NoReturn:
    raise OSError(number, os.strerror(number), "clip.mp4")


def fail_unpicklably(_: int) -> NoReturn:
    class LocalError(Exception):
        pass

    raise LocalError("lost otherwise")


def crash(number: int) -> int:
    if number == 1:
        os.abort()
    return number


def be_killed(_: int) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def pid(_: int) -> int:
    time.sleep(0.2)
    return os.getpid()


def test_results_come_in_order_and_few_are_ahead() -> None:
    taken = []

    def tasks() -> "list[int] | object":
        for number in range(12):
            taken.append(number)
            yield number

    with Workers(square, 2) as pool:
        for number, done in pool.in_order(tasks(), ahead=4):  # type: ignore[arg-type]
            assert done.result() == number * number
            assert len(taken) <= number + 4


def test_every_worker_works_and_none_is_left() -> None:
    before = children(os.getpid())
    with Workers(pid, 2) as pool:
        pids = {done.result() for _, done in pool.in_order(range(6), ahead=6)}
        assert len(pids) == 2
        assert os.getpid() not in pids
    # The tracker of multiprocessing stays.
    assert len(children(os.getpid()) - before) <= 1
    assert not any(is_alive(worker) for worker in pids)


def test_errors_come_back_with_what_they_say() -> None:
    with Workers(fail, 1) as pool, pytest.raises(OSError, match="Stale") as error:
        pool.submit(errno.ESTALE).result()
    assert (error.value.errno, error.value.filename) == (errno.ESTALE, "clip.mp4")
    assert "in fail" in error.value.__notes__[0]
    with (
        Workers(fail_unpicklably, 1) as pool,
        pytest.raises(RuntimeError, match="LocalError: lost otherwise"),
    ):
        pool.submit(0).result()


def test_a_crash_is_the_tasks_and_a_kill_the_machines() -> None:
    with Workers(crash, 1) as pool:
        assert pool.submit(0).result() == 0
        with pytest.raises(CrashedError, match=f"exit code {-signal.SIGABRT}"):
            pool.submit(1).result()
        assert pool.submit(2).result() == 2
    with Workers(be_killed, 1) as pool, pytest.raises(OSError, match="was killed") as error:
        pool.submit(0).result()
    assert error.value.errno == errno.ENOMEM


class Unloadable:
    """Cannot be unpickled, so a process that is given it cannot start."""

    def __reduce__(self) -> tuple[object, ...]:
        return fail, (errno.EMFILE,)

    def __call__(self, _: int) -> None:
        raise AssertionError


def test_a_worker_that_cannot_start_is_no_tasks_fault(capfd: pytest.CaptureFixture[str]) -> None:
    with Workers(Unloadable(), 1) as pool, pytest.raises(OSError, match="could not start") as error:
        pool.submit(0).result()
    assert error.value.errno == errno.EAGAIN
    assert "Too many open files" in capfd.readouterr().err


def write_and_wait(folder: str) -> None:
    with temporary(Path(folder) / f"{os.getpid()}.txt"):
        time.sleep(60)


WAITING = """
import signal, sys
from keysync_jax.processes import Workers
from tests.test_processes import write_and_wait
def stop(*_):
    raise KeyboardInterrupt
signal.signal(signal.SIGTERM, stop)
with Workers(write_and_wait, 2) as pool:
    for _, done in pool.in_order([sys.argv[1]] * 4, 4):
        done.result()
"""


def start_waiting(folder: Path) -> "tuple[subprocess.Popen[str], set[int]]":
    """A process in a group of its own whose two workers each have a temporary file, and the workers."""
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING, str(folder)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_until(lambda: len(list(folder.iterdir())) == 2, 60, "both workers work")
    return process, {int(path.name[1:].partition(".")[0]) for path in folder.iterdir()}


@pytest.mark.parametrize("to_all", [True, False])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_ordered_stop_ends_the_workers_and_leaves_nothing(
    tmp_path: Path, number: signal.Signals, to_all: bool
) -> None:
    """Ctrl-C and a scheduler's SIGTERM go to all processes of a group, `kill` to one."""
    process, workers = start_waiting(tmp_path)
    (os.killpg if to_all else os.kill)(process.pid, number)
    _, errors = process.communicate(timeout=12 * processes.GRACE_SECONDS)
    if not (to_all and number == signal.SIGTERM):  # Then workers may end before the parent has heard of it.
        assert errors.count("Traceback") == 1  # The parent's own.
        assert "KeyboardInterrupt" in errors
    assert not any(is_alive(worker) for worker in workers)
    assert hidden_names(tmp_path) == []


def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    process, workers = start_waiting(tmp_path)
    everyone = children(process.pid)
    assert workers < everyone
    process.kill()
    process.communicate()
    wait_until(lambda: not any(is_alive(pid) for pid in everyone), 5, "all processes have ended")


WITHOUT_THE_KERNEL = """
import sys, time
from keysync_jax import processes
from tests.test_processes import follow_and_wait
if __name__ == "__main__":
    import multiprocessing
    context = multiprocessing.get_context("spawn")
    context.Process(target=follow_and_wait, args=(sys.argv[1],)).start()
    time.sleep(60)
"""


def follow_and_wait(folder: str) -> None:
    processes._killed_by_kernel = lambda _: False
    processes.end_with_parent()
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(60)


def test_they_end_where_the_kernel_cannot_be_asked(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_THE_KERNEL, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT) as process:
        wait_until(lambda: list(tmp_path.iterdir()), 60, "the worker waits")
        process.kill()
    worker = int(next(tmp_path.iterdir()).name)
    wait_until(lambda: not is_alive(worker), 5, "the worker has ended")


def test_a_sentence_stays_one() -> None:
    with Workers(refuse, 1) as pool, pytest.raises(UserError) as error:
        pool.submit(0).result()
    assert str(error.value) == "cannot be used"


def refuse(_: int) -> NoReturn:
    raise UserError("cannot be used")
