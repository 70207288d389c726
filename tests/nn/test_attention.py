"""The kernel and the block of queries follow the devices that the batch lies on."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from keysync_jax.backend import tracing_for
from keysync_jax.nn import attention as attention_module
from keysync_jax.nn.attention import attention

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
    """Blocks on eight devices: of one clip, of eight on one of the devices, of eight on all of them."""
    attention_module.MAX_SCORE_BYTES = 16 * SCORE_BYTES
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"))
    print(json.dumps([jax.device_count(), blocks(1), blocks(8), blocks(8, mesh)]))


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
    assert json.loads(done.stdout) == [8, 4, 32, 4]


@pytest.mark.parametrize(("platform", "kernels"), [("gpu", ["cudnn"]), ("tpu", []), ("cpu", [])])
def test_the_kernel_is_that_of_the_mesh_not_of_this_machine(
    platform: str, kernels: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program can be compiled for devices that are not here."""
    asked = []

    def kernel(q: jax.Array, k: jax.Array, v: jax.Array, implementation: str) -> jax.Array:
        asked.append(implementation)  # JAX's own looks for cuDNN in this machine.
        return q

    monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)
    device = AbstractDevice(device_kind="", num_cores=None, platform=platform)
    mesh: Any = SimpleNamespace(abstract_mesh=AbstractMesh((8,), ("data",), abstract_device=device))
    q = jnp.zeros((8, 1024, 1, 64), jnp.bfloat16)

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
