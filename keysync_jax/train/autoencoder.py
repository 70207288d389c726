"""Training of a VAE on single frames, or of a small decoder for one: samples and step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from keysync_jax.data.records import Dataset, decode_frame
from keysync_jax.errors import UserError
from keysync_jax.media.masks import mouth_region
from keysync_jax.model import DTYPES, Network, model_folder, open_model
from keysync_jax.nn.frame_decoder import FrameDecoder
from keysync_jax.nn.functional import Make, bind
from keysync_jax.nn.vae import VAE, Posterior
from keysync_jax.train.config import VAELossConfig, VAETrainConfig
from keysync_jax.train.data import Epochs
from keysync_jax.train.step import Metrics, TrainState, update
from keysync_jax.typing import Array, Params


class FrameBatch(NamedTuple):
    """B frames; numpy arrays from the data, device arrays in the step.

    Attributes:
      frame: uint8 `[B, S, S, 3]`.
      mouth: uint8 `[B, S, S, 1]`, 1 in a box around the mouth.
    """

    frame: Array
    mouth: Array


class FrameSamples:
    """Sample n of a run: a frame with a face, a function of (seed, n) alone; picklable.

    Raises:
      UserError: no dataset, one of another size, or none with pixels of a face.
    """

    def __init__(self, config: VAETrainConfig, datasets: Sequence[Dataset]):
        if not datasets:
            raise UserError("data.paths is empty; give the folder of a prepared dataset")
        for dataset in datasets:
            _check_fits(dataset, config.crop_size)
        self.config, self.datasets = config, tuple(datasets)
        clips = [(d, c) for d, dataset in enumerate(datasets) for c in range(len(dataset.clips))]
        self.clips = [(d, c) for d, c in clips if datasets[d].clips[c].present.any()]
        if not self.clips:
            raise UserError(f"{datasets[0].folder}: no frame of its clips has a face")
        length = config.steps * config.batch_size
        self._order = Epochs(tuple(range(len(self.clips))), config.seed, length)

    def __call__(self, number: int) -> FrameBatch:
        """Sample `number`: a FrameBatch without its first axis."""
        rng = np.random.default_rng([self.config.seed, number])
        which, clip = self.clips[self._order[number]]
        dataset = self.datasets[which]
        index = int(rng.choice(np.flatnonzero(dataset.clips[clip].present)))
        record = dataset.read(clip, [index], ["frame", "landmarks"])[0]
        frame = decode_frame(record["frame"])
        sample = FrameBatch(frame, mouth_region(record["landmarks"], len(frame))[..., None])
        if rng.random() < self.config.data.flip:
            return FrameBatch(*(array[:, ::-1] for array in sample))
        return sample


def _check_fits(dataset: Dataset, crop_size: int) -> None:
    if not dataset.settings.frames:
        raise UserError(f"{dataset.folder}: has no pixels, which a VAE is trained on")
    if dataset.settings.crop_size != crop_size:
        raise UserError(
            f"{dataset.folder}: holds crops of side {dataset.settings.crop_size}, "
            f"the config asks for {crop_size}"
        )


def make_vae(config: VAETrainConfig) -> Make:
    """Builds the network that a run trains."""
    dtype, small = DTYPES[config.dtype], config.decoder
    if small is not None:
        return lambda rngs: FrameDecoder(small, config.vae, dtype=dtype, rngs=rngs)
    return lambda rngs: VAE(config.vae, dtype=dtype, remat=config.remat, rngs=rngs)


def objective(config: VAELossConfig, vae: Any, batch: FrameBatch, key: Array) -> tuple[Array, Metrics]:
    """The loss of frames through a bound `nn.vae.VAE`, and its parts; each frame is decoded alone."""
    frames = batch.frame.astype(jnp.float32) / 127.5 - 1
    posterior = vae.encode(frames)
    # The step's latents are raw, the decoder takes scaled ones.
    decoded = vae.decode(posterior.sample(key)[:, None] * vae.config.scale_factor)[:, 0]
    mouth = batch.mouth.astype(jnp.float32)
    l1, l2 = _errors(config, decoded - frames, mouth)
    kl = divergence(posterior).mean()
    metrics = {
        "loss": config.l1 * l1 + config.l2 * l2 + config.kl * kl,
        "loss_l1": l1,
        "loss_l2": l2,
        "kl": kl,
        "latent_std": posterior.mean.std(),
        "psnr": psnr(decoded, frames, jnp.ones_like(mouth)),
        "psnr_mouth": psnr(decoded, frames, mouth),
    }
    return metrics["loss"], metrics


def _errors(config: VAELossConfig, error: Array, mouth: Array) -> tuple[Array, Array]:
    """Mean absolute and mean squared error, the mouth's weighted."""
    weight = 1 + (config.mouth - 1) * mouth
    weight /= weight.mean()
    return (weight * jnp.abs(error)).mean(), (weight * error**2).mean()


