"""F_theta: SVD's spatio-temporal U-Net, with a per-frame audio vector added to its time embedding.

Parts carry the names of diffusers' `UNetSpatioTemporalConditionModel`.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx

from keysync_jax.config import Remat, UNetConfig
from keysync_jax.nn.blocks import SpatioTemporalResBlock, TransformerSpatioTemporalModel
from keysync_jax.nn.layers import (
    Conv2d,
    Downsample,
    GroupNorm,
    KeyValue,
    Record,
    TimestepEmbedding,
    Upsample,
    sinusoid,
)
from keysync_jax.nn.remat import recomputed
from keysync_jax.typing import Array

BlockContext = list[tuple[KeyValue, KeyValue]]
"""Keys and values of every transformer of a block, in order; empty where it has none."""


class Block(nnx.Module):
    """A level of the U-Net: resnets, each followed by a transformer where the level attends.

    Every kind of block (down, mid, up) is this list of parts; they differ in widths and in what
    runs between the resnets, which `UNet.__call__` says.
    """

    def __init__(
        self,
        widths: list[tuple[int, int]],
        attentions: int,
        config: UNetConfig,
        *,
        down: bool = False,
        up: bool = False,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        out_dim, groups = widths[-1][1], config.norm_groups
        self.resnets = nnx.List(
            [
                SpatioTemporalResBlock(
                    a, b, config.time_embed_dim, groups=groups, epsilon=1e-5, dtype=dtype, rngs=rngs
                )
                for a, b in widths
            ]
        )
        transformer = (out_dim, config.head_dim, config.cross_attention_dim, groups)
        self.attentions = nnx.List(
            [TransformerSpatioTemporalModel(*transformer, dtype=dtype, rngs=rngs) for _ in range(attentions)]
        )
        self.downsamplers = nnx.List([Downsample(out_dim, dtype=dtype, rngs=rngs)]) if down else None
        self.upsamplers = nnx.List([Upsample(out_dim, dtype=dtype, rngs=rngs)]) if up else None

    def key_value(self, context: Array) -> BlockContext:
        return [a.key_value(context) for a in self.attentions]


class UNet(nnx.Module):
    """The network F_theta(x; c_noise, conditions) of eq. 1.

    Args:
      config: sizes.
      dtype: of the computation; parameters are created in fp32.
      remat: what the backward pass computes again instead of keeping it.
    """

    def __init__(
        self, config: UNetConfig, *, dtype: Any = jnp.float32, remat: Remat = "none", rngs: nnx.Rngs
    ):
        self.config, self.dtype, self.remat = config, dtype, remat
        widths, layers = config.block_out_channels, config.layers_per_block
        common: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        self.conv_in = Conv2d(config.in_channels, widths[0], **common)
        self.time_embedding = TimestepEmbedding(widths[0], config.time_embed_dim, **common)
        self.add_embedding = TimestepEmbedding(config.addition_embed_dim, config.time_embed_dim, **common)

        skips, down, dim = [widths[0]], [], widths[0]
        for level, width in enumerate(widths):
            attends = layers if level in config.attention_levels else 0
            last = level == len(widths) - 1
            resnets = [(dim, width)] + [(width, width)] * (layers - 1)
            down.append(Block(resnets, attends, config, down=not last, **common))
            skips += [width] * (layers if last else layers + 1)
            dim = width
        self.down_blocks = nnx.List(down)

        self.mid_block = Block([(dim, dim)] * 2, 1, config, **common)

        up = []
        for level, width in reversed(list(enumerate(widths))):
            attends = layers + 1 if level in config.attention_levels else 0
            resnets = [(i + skips.pop(), width) for i in [dim] + [width] * layers]
            up.append(Block(resnets, attends, config, up=level > 0, **common))
            dim = width
        self.up_blocks = nnx.List(up)

        self.conv_norm_out = GroupNorm(dim, config.norm_groups, epsilon=1e-5, **common)
        self.conv_out = Conv2d(dim, config.out_channels, **common)

    def key_value(self, context: Array) -> dict[str, Any]:
        """Keys and values of every cross-attention, computed once for a window.

        They depend on the window's audio alone, not on frame, pixel or noise level, so the sampler
        computes them outside its loop.

        Args:
          context: `[B, M, D]`; the M = T audio vectors of each window.
        """
        context = context.astype(self.dtype)
        return {
            "down": [b.key_value(context) for b in self.down_blocks],
            "mid": self.mid_block.key_value(context),
            "up": [b.key_value(context) for b in self.up_blocks],
        }

    def __call__(
        self,
        x: Array,
        c_noise: Array,
        addition: Array,
        key_value: dict[str, Any],
        record: Record | None = None,
    ) -> Array:
        """One evaluation.

        Args:
          x: `[B, T, H, W, in_channels]`, already scaled by c_in, condition concatenated.
          c_noise: `[B]` fp32.
          addition: `[B, T, addition_embed_dim]`, each frame's audio vector.
          key_value: what `key_value` returned for these B windows, or for the last of them: the windows
            before have zero audio, and no work is done to attend to it.
          record: is filled with named intermediates, `[B, T, H, W, C]` each.

        Returns:
          `[B, T, H, W, out_channels]` in the compute dtype.
        """
        noise = sinusoid(c_noise, self.config.block_out_channels[0]).astype(self.dtype)
        embedding = self.time_embedding(noise)[:, None] + self.add_embedding(addition.astype(self.dtype))
        run = _Run(embedding, self.remat, record)

        x = run("conv_in", self.conv_in, x.astype(self.dtype))
        skips = [x]
        for i, (block, kv) in enumerate(zip(self.down_blocks, key_value["down"], strict=True)):
            for j, resnet in enumerate(block.resnets):
                x = run.resnet(f"down_blocks.{i}.resnets.{j}", resnet, x)
                if kv:
                    x = run.attention(f"down_blocks.{i}.attentions.{j}", block.attentions[j], x, kv[j])
                skips.append(x)
            if block.downsamplers is not None:
                x = run(f"down_blocks.{i}.downsamplers.0", block.downsamplers[0], x)
                skips.append(x)

        x = run.resnet("mid_block.resnets.0", self.mid_block.resnets[0], x)
        x = run.attention("mid_block.attentions.0", self.mid_block.attentions[0], x, key_value["mid"][0])
        x = run.resnet("mid_block.resnets.1", self.mid_block.resnets[1], x)

        for i, (block, kv) in enumerate(zip(self.up_blocks, key_value["up"], strict=True)):
            for j, resnet in enumerate(block.resnets):
                x = run.resnet(
                    f"up_blocks.{i}.resnets.{j}", resnet, jnp.concatenate([x, skips.pop()], axis=-1)
                )
                if kv:
                    x = run.attention(f"up_blocks.{i}.attentions.{j}", block.attentions[j], x, kv[j])
            if block.upsamplers is not None:
                x = run(f"up_blocks.{i}.upsamplers.0", block.upsamplers[0], x)

        x = run("conv_norm_out", self.conv_norm_out, x)
        return run("conv_out", self.conv_out, nnx.silu(x))


class _Run:
    """Runs the parts of one call: shares the embedding, records, recomputes where asked."""

    def __init__(self, embedding: Array, remat: Remat, record: Record | None):
        self.embedding, self.remat, self.record = embedding, remat, record

    def _named(self, name: str, out: Array) -> Array:
        if self.record is not None:
            self.record[name] = out
        return out

    def __call__(self, name: str, part: Callable[[Array], Array], x: Array) -> Array:
        """A part of `[N, H, W, C]`, on every frame of `[B, T, H, W, C]`."""
        y = part(x.reshape(-1, *x.shape[2:]))
        return self._named(name, y.reshape(*x.shape[:2], *y.shape[1:]))

    def resnet(self, name: str, part: SpatioTemporalResBlock, x: Array) -> Array:
        run = part if self.remat == "none" else recomputed(lambda part, *a: part(*a), part)
        return self._named(name, run(x, self.embedding))

    def attention(
        self, name: str, part: TransformerSpatioTemporalModel, x: Array, kv: tuple[KeyValue, KeyValue]
    ) -> Array:
        layers = self.remat == "layer"
        run = recomputed(lambda part, *a: part(*a, layers), part, program=not layers)
        return self._named(name, part(x, kv) if self.remat == "none" else run(x, kv))
