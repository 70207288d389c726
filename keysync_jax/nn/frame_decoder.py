"""The small decoder: latents to pixels, each frame alone, at about a tenth of the temporal decoder's work."""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from keysync_jax.config import DecoderConfig, VAEConfig
from keysync_jax.nn.blocks import ResnetBlock
from keysync_jax.nn.layers import Conv2d, GroupNorm, Upsample
from keysync_jax.nn.vae import EPSILON
from keysync_jax.typing import Array


class FrameDecoder(nnx.Module):
    """Resnets in space and nearest-neighbour upsampling; no attention, nothing over time.

    It stands for `nn.vae.VAE` where latents are decoded, whose latents it takes unchanged.

    Args:
      config: its sizes.
      vae: of the VAE that it is distilled from.
      dtype: of the computation; parameters are created in fp32.
    """

    def __init__(self, config: DecoderConfig, vae: VAEConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.config, self.dtype = vae, dtype
        common: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        resnet: dict[str, Any] = {"groups": config.norm_groups, "epsilon": EPSILON, **common}
        dim = config.block_out_channels[-1]
        self.conv_in = Conv2d(vae.latent_channels, dim, **common)
        blocks = []
        for level, width in reversed(list(enumerate(config.block_out_channels))):
            inputs = [dim] + [width] * (config.layers_per_block - 1)
            blocks.append(_UpBlock(inputs, width, resnet, Upsample(width, **common) if level else None))
            dim = width
        self.up_blocks = nnx.List(blocks)
        self.conv_norm_out = GroupNorm(dim, config.norm_groups, epsilon=EPSILON, **common)
        self.conv_out = Conv2d(dim, 3, **common)

    def decode(self, latents: Array) -> Array:
        """Frames of scaled latents, as `VAE.decode`, but each alone however many come together.

        Args:
          latents: `[B, T, h, w, C]`, scaled.

        Returns:
          `[B, T, H, W, 3]` fp32, about [-1, 1], not clipped.
        """
        b, t = latents.shape[:2]
        raw = latents / self.config.scale_factor
        x = self.conv_in(raw.astype(self.dtype).reshape(b * t, *latents.shape[2:]))
        for block in self.up_blocks:
            x = block(x)
        x = self.conv_out(nnx.silu(self.conv_norm_out(x))).astype(jnp.float32)
        return x.reshape(b, t, *x.shape[1:])


class _UpBlock(nnx.Module):
    def __init__(self, inputs: list[int], width: int, resnet: dict[str, Any], up: Any):
        self.resnets = nnx.List([ResnetBlock(dim, width, None, **resnet) for dim in inputs])
        self.upsamplers = nnx.List([up]) if up else None

    def __call__(self, x: Array) -> Array:
        for resnet in self.resnets:
            x = resnet(x)
        return x if self.upsamplers is None else self.upsamplers[0](x)
