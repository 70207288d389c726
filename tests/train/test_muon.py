"""The Muon optimizer: kernels are orthogonalised as matrices, everything else moves as NAdamW moves it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from keysync_jax.train.config import OptimizerConfig
from keysync_jax.train.optimizer import make_optimizer

RATE = 1e-3


def config(kind: str, **changes: float) -> OptimizerConfig:
    settings = {"learning_rate": RATE, "warmup": 1, "clip": 0.0, "weight_decay": 0.0, "frozen": ()}
    return OptimizerConfig(kind=kind, **(settings | changes))  # type: ignore[arg-type]


def params() -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    shapes = {"conv.kernel": (3, 3, 8, 16), "dense.kernel": (24, 8), "dense.bias": (8,), "z_m": (4, 4, 4)}
    return {path: jnp.asarray(rng.standard_normal(shape), jnp.float32) for path, shape in shapes.items()}


def first_update(kind: str, **changes: float) -> dict[str, jax.Array]:
    return moved(make_optimizer(config(kind, **changes)))


def moved(optimizer: optax.GradientTransformation) -> dict[str, jax.Array]:
    at = params()
    gradient = {path: jnp.asarray(np.random.default_rng(1).standard_normal(x.shape), jnp.float32) ** 3
                for path, x in at.items()}  # fmt: skip
    return optimizer.update(gradient, optimizer.init(at), at)[0]


@pytest.mark.parametrize("path", ["conv.kernel", "dense.kernel"])
def test_a_kernels_update_is_nearly_orthogonal_and_of_adams_size(path: str) -> None:
    update = np.asarray(first_update("muon")[path])
    matrix = update.reshape(-1, update.shape[-1])
    singular = np.linalg.svd(matrix, compute_uv=False)
    assert singular.max() / singular.min() < 2
    adam = np.asarray(first_update("adamw")[path]).reshape(matrix.shape)
    spread = np.linalg.svd(adam, compute_uv=False)
    assert spread.max() / spread.min() > 2
    assert np.sqrt((update**2).mean()) == pytest.approx(0.2 * RATE, rel=0.3)


@pytest.mark.parametrize("path", ["dense.bias", "z_m"])
def test_everything_else_moves_as_nadamw_moves_it(path: str) -> None:
    nadamw = moved(optax.nadamw(RATE, weight_decay=0))[path]
    np.testing.assert_allclose(first_update("muon")[path], nadamw, rtol=1e-6)


def test_kernels_in_a_stack_move_as_they_would_alone() -> None:
    rng = np.random.default_rng(2)
    at = {
        f"{name}.kernel": jnp.asarray(rng.standard_normal(shape), jnp.float32)
        for name, shape in (("a", (3, 3, 8, 16)), ("b", (72, 16)), ("c", (1, 72, 16)), ("d", (16, 72)))
    }
    gradient = {path: jnp.asarray(rng.standard_normal(x.shape), jnp.float32) for path, x in at.items()}
    optimizer = make_optimizer(config("muon"))
    together = optimizer.update(gradient, optimizer.init(at), at)[0]
    assert list(together) == list(at)
    for path in at:
        alone = {path: at[path]}
        update = optimizer.update({path: gradient[path]}, optimizer.init(alone), alone)[0]
        np.testing.assert_allclose(together[path], update[path], atol=1e-3 * RATE)


def test_three_updates_are_optaxs() -> None:
    def matrices(params: Any) -> Any:
        whole = {2: optax.contrib.MuonDimensionNumbers(), 4: optax.contrib.MuonDimensionNumbers((0, 1, 2), 3)}
        return {path: whole[x.ndim] if path.endswith(".kernel") else None for path, x in params.items()}

    ours = make_optimizer(config("muon", weight_decay=0.1))
    theirs = optax.contrib.muon(
        RATE, weight_decay=0.1, consistent_rms=0.2, muon_weight_dimension_numbers=matrices
    )
    found = []
    for optimizer in (ours, theirs):
        rng, at, state = np.random.default_rng(3), params(), optimizer.init(params())
        for _ in range(3):
            gradient = {
                path: jnp.asarray(rng.standard_normal(x.shape), jnp.float32) for path, x in at.items()
            }
            updates, state = optimizer.update(gradient, state, at)
            at = optax.apply_updates(at, updates)
        found.append(at)
    for path, x in found[0].items():
        np.testing.assert_allclose(x, found[1][path], atol=2e-3 * RATE)


def test_on_a_mesh_the_state_lies_as_the_parameters_and_no_stack_is_gathered() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.train.muon_worker", "1,8", "2,4", "8,1"],
        env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    whole = found["1,1"]["state"]
    for mesh, parts in (("1,8", 8), ("2,4", 4), ("8,1", 1)):
        moved = found[mesh]["collectives"]
        # The rules name kernels: biases, and what 8 does not divide, are whole on every device.
        assert found[mesh]["state"] < 1.1 * whole / parts
        assert found[mesh]["off"] < 1e-6
        assert "all-gather" not in moved
        # There and back, a device is given its part; small stacks are filled up to one matrix a device.
        assert moved.get("all-to-all", 0) < (4 * whole / parts if parts > 1 else 1)
        assert moved["all-reduce"] < 0.01 * whole


def test_decay_pulls_kernels_towards_nought() -> None:
    plain, decayed = first_update("muon"), first_update("muon", weight_decay=0.5)
    np.testing.assert_allclose(
        decayed["dense.kernel"] - plain["dense.kernel"], -0.5 * RATE * params()["dense.kernel"], atol=1e-6
    )
