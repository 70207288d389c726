"""WavLM's relative position bias in buckets (Chen et al. 2022, section 3.1; T5's buckets)."""

import math

import jax.numpy as jnp
import numpy as np

from keysync_jax.typing import Array


def buckets(num_buckets: int, max_distance: int) -> np.ndarray:
    """Bucket of every distance key - query from -max_distance to max_distance, int32 `[2M+1]`.

    Half of the buckets is for keys after the query. Of each half, one half holds single distances and
    the other grows with the logarithm; anything farther than `max_distance` shares the last bucket.
    """
    half = num_buckets // 2
    exact = half // 2
    distance = np.arange(max_distance + 1)
    grown = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact)) / math.log(
        max_distance / exact
    )
    far = np.minimum(exact + (grown * (half - exact)).astype(np.int32), half - 1)
    one_side = np.where(distance < exact, distance, far).astype(np.int32)
    return np.concatenate([one_side[:0:-1], one_side[:1], half + one_side[1:]])


def block_bias(line: Array, offset: Array | int, queries: int, keys: int) -> Array:
    """The bias of a block of queries against a block of keys, `[H, queries, keys]`.

    Args:
      line: bias of every distance from -M to M, `[H, 2M+1]`; distances beyond take the value at M.
      offset: place of the first key minus place of the first query.
    """
    reach = line.shape[1] // 2
    distance = jnp.arange(-(queries - 1), keys) + offset
    needed = line[:, jnp.clip(distance, -reach, reach) + reach]
    # Row q is `needed` shifted right by q. Repeated at a period that is one longer than the rows, it
    # shifts by itself; a gather of queries x keys elements would be slow on a TPU.
    width = queries + keys - 1
    repeated = jnp.tile(jnp.pad(needed, ((0, 0), (0, 1))), (1, queries))[:, : queries * width]
    return repeated.reshape(-1, queries, width)[:, :, queries - 1 :]
