"""The training step compiled for a machine that is not here: what each of its chips holds and does."""

from collections.abc import Sequence
from typing import Any

import jax

from keysync_jax.ahead.program import Ahead, TooLargeError, compiled, count
from keysync_jax.backend import computing
from keysync_jax.errors import UserError
from keysync_jax.nn.functional import shapes
from keysync_jax.train.autoencoder import VAEStep, make_vae
from keysync_jax.train.config import AnyTrainConfig, TrainConfig
from keysync_jax.train.distill import DistillStep, trajectory_shapes
from keysync_jax.train.flops import batch_shapes, frame_batch_shapes
from keysync_jax.train.mesh import HEIGHTS, in_words, mesh_of
from keysync_jax.train.sharding import AnyStep, lowered_step
from keysync_jax.train.start import perceptual_shapes, vae_shapes
from keysync_jax.train.step import init_state, make_stage, make_step
from keysync_jax.typing import Params


def step_ahead(config: AnyTrainConfig, devices: Sequence[Any], name: str = "step") -> Ahead:
    """Compiles the step of a run for all devices of a topology, from shapes alone.

    It is the program that a run on these devices would compile: the same mesh, kernels and shardings.

    Args:
      devices: of `ahead.chips.topology`.
      name: of the row.

    Raises:
      UserError: the mesh does not fit the devices or the batch, or the program not a chip's memory.
    """
    mesh = mesh_of(config, devices)
    step, params, batch = step_shapes(config)
    state = jax.eval_shape(lambda params: init_state(config, params), params)
    try:
        with computing(config.dtype):
            program, seconds = compiled(lambda: lowered_step(mesh, step, state, batch))
    except TooLargeError as error:
        raise UserError(
            f"the step does not fit {_counted(len(devices), devices[0].device_kind)}: {error}; it may fit "
            f"with {', or '.join(savings(config, len(devices)))}"
        ) from error
    return count(
        name, f"{summary(config)}, {in_words(mesh.shape)}", program, seconds, list(mesh.devices.flat)
    )


def step_shapes(config: AnyTrainConfig) -> tuple[AnyStep, Params, Any]:
    """The step of a run, and shapes of its network's parameters and of a global batch."""
    if not isinstance(config, TrainConfig):
        graphdef, params = shapes(make_vae(config))
        judge = vae_shapes(config) if config.decoder is not None else None
        return VAEStep(config, graphdef, judge), params, frame_batch_shapes(config)
    graphdef, params = shapes(make_stage(config))
    if config.distill is not None:
        judge = vae_shapes(config) if config.distill.decodes else None
        return DistillStep(config, graphdef, judge), params, trajectory_shapes(config)
    vae = vae_shapes(config) if config.loss.pixel != "none" else None
    return make_step(config, graphdef, vae, perceptual_shapes(config)), params, batch_shapes(config)


def summary(config: AnyTrainConfig) -> str:
    """The settings that time and memory depend on, in words."""
    if not isinstance(config, TrainConfig):
        network = "VAE" if config.decoder is None else "small decoder"
        return f"{network}, {config.batch_size} frames, {config.dtype}, remat {config.remat}"
    common = f"{config.dtype}, remat {config.remat}"
    if config.distill is not None:
        student = f"student of the {config.stage.kind} stage, {config.batch_size} windows"
        return f"{student}, {common}, {config.optimizer.kind}"
    return (
        f"{config.stage.kind} stage, {config.batch_size} clips, {common}, "
        f"pixel loss {config.loss.pixel}, {config.optimizer.kind}"
    )


def savings(config: AnyTrainConfig, devices: int) -> list[str]:
    """Settings that would take less memory than this run's, those that cost least first."""
    pixel = isinstance(config, TrainConfig) and config.loss.pixel != "none"
    most = devices // config.mesh.height
    fsdp = most if config.mesh.fsdp == -1 else config.mesh.fsdp
    tried = {
        "dtype=bf16": config.dtype != "bf16",
        "remat=block": config.remat == "none",
        "remat=layer": config.remat != "layer",
        f"mesh.fsdp={most}": fsdp < most,
        "a smaller batch_size with optimizer.accumulate": config.batch_size > most,
        "optimizer.ema=0": config.optimizer.ema > 0,
        "loss.pixel=none": pixel,
    }
    height = 2 * config.mesh.height
    more = f"more than {devices} chips"
    if config.batch_size == most and height in HEIGHTS:
        more = f"mesh.height={height} on {2 * devices} chips"
    return [setting for setting, helps in tried.items() if helps] or [more]


def _counted(devices: int, kind: str) -> str:
    return f"a {kind}" if devices == 1 else f"{devices} x {kind}"
