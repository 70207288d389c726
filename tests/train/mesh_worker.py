"""Training steps on a mesh, in a process of its own: prints one JSON line of losses and bytes.

`python -m tests.train.mesh_worker DATA,FSDP ...` runs every mesh on this process's devices. With
`PORT PROCESS PROCESSES` in front it joins the other processes first.
"""

import json
import sys
from collections.abc import Sequence
from typing import Any

import jax

from keysync_jax.nn.functional import shapes
from keysync_jax.train.batch import Batch
from keysync_jax.train.config import LossConfig, MeshConfig, OptimizerConfig, TrainConfig
from keysync_jax.train.sharding import (
    bytes_per_device,
    jit_step,
    make_mesh,
    place_batch,
    shardings,
    state_from,
)
from keysync_jax.train.step import make_stage
from tests.train.tiny_training import batch, parameters, train_config, train_step

STEPS = 5


def settings(data: int = 1, fsdp: int = 1) -> TrainConfig:
    optimizer = OptimizerConfig(warmup=0, learning_rate=1e-4, ema=0.99)
    return train_config(optimizer=optimizer, mesh=MeshConfig(data, fsdp), loss=LossConfig())


def steps_on(config: TrainConfig, devices: Sequence[jax.Device] | None = None) -> dict[str, Any]:
    """Losses of the first steps, and the bytes of parameters, optimizer and average on one device."""
    mesh = make_mesh(config.mesh, config.batch_size, devices)
    params = parameters(shapes(make_stage(config))[1])
    state = state_from(mesh, config, params)
    run = jit_step(mesh, train_step(config), state)
    kept = (state.params, state.frozen, state.opt_state, state.ema)
    found = {
        "bytes": bytes_per_device(kept, shardings(mesh, config.mesh, kept)),
        "measured": sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(kept)),
    }
    losses = []
    for step in range(STEPS):
        state, metrics = run(state, place_batch(mesh, local_rows(batch(config, step))))
        losses.append(float(metrics["loss"]))
    return found | {"losses": losses}


def local_rows(whole: Batch) -> Batch:
    """This process's part of a global batch."""
    index, count = jax.process_index(), jax.process_count()
    return Batch(*(x[len(x) * index // count : len(x) * (index + 1) // count] for x in whole))


def main(arguments: list[str]) -> None:
    if "," not in arguments[0]:
        port, process, processes = map(int, arguments[:3])
        jax.distributed.initialize(f"localhost:{port}", processes, process)
        arguments = arguments[3:]
    found: dict[str, Any] = {}
    for sizes in arguments:
        data, fsdp = map(int, sizes.split(","))
        devices = jax.devices()[: data * fsdp]
        found[sizes] = steps_on(settings(data, fsdp), devices)
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