def decoder_objective(
    config: VAELossConfig, decoder: Any, vae: Any, batch: FrameBatch, key: Array
) -> tuple[Array, Metrics]:
    """The loss of a small decoder against the pictures that the VAE's own makes, and its parts.

    Args:
      decoder: a bound `nn.frame_decoder.FrameDecoder`.
      vae: a bound `nn.vae.VAE`, which encodes the frames.
    """
    frames = batch.frame.astype(jnp.float32) / 127.5 - 1
    latents = vae.encode(frames).sample(key)[:, None] * vae.config.scale_factor
    wanted = jax.lax.stop_gradient(jnp.clip(vae.decode(latents)[:, 0], -1, 1))
    decoded, mouth = decoder.decode(latents)[:, 0], batch.mouth.astype(jnp.float32)
    l1, l2 = _errors(config, decoded - wanted, mouth)
    whole = jnp.ones_like(mouth)
    metrics = {
        "loss": config.l1 * l1 + config.l2 * l2,
        "loss_l1": l1,
        "loss_l2": l2,
        "psnr": psnr(decoded, wanted, whole),
        "psnr_mouth": psnr(decoded, wanted, mouth),
        "psnr_truth": psnr(decoded, frames, whole),
    }
    return metrics["loss"], metrics


def load_teacher(config: VAETrainConfig) -> tuple[Network, str]:
    """The VAE that a small decoder is for, in host memory, and the SHA-256 of its file.

    Raises:
      UserError: it is not given, cannot be read, or has other sizes.
    """
    if not config.teacher:
        raise UserError("teacher is empty: a small decoder is for a VAE; give --config.teacher=MODEL_DIR")
    model = open_model(model_folder(config.teacher), only=["vae"])
    if model.config.vae != config.vae:
        raise UserError(f"{config.teacher}: its VAE has other sizes than the config says (vae.*)")
    graphdef, params = model.load("vae", config.dtype)
    return Network(graphdef, {path: np.asarray(x) for path, x in params.items()}), model.hashes[
        "vae.safetensors"
    ]


def divergence(posterior: Posterior) -> Array:
    """Kullback-Leibler divergence from a standard normal, in nats, of every number."""
    mean, logvar = posterior
    return 0.5 * (mean**2 + jnp.exp(logvar) - 1 - logvar)


def psnr(frames: Array, truth: Array, region: Array) -> Array:
    """Peak signal-to-noise ratio in dB of frames in [-1, 1], over a region `[B, S, S, 1]` of ones."""
    error = (jnp.clip(frames, -1, 1) - truth) ** 2 * region
    mse = error.sum() / jnp.maximum(3 * region.sum(), 1)
    return 10 * jnp.log10(4 / jnp.maximum(mse, 1e-10))


@dataclass(frozen=True)
class VAEStep:
    """`apply(state, {}, batch) -> (state, metrics)`, pure; noise is a function of (seed, step).

    Attributes:
      graphdef: of `make_vae(config)`.
      vae: the frozen VAE that a small decoder is for; None where the VAE itself is trained.
    """

    config: VAETrainConfig
    graphdef: nnx.GraphDef
    vae: Network | None = None

    @property
    def aids(self) -> dict[str, Params]:
        """Parameters of the network that only shows what is wanted."""
        return {} if self.vae is None else {"vae": self.vae.params}

    def apply(
        self, state: TrainState, aids: dict[str, Params], batch: FrameBatch
    ) -> tuple[TrainState, Metrics]:
        """One update by the gradient of the loss."""
        key = jax.random.fold_in(jax.random.key(self.config.seed), state.step)

        def loss(params: Params) -> tuple[Array, Metrics]:
            return self.loss({**state.frozen, **params}, aids, batch, key)

        return update(self.config.optimizer, state, loss)

    def loss(
        self, params: Params, aids: dict[str, Params], batch: FrameBatch, key: Array
    ) -> tuple[Array, Metrics]:
        """`objective` or `decoder_objective` as a function of all parameters."""
        network = bind(self.graphdef, params)
        if self.vae is None:
            return objective(self.config.loss, network, batch, key)
        vae = bind(self.vae.graphdef, aids["vae"])
        return decoder_objective(self.config.loss, network, vae, batch, key)
