"""What the processes of a run must agree on: the first one decides, the others are told."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import jax
import numpy as np

from keysync_jax.errors import UserError

T = TypeVar("T")

_BLOCK = 1024


class HostsLostError(Exception):
    """Other processes of the run are gone or do not answer; started again, the same command can succeed."""


# Of the links of CPUs and GPUs, and of the service that keeps all processes together.
_LINKS = ("Gloo", "NCCL", "UNAVAILABLE", "DEADLINE_EXCEEDED", "Connection closed by peer", "barrier")


def is_loss(error: BaseException | None) -> bool:
    """Whether an exception says that another process of the run, or the way to it, is gone.

    JAX raises what its links report as JaxRuntimeError or as ValueError.
    """
    if jax.process_count() == 1 or error is None or "RESOURCE_EXHAUSTED" in str(error):
        return False
    if isinstance(error, HostsLostError | jax.errors.JaxRuntimeError):
        return True
    return isinstance(error, RuntimeError | ValueError) and any(words in str(error) for words in _LINKS)


@contextmanager
def lost_hosts_told() -> Iterator[None]:
    """Around what many processes do together: an error of the devices' links counts as the loss of a host.

    Raises:
      HostsLostError: another process, or the way to it, is gone.
    """
    try:
        yield
    except (RuntimeError, ValueError) as error:
        words = (str(error).splitlines() or [""])[0]
        if not is_loss(error):
            raise
        raise HostsLostError(
            f"another process of the run, or the way to it, is gone ({words[:300]})"
        ) from error


def decided(decide: Callable[[], T]) -> T:
    """The value of `decide()` in process 0, in every process; all of them must call this.

    What depends on a folder's content must be decided so: network file systems keep listings, so another
    process may not see yet, or still see, what the first one does, and would wait for ever in another step.

    Args:
      decide: is called in process 0 alone; its value is one that JSON can hold.

    Raises:
      UserError: `decide` raised it; in every process, with the same sentence.
    """
    if jax.process_count() == 1:
        return decide()
    answer: dict[str, Any] = {}
    if jax.process_index() == 0:
        try:
            answer = {"value": decide()}
        except UserError as error:
            answer = {"error": str(error)}
    answer = json.loads(_from_first(json.dumps(answer).encode()))
    if "error" in answer:
        raise UserError(answer["error"])
    value: T = answer["value"]
    return value


def gathered(row: dict[str, Any]) -> list[dict[str, Any]]:
    """What every process says, in the order of the processes; all of them must call this.

    Args:
      row: of JSON's types, the same keys in every process.
    """
    if jax.process_count() == 1:
        return [row]
    from jax.experimental import multihost_utils

    content = json.dumps(row).encode()
    lengths = np.asarray(multihost_utils.process_allgather(np.int32(len(content)))).reshape(-1)
    # Whole blocks: the program that tells them is compiled for a length.
    room = np.zeros(-(-int(lengths.max()) // _BLOCK) * _BLOCK, np.uint8)
    room[: len(content)] = np.frombuffer(content, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(room))
    return [json.loads(bytes(r[:n])) for r, n in zip(rows, lengths, strict=True)]


def gathered_numbers(row: np.ndarray) -> np.ndarray:
    """Numbers of every process, float32 `[n]` -> `[processes, n]`; all of them must call this."""
    if jax.process_count() == 1:
        return row[None].astype(np.float32)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(row.astype(np.float32)))


def _from_first(content: bytes) -> bytes:
    """Process 0's bytes."""
    from jax.experimental import multihost_utils

    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    # Whole blocks: the program that tells them is compiled for a length.
    room = np.zeros(-(-length // _BLOCK) * _BLOCK, np.uint8)
    if jax.process_index() == 0:
        room[:length] = np.frombuffer(content, np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(room))[:length])
