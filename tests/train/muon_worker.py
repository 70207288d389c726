"""Muon's update on meshes of eight devices, in a process of its own: prints one JSON line.

`python -m tests.train.muon_worker DATA,FSDP ...`: of each mesh the bytes of the optimizer's state on a
device, the bytes that the compiled update's collectives give a device, by kind, and how far the parameters
are from those of one device after some updates.
"""

import json
import re
import sys
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from keysync_jax.train.config import MeshConfig, OptimizerConfig, TrainConfig
from keysync_jax.train.mesh import make_mesh
from keysync_jax.train.sharding import (
    _jitted,
    bytes_per_device,
    place_batch,
    shardings,
    state_from,
)
from keysync_jax.train.step import Metrics, TrainState, update
from keysync_jax.typing import Params
from tests.train.tiny_training import train_config

UPDATES = 3
RULES = ((r"\.kernel$", ("fsdp",)),)
WIDTH = 64
SHAPES = (
    {f"block.{i}.conv.kernel": (3, 3, WIDTH, WIDTH) for i in range(6)}
    | {f"block.{i}.to_q.kernel": (WIDTH, WIDTH) for i in range(4)}
    | {f"block.{i}.in.kernel": (WIDTH, 4 * WIDTH) for i in range(3)}
    | {f"block.{i}.out.kernel": (4 * WIDTH, WIDTH) for i in range(3)}
    | {"conv_out.kernel": (3, 3, WIDTH, 4)}
    | {f"block.{i}.bias": (WIDTH,) for i in range(6)}
)
COLLECTIVE = re.compile(
    r"= (\(?[a-z].*?) (all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)\("
)


@dataclass(frozen=True)
class Quadratic:
    """A step whose loss is the squared distance of the parameters from a number of the batch."""

    config: TrainConfig
    aids = {}  # noqa: RUF012

    def apply(self, state: TrainState, aids: dict[str, Params], batch: Any) -> tuple[TrainState, Metrics]:
        def loss(params: Params) -> tuple[jax.Array, Metrics]:
            return sum(((x - batch.mean()) ** 2).sum() for x in params.values()), {}  # type: ignore[return-value]

        return update(self.config.optimizer, state, loss)


def collective_bytes(program: str) -> dict[str, int]:
    """Bytes of the results of a compiled program's collectives, by kind."""
    found: dict[str, int] = {}
    for results, kind in COLLECTIVE.findall(re.sub(r"/\*.*?\*/", "", program)):
        sizes = [d.split(",") for d in re.findall(r"f32\[([\d,]*)\]", results)]
        found[kind] = found.get(kind, 0) + sum(4 * int(np.prod([int(n) for n in d if n])) for d in sizes)
    return found


def settings(data: int, fsdp: int) -> TrainConfig:
    optimizer = OptimizerConfig(kind="muon", learning_rate=1e-2, warmup=0, frozen=())
    return train_config(optimizer=optimizer, mesh=MeshConfig(data, fsdp, RULES))


def updates_on(config: TrainConfig, devices: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    mesh = make_mesh(config.mesh, config.batch_size, jax.devices()[:devices])
    rng = np.random.default_rng(0)
    params = {path: rng.standard_normal(shape, np.float32) for path, shape in SHAPES.items()}
    state = state_from(mesh, config, params)
    jitted, _ = _jitted(mesh, Quadratic(config), state)
    batch = place_batch(mesh, np.ones(config.batch_size, np.float32))
    compiled = jitted.lower(state, {}, batch).compile()
    kept = state.opt_state
    found = {
        "state": bytes_per_device(kept, shardings(mesh, config.mesh, kept)),
        "collectives": collective_bytes(compiled.as_text()),
    }
    for _ in range(UPDATES):
        state, _ = compiled(state, {}, batch)
    return found, {path: np.asarray(x) for path, x in state.params.items()}


def main(meshes: list[str]) -> None:
    found, single = updates_on(settings(1, 1), 1)
    report = {"1,1": found}
    for sizes in meshes:
        data, fsdp = map(int, sizes.split(","))
        found, params = updates_on(settings(data, fsdp), 8)
        off = max(float(jnp.abs(params[path] - single[path]).max()) for path in params)
        report[sizes] = found | {"off": off}
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1:])
