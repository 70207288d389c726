"""Pictures whose rows are split over devices: results and gradients are those of one device."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from keysync_jax.backend import tracing_for
from keysync_jax.nn.attention import attention, attention_over_frames
from keysync_jax.nn.functional import bind, shapes
from keysync_jax.nn.layers import Conv2d

CLIPS, FRAMES, ROWS, WIDTH, HEADS = 4, 4, 4, 64, 2
"""Sizes for which XLA's gradients of two convolutions are 16 times too large where kernels are left split."""
BATCH = ("data", "fsdp")


class TwoConvolutions(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.first, self.second = (Conv2d(WIDTH, WIDTH, dtype=jnp.float32, rngs=rngs) for _ in range(2))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.second(jnp.tanh(self.first(x)))


def drawn(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).standard_normal(shape, np.float32)


def difference(run: Callable[..., Any], arguments: Any, specs: Any) -> float:
    """Largest one of value and gradients on the mesh of eight and on one device, over the largest number."""
    mesh = jax.make_mesh((2, 2, 2), (*BATCH, "height"), axis_types=(jax.sharding.AxisType.Auto,) * 3)

    def on_mesh(*arguments: Any) -> Any:
        with tracing_for(mesh):
            return run(*arguments)

    placed = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, PartitionSpec)
    )
    both = [
        jax.jit(jax.value_and_grad(run, argnums=(0, 1)))(*arguments),
        jax.jit(jax.value_and_grad(on_mesh, argnums=(0, 1)), in_shardings=placed)(*arguments),
    ]
    one, split = ([np.asarray(x) for x in jax.tree.leaves(found)] for found in both)
    return max(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in zip(one, split, strict=True))


def main() -> None:
    graphdef, abstract = shapes(TwoConvolutions)
    params = {path: drawn(*x.shape) for path, x in abstract.items()}
    kernels = {path: PartitionSpec(*(None,) * (x.ndim - 1), "fsdp") for path, x in params.items()}
    weigh = drawn(CLIPS, FRAMES, ROWS * ROWS, WIDTH)

    def convolved(params: Any, x: jax.Array) -> jax.Array:
        y = bind(graphdef, params)(x.reshape(-1, *x.shape[2:]))
        return (y.reshape(weigh.shape) * weigh).sum()

    def in_space(x: jax.Array, context: jax.Array) -> jax.Array:
        query = x.reshape(CLIPS, FRAMES, ROWS * ROWS, HEADS, -1)
        own = query.reshape(-1, *query.shape[2:])
        found = attention(own, own, own).reshape(query.shape) + attention(query, context, context)
        return (found.reshape(weigh.shape) * weigh).sum()

    def in_time(x: jax.Array, y: jax.Array) -> jax.Array:
        pixels = x.reshape(weigh.shape)
        return (attention_over_frames(pixels, pixels, y.reshape(weigh.shape), HEADS) * weigh).sum()

    pictures, rows = drawn(CLIPS, FRAMES, ROWS, ROWS, WIDTH), PartitionSpec(BATCH, None, "height")
    context = drawn(CLIPS, 3, HEADS, WIDTH // HEADS)
    found = {
        "convolutions": difference(convolved, (params, pictures), (kernels, rows)),
        "space": difference(in_space, (pictures, context), (rows, PartitionSpec(BATCH))),
        "time": difference(in_time, (pictures, 2 * pictures), (rows, rows)),
    }
    print(json.dumps(found))


def test_results_and_gradients_are_those_of_one_device() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.nn.test_split_rows"],
        env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert max(found.values()) < 1e-5, found


if __name__ == "__main__":
    main()
