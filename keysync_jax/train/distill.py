"""The step of a distillation: from a state on the teacher's way straight to its end.

Trajectory distillation: the student's D_theta(x_k; sigma_k) is held against the clean latents that the guided
teacher's sampler ends at, inside the mask; so one branch and few steps do what three branches and many did.
Nothing in a step is random but the choice of samples and of their noise levels, which the data makes.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from keysync_jax.data.records import decode_frame
from keysync_jax.diffusion import precond
from keysync_jax.errors import UserError
from keysync_jax.media.masks import mouth_region
from keysync_jax.model import Network
from keysync_jax.nn.functional import bind
from keysync_jax.train.config import DistillConfig, TrainConfig
from keysync_jax.train.data import Epochs
from keysync_jax.train.step import Metrics, TrainState, decoded_frame, update
from keysync_jax.train.trajectories import Trajectories
from keysync_jax.typing import Array, Params


class TrajectoryBatch(NamedTuple):
    """B samples; numpy arrays from the data, device arrays in the step.

    Attributes:
      state: x at `sigma`, over sqrt(1 + sigma^2): `[B, T, h, w, 4]` fp16.
      sigma: noise level of each, `[B]` fp32.
      end: scaled latents that the teacher arrives at, like state.
      gt: scaled latents that are kept outside the mask, like state.
      reference: raw latents `[B, 1 or 2, h, w, 4]` fp16.
      audio: features `[B, T, 2, audio_dim]` fp32.
      mask: `[B, T, h, w, 1]` uint8, 1 = generate.
      frame: pixels of one frame of each, `[B, H, W, 3]` uint8; `[B, 0, 0, 3]` where the loss looks
        at none.
      mouth: 1 in a box around its mouth, `[B, H, W, 1]` uint8; `[B, 0, 0, 1]` likewise.
      frame_index: which of the T frames that is, `[B]` int32.
    """

    state: Array
    sigma: Array
    end: Array
    gt: Array
    reference: Array
    audio: Array
    mask: Array
    frame: Array
    mouth: Array
    frame_index: Array


class TrajectorySamples:
    """Sample n of a run: a record and one of the grid's levels, a function of (seed, n) alone; picklable."""

    def __init__(self, config: TrainConfig, trajectories: Trajectories):
        assert config.distill is not None
        self.config, self.distill, self.trajectories = config, config.distill, trajectories
        levels = trajectories.settings.levels
        for sigma in self.distill.grid:
            if sigma not in levels:
                raise UserError(f"{trajectories.folder}: has no states at the noise level {sigma:g}")
        self._places = [levels.index(sigma) for sigma in self.distill.grid]
        length = config.steps * config.batch_size
        self._order = Epochs(tuple(range(len(trajectories))), config.seed, length)
        if self.distill.truth and "frame" not in trajectories.read(0):
            raise UserError(f"{trajectories.folder}: has no pixels, which distill.truth needs; set it to 0")

    def __call__(self, number: int) -> TrajectoryBatch:
        """Sample `number`: a TrajectoryBatch without its first axis."""
        rng = np.random.default_rng([self.config.seed, number])
        record = self.trajectories.read(self._order[number])
        step = int(rng.integers(len(self._places)))
        size = self.config.stage.latent_size * self.config.vae.factor
        side, pixels = (size if used else 0 for used in (self.distill.decodes, self.distill.truth > 0))
        frame = decode_frame(record["frame"]) if pixels else np.zeros((0, 0, 3), np.uint8)
        mouth = mouth_region(record["landmarks"], side) if side else np.zeros((0, 0), np.uint8)
        return TrajectoryBatch(
            state=record["states"][self._places[step]],
            sigma=np.asarray(self.distill.grid[step], np.float32),
            end=record["end"],
            gt=record["gt"],
            reference=record["reference"],
            audio=record["audio"],
            mask=record["mask"],
            frame=frame,
            mouth=mouth[..., None],
            frame_index=record["shown"].astype(np.int32)[0],
        )


def huber(error: Array, width: float) -> Array:
    """Quadratic up to `width`, beyond it linear with slope 1: e^2 / (2 width), or |e| - width / 2."""
    size = jnp.abs(error)
    return jnp.where(size <= width, error**2 / (2 * width), size - width / 2)


