"""A Ray cluster as `prepare` and `dub` use it: joined or started, an actor on every device, work shared out.

Ray is imported in this folder alone, and by none but who asks for it. Every node needs this package, and sees
inputs, models and outputs under the same paths.
"""

import errno
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from keysync_jax.errors import UserError
from keysync_jax.extras import needed_for

Task = TypeVar("Task")
Result = TypeVar("Result")

RETRIES = 3
"""Times that a task is done again whose process, or node, ended."""

_LOOK_SECONDS = 1.0
"""Time between looks whether a signal has come."""


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """The module `ray`, connected to a cluster for the block.

    Args:
      address: of a cluster, as `ray.init` takes it ("auto", "HOST:PORT"). Empty: that of `RAY_ADDRESS`, or
        else a cluster of this machine alone, which ends with the block.

    Raises:
      UserError: Ray is not installed, or there is no such cluster.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with needed_for("--ray"):
        import ray

    address = address or os.environ.get("RAY_ADDRESS", "local")
    # A local cluster's dashboard is some more processes that nobody looks at.
    options = {"include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address=address, log_to_driver=False, logging_level="warning", **options)
    except (ConnectionError, ValueError) as error:
        raise UserError(f"--ray {address}: there is no such cluster ({error})") from None
    except Exception as error:  # Ray has no name for it: a node that did not start within half a minute.
        raise OSError(errno.EAGAIN, f"the Ray cluster did not start ({error})", f"--ray {address}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def device_options(ray: Any) -> list[dict[str, Any]]:
    """What each actor that computes asks for: a GPU each, all TPU chips of a host, else half of the CPUs."""
    found = ray.cluster_resources()
    if gpus := int(found.get("GPU", 0)):
        return [{"num_cpus": 0, "num_gpus": 1}] * gpus
    chips = [int(node["Resources"].get("TPU", 0)) for node in ray.nodes() if node["Alive"]]
    if any(chips):
        return [{"num_cpus": 0, "resources": {"TPU": count}} for count in chips if count]
    cpus = int(found.get("CPU", 1))
    return [{"num_cpus": 1 if cpus > 1 else 0}] * max(cpus // 2, 1)


def actors(ray: Any, kind: type, *given: Any) -> list[Any]:
    """One actor of a class on every device; those that end are started again, and redo what they were at.

    Args:
      given: to its `__init__`, the same to each.
    """
    made = ray.remote(kind)
    return [
        made.options(max_restarts=-1, max_task_retries=RETRIES, **options).remote(*given)
        for options in device_options(ray)
    ]


def outcome_of(ray: Any, made: Any) -> Any:
    """The result of a remote call.

    Raises:
      Exception: what the call raised there; OSError where the machine, or the cluster, is to blame.
    """
    try:
        return ray.get(made)
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, Exception) else error) from None
    except (ray.exceptions.OutOfMemoryError, ray.exceptions.ObjectStoreFullError) as error:
        raise OSError(errno.ENOMEM, f"a node of the Ray cluster has too little memory ({error})") from None
    except (ray.exceptions.ActorDiedError, ray.exceptions.ActorUnavailableError) as error:
        why = f"a device's process of the Ray cluster ended {1 + RETRIES} times at the same task ({error})"
        raise OSError(errno.EIO, why) from None


def shared_out(
    ray: Any, workers: Sequence[Any], tasks: Iterable[Task], start: Callable[[Any, Task], Any]
) -> Iterator[tuple[Task, Any]]:
    """Gives every actor a task whenever it is free.

    Args:
      start: begins a task on an actor; returns the reference of its result.

    Yields:
      Each task with that reference, which is ready, in the order in which they end.
    """
    waiting, idle, running = iter(tasks), deque(workers), dict[Any, tuple[Task, Any]]()
    while True:
        while idle:
            try:
                task = next(waiting)
            except StopIteration:
                break
            worker = idle.popleft()
            running[start(worker, task)] = task, worker
        if not running:
            return
        for made in ray.wait(list(running), timeout=_LOOK_SECONDS)[0]:
            task, worker = running.pop(made)
            idle.append(worker)
            yield task, made
