"""SVD's VAE: Stable Diffusion's KL encoder and the spatio-temporal ("conv-only") decoder.

Parts carry the names of diffusers' `AutoencoderKLTemporalDecoder`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from keysync_jax.config import Remat, VAEConfig
from keysync_jax.nn.blocks import ResnetBlock, SpatioTemporalResBlock
from keysync_jax.nn.layers import Attention, Conv2d, ConvTime, GroupNorm, Record, Upsample, gathered_kernel
from keysync_jax.nn.remat import recomputed
from keysync_jax.typing import Array

EPSILON = 1e-6


class Posterior(NamedTuple):
    """A diagonal Gaussian over raw latents (not yet times the scale factor).

    Attributes:
      mean, logvar: `[N, h, w, C]` fp32; logvar within [-30, 20].
    """

    mean: Array
    logvar: Array

    def sample(self, key: Array) -> Array:
        """One draw, `[N, h, w, C]`."""
        return self.mean + jnp.exp(0.5 * self.logvar) * jax.random.normal(key, self.mean.shape)


class Encoder(nnx.Module):
    """Frames to the moments of the posterior."""

    def __init__(self, config: VAEConfig, *, dtype: Any, rngs: nnx.Rngs):
        common: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        resnet: dict[str, Any] = {"groups": config.norm_groups, "epsilon": EPSILON, **common}
        widths, layers = config.block_out_channels, config.layers_per_block
        self.conv_in = Conv2d(3, widths[0], **common)
        blocks, dim = [], widths[0]
        for level, width in enumerate(widths):
            inputs = [dim] + [width] * (layers - 1)
            down = DownsampleRightBottom(width, **common) if level < len(widths) - 1 else None
            blocks.append(_Level([ResnetBlock(i, width, None, **resnet) for i in inputs], down=down))
            dim = width
        self.down_blocks = nnx.List(blocks)
        attention = SpatialAttention(dim, config.norm_groups, **common)
        self.mid_block = _Level([ResnetBlock(dim, dim, None, **resnet) for _ in range(2)], attention)
        self.conv_norm_out = GroupNorm(dim, config.norm_groups, epsilon=EPSILON, **common)
        self.conv_out = Conv2d(dim, 2 * config.latent_channels, **common)

    def __call__(self, x: Array, record: Record | None = None) -> Array:
        """`[N, H, W, 3]` -> `[N, h, w, 2 C]`."""
        noted = _noted("encoder", record)
        x = noted("conv_in", self.conv_in(x))
        for i, block in enumerate(self.down_blocks):
            for j, resnet in enumerate(block.resnets):
                x = noted(f"down_blocks.{i}.resnets.{j}", resnet(x))
            if block.downsamplers is not None:
                x = noted(f"down_blocks.{i}.downsamplers.0", block.downsamplers[0](x))
        x = noted("mid_block.resnets.0", self.mid_block.resnets[0](x))
        x = noted("mid_block.attentions.0", self.mid_block.attentions[0](x))
        x = noted("mid_block.resnets.1", self.mid_block.resnets[1](x))
        x = noted("conv_norm_out", self.conv_norm_out(x))
        return noted("conv_out", self.conv_out(nnx.silu(x)))


class TemporalDecoder(nnx.Module):
    """Latents to frames; every resnet mixes neighbouring frames, and so does the last convolution."""

    def __init__(self, config: VAEConfig, *, dtype: Any, remat: Remat, rngs: nnx.Rngs):
        common: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        resnet: dict[str, Any] = {
            "groups": config.norm_groups,
            "epsilon": EPSILON,
            "temporal_first": True,
            **common,
        }
        self.remat = remat
        widths, layers = config.block_out_channels, config.layers_per_block
        dim = widths[-1]
        self.conv_in = Conv2d(config.latent_channels, dim, **common)
        attention = SpatialAttention(dim, config.norm_groups, **common)
        self.mid_block = _Level(
            [SpatioTemporalResBlock(dim, dim, None, **resnet) for _ in range(2)], attention
        )
        blocks = []
        for level, width in reversed(list(enumerate(widths))):
            inputs = [dim] + [width] * layers
            up = Upsample(width, **common) if level > 0 else None
            blocks.append(_Level([SpatioTemporalResBlock(i, width, None, **resnet) for i in inputs], up=up))
            dim = width
        self.up_blocks = nnx.List(blocks)
        self.conv_norm_out = GroupNorm(dim, config.norm_groups, epsilon=EPSILON, **common)
        self.conv_out = Conv2d(dim, 3, **common)
        self.time_conv_out = ConvTime(3, 3, **common)

    def __call__(self, z: Array, record: Record | None = None) -> Array:
        """`[B, T, h, w, C]` -> `[B, T, H, W, 3]`. How many frames come together changes the result."""
        b, t = z.shape[:2]
        noted = _noted("decoder", record)

        def framewise(part: Any, x: Array) -> Array:
            y = part(x.reshape(b * t, *x.shape[2:]))
            return y.reshape(b, t, *y.shape[1:])

        def run(resnet: SpatioTemporalResBlock, x: Array) -> Array:
            return resnet(x) if self.remat == "none" else recomputed(lambda part, x: part(x), resnet)(x)

        x = noted("conv_in", framewise(self.conv_in, z))
        x = noted("mid_block.resnets.0", run(self.mid_block.resnets[0], x))
        x = noted("mid_block.attentions.0", framewise(self.mid_block.attentions[0], x))
        x = noted("mid_block.resnets.1", run(self.mid_block.resnets[1], x))
        for i, block in enumerate(self.up_blocks):
            for j, resnet in enumerate(block.resnets):
                x = noted(f"up_blocks.{i}.resnets.{j}", run(resnet, x))
            if block.upsamplers is not None:
                x = noted(f"up_blocks.{i}.upsamplers.0", framewise(block.upsamplers[0], x))
        x = noted("conv_norm_out", framewise(self.conv_norm_out, x))
        x = noted("conv_out", framewise(self.conv_out, nnx.silu(x)))
        return noted("time_conv_out", self.time_conv_out(x.reshape(b, t, -1, 3)).reshape(x.shape))


class VAE(nnx.Module):
    """Encoder and temporal decoder.

    Args:
      config: sizes.
      dtype: of the computation; parameters are created in fp32.
      remat: what the decoder's backward pass computes again: nothing, or the inside of each resnet.
    """

    def __init__(self, config: VAEConfig, *, dtype: Any = jnp.float32, remat: Remat = "none", rngs: nnx.Rngs):
        self.config, self.dtype = config, dtype
        self.encoder = Encoder(config, dtype=dtype, rngs=rngs)
        moments = 2 * config.latent_channels
        self.quant_conv = Conv2d(moments, moments, 1, dtype=dtype, rngs=rngs) if config.quant_conv else None
        self.decoder = TemporalDecoder(config, dtype=dtype, remat=remat, rngs=rngs)

    def encode(self, frames: Array, record: Record | None = None) -> Posterior:
        """The posterior of frames.

        Args:
          frames: `[N, H, W, 3]` in [-1, 1].
          record: is filled with named intermediates of the encoder, `[N, H, W, C]` each.

        Returns:
          Raw moments, `[N, H / factor, W / factor, C]` fp32.
        """
        moments = self.encoder(frames.astype(self.dtype), record)
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return Posterior(mean, jnp.clip(logvar, -30.0, 20.0))

    def decode(self, latents: Array, record: Record | None = None) -> Array:
        """Frames of scaled latents, decoded together.

        Args:
          latents: `[B, T, h, w, C]`, scaled. The reference decodes one frame at a time (T = 1).
          record: is filled with named intermediates of the decoder, `[B, T, H, W, C]` each.

        Returns:
          `[B, T, H, W, 3]` fp32, about [-1, 1], not clipped.
        """
        raw = latents / self.config.scale_factor
        return self.decoder(raw.astype(self.dtype), record).astype(jnp.float32)


class DownsampleRightBottom(nnx.Module):
    """3x3 convolution of stride 2 that pads the right and bottom edges by 1, the others not at all."""

    def __init__(self, dim: int, *, dtype: Any, rngs: nnx.Rngs):
        self.conv = nnx.Conv(
            dim,
            dim,
            (3, 3),
            strides=2,
            padding=((0, 1), (0, 1)),
            dtype=dtype,
            promote_dtype=gathered_kernel,
            rngs=rngs,
        )

    def __call__(self, x: Array) -> Array:
        return self.conv(x)


class SpatialAttention(Attention):
    """Single-head self-attention over the pixels of a frame, with a norm before it and a skip."""

    def __init__(self, dim: int, groups: int, *, dtype: Any, rngs: nnx.Rngs):
        super().__init__(dim, dim, bias=True, dtype=dtype, rngs=rngs)
        self.group_norm = GroupNorm(dim, groups, epsilon=EPSILON, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:  # type: ignore[override]  # a map, which attends to itself alone
        """`[N, H, W, C]` -> same."""
        n, h, w, c = x.shape
        return x + super().__call__(self.group_norm(x).reshape(n, h * w, c)).reshape(x.shape)


def _noted(prefix: str, record: Record | None) -> Callable[[str, Array], Array]:
    """Writes an intermediate into the record, where there is one, and passes it on."""

    def noted(name: str, x: Array) -> Array:
        if record is not None:
            record[f"{prefix}.{name}"] = x
        return x

    return noted


class _Level(nnx.Module):
    """Resnets, and what else a level has (diffusers' names)."""

    def __init__(self, resnets: list[Any], attention: Any = None, down: Any = None, up: Any = None):
        self.resnets = nnx.List(resnets)
        self.attentions = nnx.List([attention] if attention else [])
        self.downsamplers = nnx.List([down]) if down else None
        self.upsamplers = nnx.List([up]) if up else None
