"""The two stages: the same U-Net, conditioned on an identity frame or on two keyframes."""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from keysync_jax.config import Remat, StageConfig
from keysync_jax.nn.layers import Record
from keysync_jax.nn.unet import UNet
from keysync_jax.typing import Array


class Stage(nnx.Module):
    """What both stages share: the U-Net and the audio projection (section 3.3 of the paper).

    Args:
      config: sizes; `config.unet.in_channels` follows from the kind of stage.
      dtype, remat: as `UNet` takes them.
    """

    reference_frames: int
    """Reference latents of a window: 1 identity frame, or 2 keyframes."""

    def __init__(
        self, config: StageConfig, *, dtype: Any = jnp.float32, remat: Remat = "none", rngs: nnx.Rngs
    ):
        self.config = config
        self.unet = UNet(config.unet, dtype=dtype, remat=remat, rngs=rngs)
        self.audio_projection = nnx.Linear(
            config.audio_dim, config.unet.cross_attention_dim, dtype=dtype, rngs=rngs
        )

    def project_audio(self, features: Array) -> Array:
        """Audio features `[B, T, 2, audio_dim]` -> one vector a frame `[B, T, D]`."""
        return self.audio_projection(features.mean(axis=2))

    def condition(self, reference: Array) -> Array:
        """The condition that is concatenated to the noisy latent.

        Args:
          reference: raw latents (not times the scale factor), `[B, reference_frames, h, w, 4]`;
            zeros where the reference is dropped. The keyframe stage also takes one for each frame,
            `[B, T, h, w, 4]`.

        Returns:
          `[B, T, h, w, in_channels - 4]`.
        """
        raise NotImplementedError

    def key_value(self, audio: Array) -> Any:
        """What depends on a window's audio alone: keys and values of every cross-attention."""
        return self.unet.key_value(audio)

    def __call__(
        self,
        x: Array,
        c_noise: Array,
        audio: Array,
        reference: Array,
        key_value: Any = None,
        record: Record | None = None,
    ) -> Array:
        """F_theta of a batch of windows.

        Args:
          x: `[B, T, h, w, 4]`, already times c_in.
          c_noise: `[B]` fp32.
          audio: `[B, T, D]`, projected; zeros where the audio is dropped.
          reference: as `condition` takes it.
          key_value: `key_value(audio)`, where the caller has it already; of the last windows alone where the
            audio of those before is zero.
          record: see `UNet.__call__`.

        Returns:
          `[B, T, h, w, 4]` in the compute dtype.
        """
        key_value = self.key_value(audio) if key_value is None else key_value
        x = jnp.concatenate([x, self.condition(reference).astype(x.dtype)], axis=-1)
        return self.unet(x, c_noise, audio, key_value, record)


class KeyframeStage(Stage):
    """Keyframes far apart, conditioned on the identity frame z_id: 4 + 4 channels."""

    reference_frames = 1

    def condition(self, reference: Array) -> Array:
        b, _, h, w, c = reference.shape
        return jnp.broadcast_to(reference, (b, self.config.frames, h, w, c))


class InterpolationStage(Stage):
    """The frames between two keyframes: 4 + 4 + 1 channels.

    The condition sequence is [z_i, z_m, ..., z_m, z_(i+1)] with the learned z_m, and an indicator
    channel that is 1 at both ends and 0 between.
    """

    reference_frames = 2

    def __init__(
        self, config: StageConfig, *, dtype: Any = jnp.float32, remat: Remat = "none", rngs: nnx.Rngs
    ):
        super().__init__(config, dtype=dtype, remat=remat, rngs=rngs)
        size, channels = config.latent_size, config.unet.out_channels
        self.z_m = nnx.Param(jnp.zeros((size, size, channels)))

    def condition(self, reference: Array) -> Array:
        b, _, h, w, c = reference.shape
        between = self.config.frames - 2
        z_m = jnp.broadcast_to(self.z_m[...].astype(reference.dtype), (b, between, h, w, c))
        sequence = jnp.concatenate([reference[:, :1], z_m, reference[:, 1:]], axis=1)
        ends = jnp.zeros((b, self.config.frames, h, w, 1), sequence.dtype).at[:, jnp.array([0, -1])].set(1)
        return jnp.concatenate([sequence, ends], axis=-1)


def stage(config: StageConfig, *, dtype: Any = jnp.float32, remat: Remat = "none", rngs: nnx.Rngs) -> Stage:
    """The stage that a config describes."""
    kinds = {"keyframe": KeyframeStage, "interpolation": InterpolationStage}
    return kinds[config.kind](config, dtype=dtype, remat=remat, rngs=rngs)
