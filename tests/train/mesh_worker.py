"""Training steps on a mesh, in a process of its own: prints one JSON line of losses and bytes.

`python -m tests.train.mesh_worker [--clips N] [--saved FOLDER] DATA,FSDP[,HEIGHT] ...` runs every mesh on
the first of this process's devices. With `PORT PROCESS PROCESSES` before the meshes it joins the other
processes first. With a folder, the state of the first mesh of several devices is saved half-way, and every
later mesh also goes on from there.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from keysync_jax.nn.functional import shapes
from keysync_jax.train.batch import Batch
from keysync_jax.train.checkpoint import Checkpoints
from keysync_jax.train.config import CheckpointConfig, LossConfig, MeshConfig, OptimizerConfig, TrainConfig
from keysync_jax.train.loop import abstract_state
from keysync_jax.train.mesh import mesh_of, rows_of
from keysync_jax.train.sharding import (
    bytes_per_device,
    jit_step,
    place_batch,
    shardings,
    state_from,
)
from keysync_jax.train.step import TrainState, make_stage
from tests.train.tiny_training import batch, parameters, train_config, train_step

STEPS = 5
SAVED = 3


def settings(data: int, fsdp: int, height: int = 1, clips: int = 8) -> TrainConfig:
    optimizer = OptimizerConfig(warmup=0, learning_rate=1e-4, ema=0.99)
    mesh = MeshConfig(data, fsdp, height=height)
    return train_config(optimizer=optimizer, mesh=mesh, loss=LossConfig(), batch_size=clips)


def steps_on(config: TrainConfig, devices: Sequence[jax.Device], saved: Path | None = None) -> dict[str, Any]:
    """Losses of the first steps, and the bytes of parameters, optimizer and average on one device.

    Args:
      saved: folder of a checkpoint of the first `SAVED` steps; made where it is not there, else gone on from.
    """
    mesh = mesh_of(config, devices)
    params = parameters(shapes(make_stage(config))[1])
    state = state_from(mesh, config, params)
    abstract = abstract_state(config, mesh, shapes(make_stage(config))[1])
    run = jit_step(mesh, train_step(config), state)
    kept = (state.params, state.frozen, state.opt_state, state.ema)
    found = {
        "bytes": bytes_per_device(kept, shardings(mesh, config.mesh, kept)),
        "measured": sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(kept)),
    }

    def losses(state: TrainState, start: int) -> list[float]:
        taken = []
        for step in range(start, STEPS):
            state, metrics = run(state, place_batch(mesh, local_rows(mesh, batch(config, step))))
            taken.append(float(metrics["loss"]))
            if saved is not None and not saved.exists() and step + 1 == SAVED:
                with Checkpoints(saved, CheckpointConfig()) as checkpoints:
                    checkpoints.save(state, SAVED)
        return taken

    resumed = {}
    if saved is not None and saved.exists():
        with Checkpoints(saved, CheckpointConfig()) as checkpoints:
            resumed = {"resumed": losses(checkpoints.restore(abstract), SAVED)}
    return found | resumed | {"losses": losses(state, 0)}


def local_rows(mesh: Mesh, whole: Batch) -> Batch:
    """This process's part of a global batch."""
    rows = rows_of(mesh, len(whole.mean))
    return Batch(*(x[rows] for x in whole))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--saved", type=Path)
    parser.add_argument("meshes", nargs="+")
    given = parser.parse_args()
    meshes = given.meshes
    if "," not in meshes[0]:
        port, process, processes = map(int, meshes[:3])
        jax.distributed.initialize(f"localhost:{port}", processes, process)
        meshes = meshes[3:]
    found: dict[str, Any] = {}
    for name in meshes:
        sizes = [int(size) for size in name.split(",")]
        devices = jax.devices()[: math.prod(sizes)]
        config = settings(*sizes, clips=given.clips)
        found[name] = steps_on(config, devices, given.saved if len(devices) > 1 else None)
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
