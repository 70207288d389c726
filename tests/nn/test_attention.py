"""The kernel and the block of queries follow the devices that the batch lies on."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from keysync_jax.backend import tracing_for
from keysync_jax.nn import attention as attention_module
from keysync_jax.nn.attention import attention
from keysync_jax.nn.splash import block_of, splash_attention

TOKENS, HEADS, WIDTH = 64, 2, 8
SCORE_BYTES = 4 * HEADS * TOKENS
"""Of one query of one clip."""


def blocks(batch: int, mesh: Any = None) -> int:
    """Blocks that the queries of a batch are walked in."""
    x = jax.ShapeDtypeStruct((batch, TOKENS, HEADS, WIDTH), "float32")

    def traced(q: jax.Array) -> jax.Array:
        if mesh is None:
            return attention(q, q, q)
        with tracing_for(mesh):
            return attention(q, q, q)

    scans = [e for e in jax.make_jaxpr(traced)(x).eqns if e.primitive.name == "scan"]
    return scans[0].params["length"] if scans else 1


def main() -> None:
    """Blocks on eight devices: of one clip, of eight on one of the devices, of eight on all of them; and what
    splash on all of them differs by."""
    attention_module.MAX_SCORE_BYTES = 16 * SCORE_BYTES
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("data", "fsdp")))
    q, k, v = (jax.device_put(x, split) for x in inputs(8, 128, 128))

    @jax.jit
    def sharded(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        with tracing_for(mesh):
            return splash_attention(q, k, v, interpret=True)

    out = sharded(q, k, v)
    assert out.sharding.is_equivalent_to(split, 4), out.sharding
    difference = float(jnp.abs(out - attention(q, k, v)).max())
    print(json.dumps([jax.device_count(), blocks(1), blocks(8), blocks(8, mesh), difference]))


def test_the_budget_is_of_the_devices_that_the_batch_lies_on() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.nn.test_attention"],
        env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    # 16 queries of a clip fit on a device: 4 blocks of 64, whatever else is there; 8 clips together fit 2.
    *counts, difference = json.loads(done.stdout)
    assert counts == [8, 4, 32, 4]
    assert difference < 1e-6


def inputs(batch: int, queries: int, keys: int) -> list[jax.Array]:
    shapes = [(batch, queries, HEADS, 64), (batch, keys, HEADS, 64), (batch, keys, HEADS, 64)]
    return [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes)]


def test_splash_computes_the_same_and_so_does_its_gradient() -> None:
    arrays = inputs(1, 256, 128)

    def loss(kernel: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
        return (kernel(*arrays) ** 2).sum()

    splash = partial(splash_attention, interpret=True)
    np.testing.assert_allclose(splash(*arrays), attention(*arrays), atol=2e-6)
    ours, theirs = (jax.grad(partial(loss, kernel), (0, 1, 2))(*arrays) for kernel in (splash, attention))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6 * float(jnp.abs(b).max()))


def test_blocks_of_splash_divide_the_tokens() -> None:
    assert [block_of(n) for n in (4096, 1024, 1152, 1280, 128, 1000)] == [1024, 1024, 384, 640, 128, None]


@pytest.mark.parametrize(
    ("platform", "tokens", "dtype", "kernels"),
    [
        ("gpu", 1024, "bfloat16", ["cudnn"]),
        ("tpu", 1024, "bfloat16", ["splash"]),
        ("tpu", 1024, "float32", []),
        ("tpu", 1000, "bfloat16", []),
        ("tpu", 1030, "bfloat16", []),
        ("gpu", 1024, "float32", []),
        ("cpu", 1024, "bfloat16", []),
    ],
)
def test_the_kernel_is_that_of_the_mesh_not_of_this_machine(
    platform: str, tokens: int, dtype: str, kernels: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program can be compiled for devices that are not here."""
    asked = []

    def kernel(q: jax.Array, k: jax.Array, v: jax.Array, implementation: str) -> jax.Array:
        asked.append(implementation)  # JAX's own looks for cuDNN in this machine.
        return q

    def splash(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        asked.append("splash")
        return q

    monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)
    monkeypatch.setattr("keysync_jax.nn.splash.splash_attention", splash)
    device = AbstractDevice(device_kind="", num_cores=None, platform=platform)
    mesh: Any = SimpleNamespace(abstract_mesh=AbstractMesh((8,), ("data",), abstract_device=device))
    q = jnp.zeros((8, tokens, 1, 64), dtype)

    def traced(q: jax.Array) -> jax.Array:
        with tracing_for(mesh):
            return attention(q, q, q)

    jax.eval_shape(traced, q)
    assert asked == kernels


@pytest.mark.parametrize(("dtype", "rounding"), [("float16", 2.0**-11), ("bfloat16", 2.0**-8)])
def test_half_precision_under_jit(dtype: str, rounding: float) -> None:
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, TOKENS, HEADS, WIDTH)).astype(dtype)
    out = jax.jit(attention)(q, k, v)
    assert out.dtype == dtype
    exact = attention(*(x.astype("float32") for x in (q, k, v)))
    assert jnp.abs(out.astype("float32") - exact).max() < 4 * rounding


if __name__ == "__main__":
    main()
