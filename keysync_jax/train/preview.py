"""A clip of the first dataset, sampled while training: input, mask, output and truth side by side."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from keysync_jax.data.records import Dataset, Record, audio_name, decode_frame
from keysync_jax.diffusion.schedule import align_your_steps
from keysync_jax.errors import UserError
from keysync_jax.model import Network
from keysync_jax.pipeline.latents import decode_latents
from keysync_jax.pipeline.sampling import Windows, guidance_of, sample_windows
from keysync_jax.train.config import TrainConfig
from keysync_jax.train.data import latent_masks, starts, stride_of
from keysync_jax.train.step import TrainState
from keysync_jax.typing import Array, Frames

_GREY = 127


class Preview:
    """The clip that previews show; the noise is the same every time, so that they can be compared.

    Args:
      dataset: the one that `config.log.preview_data` names; `preview_clip` is a number into its clips.
      vae: for decoding (host arrays).

    Raises:
      UserError: there is no such clip, or it is too short for a sample.
    """

    def __init__(self, config: TrainConfig, dataset: Dataset, vae: Network):
        self.config, self.vae = config, vae
        number = config.log.preview_clip
        if not 0 <= number < len(dataset.clips):
            raise UserError(
                f"log.preview_clip: {dataset.folder} has {len(dataset.clips)} clips, not a {number}"
            )
        present = dataset.clips[number].present
        first = starts(present, config.stage.frames, stride_of(config))
        if not len(first):
            raise UserError(f"log.preview_clip: clip {number} of {dataset.folder} is too short for a sample")
        frames = [int(first[0]) + i * stride_of(config) for i in range(config.stage.frames)]
        records = dataset.read(number, frames)
        self._windows = self._inputs(dataset, records, dataset.read(number, [frames[0]], ["mean"])[0])
        self._truth = [decode_frame(r["frame"]) for r in records] if dataset.settings.frames else None

    def _inputs(self, dataset: Dataset, records: list[Record], identity: Record) -> Windows:
        raw = np.stack([r["mean"] for r in records]).astype(np.float32)
        keyframe = self.config.stage.kind == "keyframe"
        reference = identity["mean"][None].astype(np.float32) if keyframe else raw[[0, -1]]
        points = np.stack([r["landmarks"] for r in records])
        settings = dataset.settings
        masks = latent_masks(points, settings.crop_size, settings.latent_size, self.config.data.mask)
        features = np.stack([r[audio_name(self.config.audio_encoder)] for r in records])
        noise = np.random.default_rng(self.config.seed).standard_normal(raw.shape, np.float32)
        gt = raw * np.float32(self.config.vae.scale_factor)
        rows = (noise, features, reference, gt, masks[..., None].astype(np.float32))
        return Windows(*(row[None] for row in rows))

    def latents(self, mesh: Mesh, graphdef: nnx.GraphDef, state: TrainState) -> np.ndarray:
        """Samples the clip, scaled latents `[T, h, w, 4]`; every process of the run must call it."""
        trained = state.params if state.ema is None else state.ema
        sigmas = align_your_steps()
        given = guidance_of(self.config.guidance, sigmas), jnp.asarray(sigmas, jnp.float32)
        sampled = sample_windows(graphdef, {**trained, **state.frozen}, self._windows, *given)
        return np.asarray(_on_all(sampled, NamedSharding(mesh, PartitionSpec())))[0]

    def picture(self, latents: np.ndarray) -> Frames:
        """Input, mask, output, truth side by side: uint8 RGB `[T, S, 4 S, 3]`.

        Truth is what the dataset holds: its pixels, or its latents decoded where it has none.
        """
        # The VAE is put on the device for these few calls only.
        vae = Network(self.vae.graphdef, jax.device_put(dict(self.vae.params), jax.local_devices()[0]))
        output = _levels(decode_latents(vae, latents))
        truth = np.stack(self._truth) if self._truth else _levels(decode_latents(vae, self._windows.gt[0]))
        factor = self.config.vae.factor
        mask = self._windows.mask[0].repeat(factor, axis=1).repeat(factor, axis=2) > 0
        hidden = np.where(mask, np.uint8(_GREY), truth)
        shown = np.broadcast_to(mask * np.uint8(255), truth.shape)
        return np.concatenate([hidden, shown, output, truth], axis=2)


@partial(jax.jit, static_argnames="everywhere")
def _on_all(x: Array, everywhere: NamedSharding) -> Array:
    """Copies of an array on every device, so that each process can read it."""
    return jax.lax.with_sharding_constraint(x, everywhere)


def _levels(frames: Any) -> Frames:
    return np.asarray(np.rint(np.clip(frames, 0, 255)), np.uint8)
