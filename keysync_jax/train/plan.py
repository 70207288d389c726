"""The dry run: what training takes, from shapes alone; nothing is allocated, no device is needed."""

import math
from dataclasses import dataclass
from typing import Any

import jax

from keysync_jax.errors import UserError
from keysync_jax.nn.functional import shapes
from keysync_jax.train.config import TrainConfig
from keysync_jax.train.flops import batch_shapes, step_flops
from keysync_jax.train.sharding import batch_sharding, bytes_per_device, make_mesh, shardings
from keysync_jax.train.start import load_perceptual, vae_shapes
from keysync_jax.train.step import init_state, make_stage


@dataclass(frozen=True)
class Part:
    """Something that lies on the devices.

    Attributes:
      bytes_whole: of one copy of it.
      bytes_device: what one device of the mesh holds.
    """

    name: str
    bytes_whole: int
    bytes_device: int


@dataclass(frozen=True)
class Plan:
    """What a run takes.

    Attributes:
      mesh: axis -> size.
      trainable, frozen: numbers of parameters.
      flops: of one step over all devices.
    """

    config: TrainConfig
    mesh: dict[str, int]
    trainable: int
    frozen: int
    parts: tuple[Part, ...]
    flops: int

    @property
    def bytes_device(self) -> int:
        """What one device holds all the time, its part of a batch included."""
        return sum(part.bytes_device for part in self.parts)

    def table(self) -> str:
        """The plan in lines of text."""
        devices = math.prod(self.mesh.values())
        axes = " x ".join(f"{name} {size}" for name, size in self.mesh.items())
        total = self.trainable + self.frozen
        lines = [
            f"stage             {self.config.stage.kind}, {self.config.dtype}, remat {self.config.remat}",
            f"mesh              {axes} = {devices} devices, {self.config.batch_size} clips a step",
            f"parameters        {total:,}: trainable {self.trainable:,}, frozen {self.frozen:,}",
            "",
            f"{'memory':<18}{'one copy':>16}{'on a device':>16}",
        ]
        whole = Part("together", sum(p.bytes_whole for p in self.parts), self.bytes_device)
        for part in (*self.parts, whole):
            lines.append(f"{part.name:<18}{_size(part.bytes_whole):>16}{_size(part.bytes_device):>16}")
        steps, tera = self.config.steps, self.flops / 1e12
        return "\n".join(
            [
                *lines,
                "Gradients (as large as what is trainable) and activations (not known here) come to this.",
                "",
                f"operations        {tera:,.2f} TFLOP a step, {tera / devices:,.2f} a device; "
                f"{self.flops * steps:.3g} FLOP in {steps:,} steps",
            ]
        )


def dry_run(config: TrainConfig, devices: int = 1) -> Plan:
    """Counts what a run takes on a mesh of `devices` devices.

    Raises:
      UserError: the mesh does not fit the devices or the batch, or the config cannot be trained.
    """
    if devices < 1:
        raise UserError(f"a dry run is for 1 device or more, not {devices}")
    # Shardings ask a mesh for its sizes alone, so one device can stand for all.
    mesh = make_mesh(config.mesh, config.batch_size, [jax.devices("cpu")[0]] * devices)
    graphdef, params = shapes(make_stage(config))
    state = jax.eval_shape(lambda params: init_state(config, params), params)
    vae = vae_shapes(config) if config.loss.pixel != "none" else None
    perceptual = load_perceptual(config)
    trees = {
        "trainable": state.params,
        "frozen": state.frozen,
        "optimizer": state.opt_state,
        "moving average": state.ema,
        "VAE": None if vae is None else dict(vae.params),
        "LPIPS": None if perceptual is None else dict(perceptual.params),
    }
    parts = [
        Part(name, _bytes(tree), bytes_per_device(tree, shardings(mesh, config.mesh, tree)))
        for name, tree in trees.items()
        if tree
    ]
    batch = batch_shapes(config)
    split = jax.tree.map(lambda _: batch_sharding(mesh), batch)
    parts.append(Part("batch", _bytes(batch), bytes_per_device(batch, split)))
    return Plan(
        config=config,
        mesh=dict(mesh.shape),
        trainable=_count(state.params),
        frozen=_count(state.frozen),
        parts=tuple(parts),
        flops=step_flops(config, graphdef, params, vae, perceptual),
    )


def _count(tree: Any) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def _bytes(tree: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _size(count: int) -> str:
    unit, name = (2**30, "GiB") if count >= 2**30 // 10 else (2**20, "MiB")
    return f"{count / unit:,.2f} {name}"
