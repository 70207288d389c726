"""The dry run: what training takes, from shapes alone; nothing is allocated, no device is needed."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from keysync_jax.ahead.chips import device_peak
from keysync_jax.errors import UserError
from keysync_jax.nn.functional import shapes
from keysync_jax.train.autoencoder import make_vae
from keysync_jax.train.config import AnyTrainConfig, TrainConfig, VAETrainConfig
from keysync_jax.train.distill import trajectory_shapes
from keysync_jax.train.flops import (
    batch_shapes,
    distill_step_flops,
    frame_batch_shapes,
    step_flops,
    teacher_flops,
    vae_step_flops,
)
from keysync_jax.train.mesh import in_words, mesh_of
from keysync_jax.train.sharding import batch_shardings, bytes_per_device, shardings
from keysync_jax.train.start import perceptual_shapes, vae_shapes
from keysync_jax.train.step import init_state, make_stage
from keysync_jax.typing import Params

SHARE_OF_PEAK = 0.4
"""Of a device's operations a second, that a run is supposed to reach where hours are told."""

DEVICES = ("H100", "TPU v5p")
"""Devices that hours are told for."""


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
      teacher_flops: of all that a distillation's teacher does before, at most; 0 without one.
    """

    config: AnyTrainConfig
    mesh: dict[str, int]
    trainable: int
    frozen: int
    parts: tuple[Part, ...]
    flops: int
    teacher_flops: int = 0

    def hours(self, peak: float) -> float:
        """Of the whole run at `SHARE_OF_PEAK` of devices that do `peak` operations a second each."""
        devices = math.prod(self.mesh.values())
        flops = self.flops * self.config.steps + self.teacher_flops
        return flops / (SHARE_OF_PEAK * peak * devices) / 3600

    @property
    def bytes_device(self) -> int:
        """What one device holds all the time, its part of a batch included."""
        return sum(part.bytes_device for part in self.parts)

    def table(self) -> str:
        """The plan in lines of text."""
        devices, axes = math.prod(self.mesh.values()), in_words(self.mesh)
        total = self.trainable + self.frozen
        network, samples = _names(self.config)
        lines = [
            f"{network}, {self.config.dtype}, remat {self.config.remat}",
            f"mesh              {axes} = {devices} devices, {self.config.batch_size} {samples} a step",
            f"parameters        {total:,}: trainable {self.trainable:,}, frozen {self.frozen:,}",
            "",
            f"{'memory':<18}{'one copy':>16}{'on a device':>16}",
        ]
        whole = Part("together", sum(p.bytes_whole for p in self.parts), self.bytes_device)
        for part in (*self.parts, whole):
            lines.append(f"{part.name:<18}{_size(part.bytes_whole):>16}{_size(part.bytes_device):>16}")
        steps, tera = self.config.steps, self.flops / 1e12
        peaks = {name: device_peak(name) for name in DEVICES}
        hours = ", ".join(f"{self.hours(peak):,.1f} on {name}s" for name, peak in peaks.items() if peak)
        return "\n".join(
            [
                *lines,
                "Gradients (as large as what is trainable) and activations (not known here) come to this.",
                "",
                f"operations        {tera:,.2f} TFLOP a step, {tera / devices:,.2f} a device; "
                f"{self.flops * steps:.3g} FLOP in {steps:,} steps",
                *([f"teacher           {self.teacher_flops:.3g} FLOP at most"] if self.teacher_flops else []),
                f"hours             {hours}, at {SHARE_OF_PEAK:.0%} of bf16 peak; what remat computes again "
                "comes to this",
            ]
        )


class _Work(NamedTuple):
    """What a step works on, in shapes.

    Attributes:
      params: every parameter of the network that is trained.
      aids: networks that only judge, by their names in the table.
      batch: the global one.
      flops: of one step over all devices.
      teacher_flops: of a distillation's teacher.
    """

    params: Params
    aids: dict[str, Params]
    batch: Any
    flops: int
    teacher_flops: int = 0


def dry_run(config: AnyTrainConfig, devices: int = 1) -> Plan:
    """Counts what a run takes on a mesh of `devices` devices.

    Raises:
      UserError: the mesh does not fit the devices or the batch, or the config cannot be trained.
    """
    if devices < 1:
        raise UserError(f"a dry run is for 1 device or more, not {devices}")
    # Shardings ask a mesh for its sizes alone, so one device can stand for all.
    mesh = mesh_of(config, [jax.devices("cpu")[0]] * devices)
    work = _stage_work(config) if isinstance(config, TrainConfig) else _vae_work(config)
    state = jax.eval_shape(lambda params: init_state(config, params), work.params)
    trees = {
        "trainable": state.params,
        "frozen": state.frozen,
        "optimizer": state.opt_state,
        "moving average": state.ema,
        **{name: dict(params) for name, params in work.aids.items()},
    }
    parts = [
        Part(name, _bytes(tree), bytes_per_device(tree, shardings(mesh, config.mesh, tree)))
        for name, tree in trees.items()
        if tree
    ]
    split = bytes_per_device(work.batch, batch_shardings(mesh, work.batch))
    parts.append(Part("batch", _bytes(work.batch), split))
    return Plan(
        config=config,
        mesh=dict(mesh.shape),
        trainable=_count(state.params),
        frozen=_count(state.frozen),
        parts=tuple(parts),
        flops=work.flops,
        teacher_flops=work.teacher_flops,
    )


def _stage_work(config: TrainConfig) -> _Work:
    graphdef, params = shapes(make_stage(config))
    if config.distill is not None:
        judge = vae_shapes(config) if config.distill.decodes else None
        flops = distill_step_flops(config, graphdef, params, judge)
        judges = {} if judge is None else {"VAE": judge.params}
        before = teacher_flops(config, graphdef, params)
        return _Work(params, judges, trajectory_shapes(config), flops, before)
    vae = vae_shapes(config) if config.loss.pixel != "none" else None
    perceptual = perceptual_shapes(config)
    networks = {"VAE": vae, "LPIPS": perceptual}
    aids: dict[str, Params] = {name: n.params for name, n in networks.items() if n is not None}
    flops = step_flops(config, graphdef, params, vae, perceptual)
    return _Work(params, aids, batch_shapes(config), flops)


def _vae_work(config: VAETrainConfig) -> _Work:
    graphdef, params = shapes(make_vae(config))
    vae = vae_shapes(config) if config.decoder is not None else None
    flops = vae_step_flops(config, graphdef, params, vae)
    return _Work(params, {} if vae is None else {"VAE": vae.params}, frame_batch_shapes(config), flops)


def _names(config: AnyTrainConfig) -> tuple[str, str]:
    """The table's words for the network that is trained, and for what a batch is made of."""
    if isinstance(config, TrainConfig):
        return f"stage             {config.stage.kind}", "clips"
    side = config.crop_size // config.vae.factor
    latents = f"{side} x {side} x {config.vae.latent_channels}"
    network = "VAE          " if config.decoder is None else "small decoder"
    return f"{network}     {config.crop_size} pixels to {latents}", "frames"


def _count(tree: Any) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def _bytes(tree: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _size(count: int) -> str:
    unit, name = (2**30, "GiB") if count >= 2**30 // 10 else (2**20, "MiB")
    return f"{count / unit:,.2f} {name}"
