"""Where every array of a run lies on its mesh.

Parameters follow the config's ordered rules; what the optimizer and
the moving average keep of a parameter lies as the parameter does. Models know nothing of the mesh:
it is met at the edge of jit alone.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import DictKey, GetAttrKey, KeyPath

from keysync_jax.backend import HEIGHT, tracing_for
from keysync_jax.errors import UserError
from keysync_jax.train.config import AnyTrainConfig, MeshConfig
from keysync_jax.train.mesh import BATCH, rows_of
from keysync_jax.train.step import Metrics, TrainState, init_state
from keysync_jax.typing import Params

ROWS = {
    "mean": 2,
    "logvar": 2,
    "reference_mean": 2,
    "reference_logvar": 2,
    "mask": 2,
    "frame": 1,
    "mouth": 1,
}
"""Arrays of a batch that have pictures, by name: which of their axes the rows are."""

B = TypeVar("B")


class AnyStep(Protocol):
    """The step of a run of any kind: `train.step.Step`, `train.autoencoder.VAEStep`."""

    @property
    def config(self) -> AnyTrainConfig: ...

    @property
    def aids(self) -> dict[str, Params]: ...

    def apply(self, state: TrainState, aids: dict[str, Params], batch: Any) -> tuple[TrainState, Metrics]: ...


Run = Callable[[TrainState, Any], tuple[TrainState, Metrics]]


def check_rules(config: MeshConfig) -> None:
    """Refuses rules that are no regular expression or name an axis that the mesh does not have."""
    for pattern, axes in config.rules:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"mesh.rules: {pattern!r} is not a regular expression ({error})") from None
        for axis in axes:
            if axis not in ("", *BATCH):
                raise UserError(f"mesh.rules: {pattern!r} names the axis {axis!r}; there are data and fsdp")
        if len(named := [a for a in axes if a]) != len(set(named)):
            raise UserError(f"mesh.rules: {pattern!r} names an axis for two dimensions")


def spec(config: MeshConfig, mesh: Mesh, path: str, shape: Sequence[int]) -> PartitionSpec:
    """How a parameter is split: by the first rule that finds its path, not at all where none does.

    A rule names the axes of the last dimensions; one that its axis does not divide is not split.
    """
    axes = next((axes for pattern, axes in config.rules if re.search(pattern, path)), ())
    axes = ("",) * (len(shape) - len(axes)) + axes[max(len(axes) - len(shape), 0) :]
    pairs = zip(axes, shape, strict=True)
    return PartitionSpec(*(a if a and size % mesh.shape[a] == 0 else None for a, size in pairs))


def shardings(mesh: Mesh, config: MeshConfig, tree: Any) -> Any:
    """The sharding of every array of a state, or of a network's parameters.

    Args:
      tree: arrays or shapes in dictionaries path -> array, at any depth; everything else (counters)
        lies on every device.
    """
    check_rules(config)

    def sharding(keys: KeyPath, leaf: Any) -> NamedSharding:
        # Only parameters, and what is kept of each, stand in a dictionary.
        last = keys[-1] if keys else None
        path = last.key if isinstance(last, DictKey) else None
        return NamedSharding(mesh, PartitionSpec() if path is None else spec(config, mesh, path, leaf.shape))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def batch_shardings(mesh: Mesh, batch: Any) -> Any:
    """The sharding of every array of a batch: samples over `data` and `fsdp`, rows of pictures over `height`.

    Args:
      batch: arrays or shapes, in a named tuple whose pictures `ROWS` names.
    """

    def sharding(keys: KeyPath, x: Any) -> NamedSharding:
        name = keys[-1].name if keys and isinstance(keys[-1], GetAttrKey) else ""
        axis = ROWS.get(name, 0)
        split = axis and x.shape[axis] and x.shape[axis] % mesh.shape[HEIGHT] == 0
        return NamedSharding(mesh, PartitionSpec(BATCH, *(None,) * (axis - 1), *(HEIGHT,) * bool(split)))

    return jax.tree_util.tree_map_with_path(sharding, batch)


def bytes_per_device(tree: Any, placed: Any) -> int:
    """Bytes that arrays or shapes take on one device.

    Args:
      placed: their `shardings`.
    """
    sizes = jax.tree.map(lambda x, s: math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize, tree, placed)
    return sum(jax.tree.leaves(sizes))


def place(tree: Any, placed: Any) -> Any:
    """Arrays of host memory onto the devices, to each its part alone.

    Args:
      tree: numpy arrays, the same in every process; views of a mapped file are read part by part.
      placed: their `shardings`.
    """

    def put(x: Any, sharding: NamedSharding) -> jax.Array:
        return jax.make_array_from_callback(x.shape, sharding, lambda index: np.asarray(x[index]))

    return jax.tree.map(put, tree, placed)


def place_batch(mesh: Mesh, batch: B) -> B:
    """This process's rows of a batch, as its part of the global one.

    Args:
      batch: numpy arrays `[rows, ...]`: the rows of `mesh.rows_of`, whole pictures.
    """
    parts = math.prod(mesh.shape[axis] for axis in BATCH)
    # A process has as many rows of each part of the batch that it holds.
    each = len(jax.tree.leaves(batch)[0]) // len(rows_of(mesh, parts))
    places = {row: place for place, row in enumerate(rows_of(mesh, each * parts))}

    def put(x: Any, sharding: NamedSharding) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            rows = range(each * parts)[index[0]]
            return np.asarray(x[places[rows[0]] : places[rows[-1]] + 1][:, *index[1:]])

        return jax.make_array_from_callback((each * parts, *x.shape[1:]), sharding, part)

    return jax.tree.map(put, batch, batch_shardings(mesh, batch))


def state_from(mesh: Mesh, config: AnyTrainConfig, params: Params) -> TrainState:
    """The state before the first step from a checkpoint's arrays (numpy), as `place` takes them."""
    arrays = {path: np.asarray(x, np.float32) for path, x in params.items()}
    placed = place(arrays, shardings(mesh, config.mesh, arrays))

    def build(params: Params) -> TrainState:
        return init_state(config, params)

    wanted = shardings(mesh, config.mesh, jax.eval_shape(build, placed))
    return jax.jit(build, out_shardings=wanted, donate_argnums=0)(placed)


