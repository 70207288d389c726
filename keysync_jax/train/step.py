"""The training step: a batch in, one update of the trainable parameters out (paper, section 3.3).

Layers of pure functions: `draw_clips` and `draw_noise` make every random choice of a step; `objective` is the
loss with these choices given; `update` moves the parameters by the gradient of any loss; `Step` is all of it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from keysync_jax.diffusion import loss as losses
from keysync_jax.diffusion import precond
from keysync_jax.errors import UserError
from keysync_jax.model import DTYPES, Network
from keysync_jax.nn.functional import Make, bind
from keysync_jax.nn.stages import stage
from keysync_jax.train.batch import Batch
from keysync_jax.train.config import AnyTrainConfig, LossConfig, OptimizerConfig, TrainConfig
from keysync_jax.train.optimizer import learning_rate, make_optimizer, moving_average, partition
from keysync_jax.typing import Array, Params

Metrics = dict[str, Array]
"""Scalars fp32 of one step, by name."""

Loss = Callable[[Params], tuple[Array, Metrics]]
"""Of the trainable parameters: the loss, and its parts."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that a run must keep to go on; every array fp32 but the counters.

    Attributes:
      step: batches taken so far, int32 `[]`.
      params: the trainable parameters, path -> array.
      frozen: the others.
      opt_state: of `make_optimizer`, over `params`.
      ema: moving average of `params`; None where the config asks for none.
    """

    step: Array
    params: dict[str, Array]
    frozen: dict[str, Array]
    opt_state: Any
    ema: dict[str, Array] | None


class Clips(NamedTuple):
    """What a batch shows, its latents drawn.

    Attributes:
      gt: scaled latents `[B, T, h, w, 4]`.
      reference: raw latents `[B, 1 or 2, h, w, 4]`.
      audio: features `[B, T, 2, audio_dim]`.
      mask: `[B, T, h, w, 1]`, 1 = generate.
      frame: pixels of one frame of each clip, `[B, H, W, 3]` in [-1, 1]; empty without a pixel loss.
      frame_index: which of the T frames that is, `[B]`.
    """

    gt: Array
    reference: Array
    audio: Array
    mask: Array
    frame: Array
    frame_index: Array


class Noise(NamedTuple):
    """The choices of a step that are not the data's.

    Attributes:
      sigma: `[B]`.
      noise: standard normal, like `Clips.gt`.
      keep_audio: bool `[B]`; the clip's audio is zero where false.
      keep_reference: the same of the reference, `[B]`, or `[B, T]` where each frame's is dropped alone.
    """

    sigma: Array
    noise: Array
    keep_audio: Array
    keep_reference: Array


def make_stage(config: TrainConfig) -> Make:
    """Builds the network that a run trains."""
    dtype = DTYPES[config.dtype]
    return lambda rngs: stage(config.stage, dtype=dtype, remat=config.remat, rngs=rngs)


def init_state(config: AnyTrainConfig, params: Params) -> TrainState:
    """The state before the first step.

    Args:
      params: every parameter of the stage. Arrays on a device are taken over, not copied: a step that
        donates its state frees them.
    """
    trainable, frozen = (
        {path: jnp.asarray(x, jnp.float32) for path, x in part.items()}
        for part in partition(config.optimizer, params)
    )
    ema = {path: jnp.copy(x) for path, x in trainable.items()} if config.optimizer.ema else None
    opt_state = make_optimizer(config.optimizer).init(trainable)
    return TrainState(jnp.zeros((), jnp.int32), trainable, frozen, opt_state, ema)


def draw_clips(config: TrainConfig, batch: Batch, key: Array) -> Clips:
    """Draws the latents of a batch from their posteriors, or takes the means.

    The two references of an interpolation clip are its own first and last latents, so that they agree
    with what is to be generated.
    """
    latent_key, reference_key, noise_key = jax.random.split(key, 3)

    def raw_latents(mean: Array, logvar: Array, key: Array) -> Array:
        # They come as they are stored, in fp16; all that is done with them is done in fp32.
        mean, logvar = mean.astype(jnp.float32), logvar.astype(jnp.float32)
        if not config.data.sample_posterior:
            return mean
        return mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)

    raw = raw_latents(batch.mean, batch.logvar, latent_key)
    if config.stage.kind == "keyframe":
        reference = raw_latents(batch.reference_mean, batch.reference_logvar, reference_key)
    else:
        reference = raw[:, jnp.array([0, -1])]
    if config.data.reference_noise:
        reference += config.data.reference_noise * jax.random.normal(noise_key, reference.shape)
    mask = batch.mask.astype(jnp.float32)
    frame = batch.frame.astype(jnp.float32) / 127.5 - 1
    return Clips(raw * config.vae.scale_factor, reference, batch.audio, mask, frame, batch.frame_index)


def draw_noise(config: LossConfig, shape: tuple[int, ...], key: Array, by_frame: bool = False) -> Noise:
    """Draws the noise of clips of this shape, `(B, T, h, w, C)`, and which conditions they keep.

    Args:
      by_frame: each frame's reference is dropped alone.
    """
    sigma_key, noise_key, audio_key, reference_key = jax.random.split(key, 4)
    return Noise(
        sigma=losses.draw_sigma(sigma_key, shape[0], config.p_mean, config.p_std),
        noise=jax.random.normal(noise_key, shape),
        keep_audio=jax.random.bernoulli(audio_key, 1 - config.drop_audio, shape[:1]),
        keep_reference=jax.random.bernoulli(reference_key, 1 - config.drop_reference, shape[: 1 + by_frame]),
    )


def denoised(model: Any, clips: Clips, noise: Noise) -> Array:
    """D_theta of the noised clips, `[B, T, h, w, 4]` fp32.

    Args:
      model: a bound `nn.stages.Stage`.
    """
    # A dropped condition is a zero *projected* vector, as the guidance's branches have it.
    audio = model.project_audio(clips.audio) * noise.keep_audio[:, None, None]
    keep = noise.keep_reference.reshape(len(clips.reference), -1, 1, 1, 1)
    reference = clips.reference * keep
    key_value = model.key_value(audio)

    def network(x: Array, c_noise: Array) -> Array:
        return model(x, c_noise, audio, reference, key_value)

    noisy = losses.noised(clips.gt, noise.noise, noise.sigma)
    return precond.denoise(network, noisy, noise.sigma, clips.gt, clips.mask)


def decoded_frame(vae: Any, latents: Array, frame_index: Array) -> Array:
    """One frame of each clip, decoded alone as the reference does: `[B, H, W, 3]`, not clipped.

    Args:
      vae: a bound `nn.vae.VAE`.
      latents: scaled, `[B, T, h, w, 4]`.
      frame_index: `[B]`.
    """
    index = frame_index[:, None, None, None, None]
    return vae.decode(jnp.take_along_axis(latents, index, axis=1))[:, 0]


def objective(
    config: LossConfig, model: Any, vae: Any, clips: Clips, noise: Noise, perceptual: Any = None
) -> tuple[Array, Metrics]:
    """The loss with every random choice given, and its parts.

    Args:
      model: a bound `nn.stages.Stage`.
      vae: a bound `nn.vae.VAE`; is not read where the config has no pixel loss.
      perceptual: a bound `nn.lpips.LPIPS`, for the pixel loss of that name.
    """
    clean = denoised(model, clips, noise)
    latent = losses.latent_loss(clean, clips.gt, noise.sigma)
    pixel = jnp.zeros_like(latent)
    if config.pixel != "none":
        decoded = decoded_frame(vae, clean, clips.frame_index)
        if config.pixel == "lpips":
            distance = perceptual(jnp.clip(decoded, -1, 1), clips.frame)
            pixel = losses.weight(noise.sigma) * distance
        else:
            pixel = losses.pixel_loss(decoded, clips.frame, noise.sigma, config.pixel)
    loss = losses.total(latent, pixel, config.pixel_weight)
    parts = {"loss": loss, "loss_latent": latent.mean(), "loss_pixel": pixel.mean()}
    return loss, parts | {"sigma": noise.sigma.mean()}


def update(config: OptimizerConfig, state: TrainState, loss: Loss) -> tuple[TrainState, Metrics]:
    """Moves the trainable parameters by the gradient of a loss; pure.

    Returns:
      The next state, and the loss's metrics with `grad_norm` (before clipping) and `learning_rate`.
    """
    (_, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(state.params)
    updates, opt_state = make_optimizer(config).update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    moved = (state.step + 1) % config.accumulate == 0
    ema = None if state.ema is None else moving_average(config, state.ema, params, moved)
    metrics |= {
        "grad_norm": optax.tree.norm(gradient),
        "learning_rate": learning_rate(config, state.step // config.accumulate),
    }
    return TrainState(state.step + 1, params, state.frozen, opt_state, ema), metrics


@dataclass(frozen=True)
class Step:
    """`step(state, batch) -> (state, metrics)`, pure; random numbers are a function of (seed, step).

    Attributes:
      graphdef: of `make_stage(config)`.
      vae: the frozen VAE of the pixel loss; None where there is none.
      perceptual: the frozen LPIPS network, where that is the pixel loss.
    """

    config: TrainConfig
    graphdef: nnx.GraphDef
    vae: Network | None
    perceptual: Network | None = None

    @property
    def aids(self) -> dict[str, Params]:
        """Parameters of the networks that only judge."""
        networks = {"vae": self.vae, "perceptual": self.perceptual}
        return {name: network.params for name, network in networks.items() if network is not None}

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        return self.apply(state, self.aids, batch)

    def apply(self, state: TrainState, aids: dict[str, Params], batch: Batch) -> tuple[TrainState, Metrics]:
        """The step with the judging networks' parameters as an argument, no constants of the program."""
        key = jax.random.fold_in(jax.random.key(self.config.seed), state.step)
        clip_key, noise_key = jax.random.split(key)
        clips = draw_clips(self.config, batch, clip_key)
        noise = draw_noise(self.config.loss, clips.gt.shape, noise_key, self.config.drops_by_frame)

        def loss(params: Params) -> tuple[Array, Metrics]:
            return self.loss({**state.frozen, **params}, aids, clips, noise)

        return update(self.config.optimizer, state, loss)

    def loss(
        self, params: Params, aids: dict[str, Params], clips: Clips, noise: Noise
    ) -> tuple[Array, Metrics]:
        """`objective` as a function of all parameters of the stage."""
        vae = None if self.vae is None else bind(self.vae.graphdef, aids["vae"])
        judge = None if self.perceptual is None else bind(self.perceptual.graphdef, aids["perceptual"])
        return objective(self.config.loss, bind(self.graphdef, params), vae, clips, noise, judge)


def make_step(
    config: TrainConfig,
    graphdef: nnx.GraphDef,
    vae: Network | None = None,
    perceptual: Network | None = None,
) -> Step:
    """The step of a run.

    Args:
      graphdef: of `make_stage(config)`.
      vae: needed by the pixel loss; its parameters may be shapes alone where nothing is run.
      perceptual: LPIPS, needed by the pixel loss of that name; likewise.

    Raises:
      UserError: the pixel loss lacks its VAE or its LPIPS network.
    """
    pixel = config.loss.pixel
    if pixel != "none" and vae is None:
        raise UserError(f"loss.pixel={pixel} needs a VAE: give init.vae, or set loss.pixel=none")
    if pixel == "lpips" and perceptual is None:
        raise UserError("loss.pixel=lpips needs its weights: give init.lpips_trunk and init.lpips_heads")
    return Step(config, graphdef, None if pixel == "none" else vae, perceptual if pixel == "lpips" else None)
