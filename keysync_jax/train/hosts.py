"""What the processes of a run must agree on: the first one decides, the others are told."""

import json
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np

from keysync_jax.errors import UserError

T = TypeVar("T")

_BLOCK = 1024


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


def _from_first(content: bytes) -> bytes:
    """Process 0's bytes."""
    from jax.experimental import multihost_utils

    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    # Whole blocks: the program that tells them is compiled for a length.
    room = np.zeros(-(-length // _BLOCK) * _BLOCK, np.uint8)
    if jax.process_index() == 0:
        room[:length] = np.frombuffer(content, np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(room))[:length])