def jit_step(mesh: Mesh, step: AnyStep, state: TrainState) -> Run:
    """The step compiled for a mesh; its state is donated.

    Args:
      state: the run's, or its shapes.

    Returns:
      `run(state, batch)` for arrays that lie as `shardings` and `batch_shardings` say.
    """
    jitted, placed = _jitted(mesh, step, state)
    aids = place(jax.tree.map(np.asarray, step.aids), placed)

    def run(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        return jitted(state, aids, batch)

    return run


def lowered_step(mesh: Mesh, step: AnyStep, state: TrainState, batch: Any) -> Any:
    """The step lowered for a mesh whose devices need not be here (`jax.stages.Lowered`).

    Args:
      step: its judging networks may be shapes.
      state, batch: shapes.
    """
    jitted, _ = _jitted(mesh, step, state)
    placed = batch_shardings(mesh, batch)
    batch = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), batch, placed)
    return jitted.lower(state, step.aids, batch)


def _jitted(mesh: Mesh, step: AnyStep, state: TrainState) -> tuple[Any, Any]:
    """The jitted `step.apply`, and the shardings of its judging networks."""
    placed = shardings(mesh, step.config.mesh, state)
    aids = shardings(mesh, step.config.mesh, step.aids)

    def apply(state: TrainState, aids: dict[str, Params], batch: Any) -> tuple[TrainState, Metrics]:
        with tracing_for(mesh):
            # Gathered, as they are smaller than what they compute: the compiler would send their activations.
            whole = jax.lax.with_sharding_constraint(aids, NamedSharding(mesh, PartitionSpec()))
            return step.apply(state, whole, batch)

    jitted = jax.jit(
        apply,
        in_shardings=(placed, aids, None),  # The batch stays as it lies.
        out_shardings=(placed, NamedSharding(mesh, PartitionSpec())),
        donate_argnums=0,
    )
    return jitted, aids
