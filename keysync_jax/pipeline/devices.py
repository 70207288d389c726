"""The devices of this host, and a call's rows (windows, frames) split over them.

Rows do not depend on each other, so every device runs the program of one device on its share: nothing passes
between devices, and kernels that cannot be partitioned run as they are. Where there are fewer windows than
devices, several devices share a window's branches of the guidance, and pass one sum a step.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Lowered

from keysync_jax.errors import UserError
from keysync_jax.model import Network

AXIS = "rows"

BRANCHES = "branches"
"""Axis of the devices that share the branches of a window; all of them have its rows."""

T = TypeVar("T")


@dataclass(frozen=True)
class Devices:
    """Devices that share each call; without a mesh it is the default device alone.

    Attributes:
      mesh: two devices or more, along the axis `AXIS`, and `BRANCHES` where there is one.
    """

    mesh: Mesh | None = None

    def __len__(self) -> int:
        """Parts that the rows of a call are split into."""
        return 1 if self.mesh is None else self.mesh.shape[AXIS]

    @property
    def share_branches(self) -> bool:
        return self.mesh is not None and BRANCHES in self.mesh.shape

    def for_windows(self, windows: int, branches: int) -> "Devices":
        """These devices as they do a stage of so many windows soonest, each of so many branches.

        From as many windows as devices on, each device takes windows of its own; with fewer, several share
        the branches of one, where fewer branches then follow each other.
        """
        count = len(self)
        if self.mesh is None or windows >= count:
            return self

        def depth(columns: int) -> int:
            return -(-branches // columns) * -(-windows // (count // columns))

        columns = min(range(1, min(branches, count) + 1), key=depth)
        if columns == 1:
            return self
        rows = min(count // columns, windows)
        chosen = self.mesh.devices.flat[: rows * columns].reshape(rows, columns)
        return Devices(Mesh(chosen, (AXIS, BRANCHES)))

    def split(self, rows: T) -> T:
        """Arrays `[B, ...]` onto the devices, to each its share; B is a multiple of their number."""
        return self._put(rows, PartitionSpec(AXIS))

    def copy(self, tree: T) -> T:
        """Arrays onto the devices, all to each."""
        return self._put(tree, PartitionSpec())

    def network(self, network: Network) -> Network:
        """The network with its parameters on every device."""
        return Network(network.graphdef, self.copy(network.params))

    def run(self, function: Callable[..., Any], network: Network, rows: Any, *given: Any) -> Any:
        """`function(graphdef, params, rows, *given)`, each device on its share of the rows.

        Args:
          function: jitted; of every row it makes a row of its result.
          network, given: as `network` and `copy` return them.
          rows: as `split` returns them.

        Returns:
          The rows of the result, on the devices; the call may still be running.
        """
        if self.mesh is None:
            return function(*network, rows, *given)
        return _on_each(function, self.mesh, network.graphdef, network.params, rows, given)

    def lowered(self, function: Callable[..., Any], network: Network, rows: Any, *given: Any) -> Lowered:
        """The program that `run` compiles for arrays of these shapes; once it is compiled `run` finds it.

        Args:
          network, rows: shapes in place of arrays, B rows for all devices together.
          given: arrays, as `copy` returns them.
        """
        jitted: Any = function
        if self.mesh is None:
            return jitted.lower(*network, rows, *given)
        params = self._placed(network.params, PartitionSpec())
        rows = self._placed(rows, PartitionSpec(AXIS))
        return _on_each.lower(function, self.mesh, network.graphdef, params, rows, given)

    def _put(self, tree: T, spec: PartitionSpec) -> T:
        return jax.device_put(tree, self._sharding(spec))

    def _placed(self, shapes: T, spec: PartitionSpec) -> T:
        """The shapes of arrays as `_put` puts them."""
        where = self._sharding(spec)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes)

    def _sharding(self, spec: PartitionSpec) -> NamedSharding | None:
        return None if self.mesh is None else NamedSharding(self.mesh, spec)


ONE_DEVICE = Devices()
"""The default device."""


@partial(jax.jit, static_argnums=(0, 1, 2))
def _on_each(
    function: Callable[..., Any], mesh: Mesh, graphdef: Any, params: Any, rows: Any, given: tuple[Any, ...]
) -> Any:
    split, whole = PartitionSpec(AXIS), PartitionSpec()

    def share(params: Any, rows: Any, given: tuple[Any, ...]) -> Any:
        return function(graphdef, params, rows, *given)

    # What is checked else is which values differ among the devices: all that come from rows do.
    over = jax.shard_map(share, mesh=mesh, in_specs=(whole, split, whole), out_specs=split, check_vma=False)
    return over(params, rows, given)


def check_count(count: int | None) -> None:
    """Refuses a number of devices that cannot be; which are here is not looked at."""
    if count is not None and count < 1:
        raise UserError(f"at least 1 device computes, not {count}")


def local_devices(count: int | None = None) -> Devices:
    """The first `count` devices of this host, of the kind that JAX uses by default; None: all of them.

    Raises:
      UserError: there are fewer.
    """
    check_count(count)
    here = jax.local_devices()
    if count is not None and count > len(here):
        kind = here[0].device_kind
        raise UserError(f"{count} devices were asked for, but this host has {len(here)} ({kind})")
    used = here[:count]
    return Devices() if len(used) == 1 else Devices(Mesh(np.array(used), (AXIS,)))