def objective(config: DistillConfig, model: Any, vae: Any, batch: TrajectoryBatch) -> tuple[Array, Metrics]:
    """The loss of a batch, and its parts.

    Args:
      model: a bound `nn.stages.Stage`.
      vae: a bound `nn.vae.VAE`; is not read where the config decodes nothing.
    """
    state, end, gt, mask = (x.astype(jnp.float32) for x in (batch.state, batch.end, batch.gt, batch.mask))
    heard = jnp.roll(batch.audio, 1, axis=0) if config.shuffle_voices else batch.audio
    audio = model.project_audio(heard)
    key_value, reference = model.key_value(audio), batch.reference.astype(jnp.float32)

    def network(x: Array, c_noise: Array) -> Array:
        return model(x, c_noise, audio, reference, key_value)

    x = state / precond.c_in(batch.sigma)[:, None, None, None, None]
    clean = precond.denoise(network, x, batch.sigma, gt, mask)
    generated = end.shape[-1] * jnp.maximum(mask.sum(), 1)
    error = mask * (clean - end)
    trajectory = huber(error, config.huber).sum() / generated
    loss, parts = trajectory, {"loss_trajectory": trajectory, "rmse": jnp.sqrt((error**2).sum() / generated)}
    if config.decodes:
        drawn = jnp.clip(decoded_frame(vae, clean, batch.frame_index), -1, 1)
    if config.decoded:
        wanted = jnp.clip(decoded_frame(vae, end, batch.frame_index), -1, 1)
        parts["loss_decoded"] = _in_mouth(drawn - wanted, batch.mouth)
        loss += config.decoded * parts["loss_decoded"]
    if config.truth:
        parts["loss_truth"] = _in_mouth(drawn - (batch.frame / 127.5 - 1), batch.mouth)
        loss += config.truth * parts["loss_truth"]
    return loss, {"loss": loss, **parts}


def _in_mouth(error: Array, mouth: Array) -> Array:
    """Mean absolute error within a region of ones `[B, H, W, 1]`."""
    return (jnp.abs(error) * mouth).sum() / (3 * jnp.maximum(mouth.sum(), 1))


@dataclass(frozen=True)
class DistillStep:
    """`apply(state, aids, batch) -> (state, metrics)`, pure.

    Attributes:
      graphdef: of `make_stage(config)`.
      vae: the frozen VAE of the terms on pixels; None where there are none.
    """

    config: TrainConfig
    graphdef: nnx.GraphDef
    vae: Network | None

    @property
    def aids(self) -> dict[str, Params]:
        """Parameters of the network that only judges."""
        return {} if self.vae is None else {"vae": self.vae.params}

    def apply(
        self, state: TrainState, aids: dict[str, Params], batch: TrajectoryBatch
    ) -> tuple[TrainState, Metrics]:
        """One update by the gradient of `objective`."""

        def loss(params: Params) -> tuple[Array, Metrics]:
            return self.loss({**state.frozen, **params}, aids, batch)

        return update(self.config.optimizer, state, loss)

    def loss(self, params: Params, aids: dict[str, Params], batch: TrajectoryBatch) -> tuple[Array, Metrics]:
        """`objective` as a function of all parameters of the stage."""
        assert self.config.distill is not None
        vae = None if self.vae is None else bind(self.vae.graphdef, aids["vae"])
        return objective(self.config.distill, bind(self.graphdef, params), vae, batch)


def trajectory_shapes(config: TrainConfig) -> TrajectoryBatch:
    """Shapes of a global batch."""
    assert config.distill is not None
    stage, b, c = config.stage, config.batch_size, config.vae.latent_channels
    t, side, references = stage.frames, stage.latent_size, 1 if stage.kind == "keyframe" else 2
    size = side * config.vae.factor
    mouth, pixels = (size if used else 0 for used in (config.distill.decodes, config.distill.truth > 0))

    def array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((b, *shape), dtype)

    latents = array(jnp.float16, t, side, side, c)
    return TrajectoryBatch(
        state=latents,
        sigma=array(jnp.float32),
        end=latents,
        gt=latents,
        reference=array(jnp.float16, references, side, side, c),
        audio=array(jnp.float32, t, 2, stage.audio_dim),
        mask=array(jnp.uint8, t, side, side, 1),
        frame=array(jnp.uint8, pixels, pixels, 3),
        mouth=array(jnp.uint8, mouth, mouth, 1),
        frame_index=array(jnp.int32),
    )
