"""The first state of a run on several hosts from weights that the job reads once, not each host.

A parameter that is split over devices by its last axis lies in a file as many short runs, and one that is not
split every host would read whole. So each device takes the n-th part of a parameter's bytes as they lie in
the file, and one program on the devices, whose links are faster than a file system, puts them into place.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from keysync_jax.train.config import AnyTrainConfig
from keysync_jax.train.sharding import shardings
from keysync_jax.train.step import TrainState, init_state
from keysync_jax.typing import Params


def state_from_slices(mesh: Mesh, config: AnyTrainConfig, weights: Mapping[str, np.ndarray]) -> TrainState:
    """The state before the first step, as of `sharding.state_from`; each process reads its slices alone.

    Args:
      weights: path -> array of any float dtype, the same in every process; views of a mapped file are read
        where this process's devices need them.
    """
    wanted = {path: jax.ShapeDtypeStruct(x.shape, np.float32) for path, x in weights.items()}
    state = jax.eval_shape(lambda params: init_state(config, params), wanted)
    placed = shardings(mesh, config.mesh, state)
    split = shardings(mesh, config.mesh, wanted)

    def build(flat: Params) -> TrainState:
        params = {
            path: jax.lax.with_sharding_constraint(_shaped(flat[path], x.shape), split[path])
            for path, x in wanted.items()
        }
        return init_state(config, params)

    flat = {path: flat_array(mesh, x) for path, x in weights.items()}
    return jax.jit(build, out_shardings=placed)(flat)


def flat_array(mesh: Mesh, x: Any) -> jax.Array:
    """An array's numbers in a row, float32, equally many on each device; zeros fill the last part."""
    count = mesh.devices.size
    part = -(-x.size // count)
    row = x.reshape(-1)

    def read(index: Any) -> np.ndarray:
        first, last, _ = index[0].indices(part * count)
        found = np.zeros(last - first, np.float32)
        inside = row[first:last]
        found[: len(inside)] = inside
        return found

    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    return jax.make_array_from_callback((part * count,), sharding, read)


def _shaped(flat: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    size = int(np.prod(shape, dtype=np.int64))
    return flat[:size].reshape(shape)
