"""From Flax module definitions to plain functions of a parameter dictionary, and back.

Modules are definitions only. A network in use is a `GraphDef` (static, hashable) and a flat
dictionary `{"down_blocks.0.resnets.0.conv1.kernel": array}`; inside jit, `bind` puts them together.
"""

import typing
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from keysync_jax.typing import Array, Params

Make = Callable[[nnx.Rngs], nnx.Module]
"""Builds a module from its random numbers, e.g. `lambda rngs: UNet(config, rngs=rngs)`."""


class Keys:
    """The random keys of a module's parameters; stands in for `nnx.Rngs`.

    `nnx.Rngs` counts in a Variable, whose every update under `eval_shape` costs milliseconds: half
    a minute for the full-size U-Net.
    """

    def __init__(self, seed: int):
        self._key, self._drawn = jax.random.key(seed), 0

    def params(self) -> jax.Array:
        self._drawn += 1
        return jax.random.fold_in(self._key, self._drawn)


def flatten(state: nnx.State) -> dict[str, Array]:
    """`{"a.0.kernel": value}` from an NNX state."""
    return {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}


def shapes(make: Make) -> tuple[nnx.GraphDef, dict[str, jax.ShapeDtypeStruct]]:
    """Graph and parameter shapes of a network of any size; no parameter is allocated."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: make(typing.cast(nnx.Rngs, Keys(0)))))
    return graphdef, flatten(state)


def init(make: Make, seed: int = 0) -> tuple[nnx.GraphDef, dict[str, jax.Array]]:
    """Graph and freshly initialised parameters (fp32)."""
    graphdef, state = nnx.split(make(typing.cast(nnx.Rngs, Keys(seed))))
    return graphdef, flatten(state)


def bind(graphdef: nnx.GraphDef, params: Params) -> Any:
    """The module with these parameters. Cheap: call it inside the jitted function."""
    state: Any = {tuple(_index(p) for p in path.split(".")): nnx.Param(x) for path, x in params.items()}
    return nnx.merge(graphdef, nnx.from_flat_state(state))


def select(params: Mapping[str, Array], prefix: str) -> dict[str, Array]:
    """The parameters below `prefix.`, with the prefix taken off."""
    return {k[len(prefix) + 1 :]: v for k, v in params.items() if k.startswith(prefix + ".")}


def _index(part: str) -> int | str:
    return int(part) if part.isdigit() else part
