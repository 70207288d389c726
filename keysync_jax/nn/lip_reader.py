"""The encoder of Auto-AVSR's lip reader, whose features LipScore compares.

Ma et al., "Auto-AVSR: Audio-Visual Speech Recognition with Automatic Labels" (2023), and its code over
ESPnet: a 3-D convolution, a ResNet-18 of each frame, and twelve conformer layers with relative positions
(Gulati et al. 2020; Dai et al. 2019). Parts carry its names.

The network is cut in two. `project` needs of a clip only the neighbours of each frame, so it takes one in
pieces; `encode` looks at the whole clip, which is filled up to a round length so that few programs are
compiled.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from keysync_jax.nn.layers import BatchNorm
from keysync_jax.typing import Array

SIDE = 88
"""Of the mouth pictures, pixels."""

HALO = 2
"""Frames that `project` reads before and after each one."""

NORM_EPS = 1e-12


@dataclass(frozen=True)
class LipReaderConfig:
    """Sizes. The defaults are those of the published weights.

    Attributes:
      stem: channels of the 3-D convolution.
      trunk: channels of the ResNet's four stages, two blocks each.
      width: of a frame's vector.
      heads: of the attention.
      feed_forward: inner width.
      layers: conformer layers.
      kernel: frames that the depthwise convolution sees, odd.
    """

    stem: int = 64
    trunk: tuple[int, ...] = (64, 128, 256, 512)
    width: int = 768
    heads: int = 12
    feed_forward: int = 3072
    layers: int = 12
    kernel: int = 31


class BasicBlock(nnx.Module):
    """Two 3x3 convolutions and a shortcut: `[N, H, W, C]`."""

    def __init__(self, dim: int, width: int, stride: int, *, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(dim, width, (3, 3), strides=stride, padding=1, use_bias=False, rngs=rngs)
        self.conv2 = nnx.Conv(width, width, (3, 3), padding=1, use_bias=False, rngs=rngs)
        self.bn1, self.bn2 = (BatchNorm(width, rngs=rngs) for _ in range(2))
        self.resized = stride != 1 or dim != width
        if self.resized:
            self.shortcut = nnx.Conv(dim, width, (1, 1), strides=stride, use_bias=False, rngs=rngs)
            self.shortcut_bn = BatchNorm(width, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        y = nnx.silu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return nnx.silu(y + (self.shortcut_bn(self.shortcut(x)) if self.resized else x))


class Frontend(nnx.Module):
    """Grey mouths `[T + 4, 88, 88]`, normalised, to `[T, trunk[-1]]`."""

    def __init__(self, config: LipReaderConfig, *, rngs: nnx.Rngs):
        padding = [(0, 0), (3, 3), (3, 3)]
        self.conv = nnx.Conv(
            1, config.stem, (5, 7, 7), strides=(1, 2, 2), padding=padding, use_bias=False, rngs=rngs
        )
        self.norm = BatchNorm(config.stem, rngs=rngs)
        blocks, dim = [], config.stem
        for stage, width in enumerate(config.trunk):
            for i in range(2):
                blocks.append(BasicBlock(dim, width, 2 if stage and not i else 1, rngs=rngs))
                dim = width
        self.blocks = nnx.List(blocks)

    def __call__(self, mouths: Array) -> Array:
        x = nnx.silu(self.norm(self.conv(mouths[None, ..., None])))[0]
        x = nnx.max_pool(x, (3, 3), (2, 2), [(1, 1), (1, 1)])
        for block in self.blocks:
            x = block(x)
        return x.mean(axis=(1, 2))


def relative_positions(frames: int, width: int) -> np.ndarray:
    """Sinusoids of the distances T - 1 to -(T - 1), sine even and cosine odd: float32 `[2 T - 1, D]`."""
    distance = np.arange(frames - 1, -frames, -1.0)[:, None]
    angle = distance * np.exp(-np.log(10_000.0) * np.arange(0, width, 2) / width)
    return np.stack([np.sin(angle), np.cos(angle)], axis=-1).reshape(2 * frames - 1, width).astype(np.float32)


class RelativeAttention(nnx.Module):
    """Attention with relative positions (Dai et al. 2019, section 3.3): `[T, D]` -> same."""

    def __init__(self, config: LipReaderConfig, *, rngs: nnx.Rngs):
        width, self.heads = config.width, config.heads
        self.linear_q, self.linear_k, self.linear_v, self.linear_out = (
            nnx.Linear(width, width, rngs=rngs) for _ in range(4)
        )
        self.linear_pos = nnx.Linear(width, width, use_bias=False, rngs=rngs)
        zeros = nnx.initializers.zeros
        self.pos_bias_u, self.pos_bias_v = (
            nnx.Param(zeros(rngs.params(), (self.heads, width // self.heads))) for _ in range(2)
        )

    def __call__(self, x: Array, positions: Array, inside: Array) -> Array:
        frames = len(x)
        q, k, v, p = (
            y.reshape(len(y), self.heads, -1)
            for y in (self.linear_q(x), self.linear_k(x), self.linear_v(x), self.linear_pos(positions))
        )
        content = jnp.einsum("ihd,jhd->hij", q + self.pos_bias_u[...], k)
        by_distance = jnp.einsum("ihd,mhd->him", q + self.pos_bias_v[...], p)
        # Of frame i and j the distance is i - j, which is row T - 1 - i + j.
        place = frames - 1 - jnp.arange(frames)[:, None] + jnp.arange(frames)
        placed = jnp.take_along_axis(by_distance, jnp.broadcast_to(place, content.shape), axis=2)
        scores = jnp.where(inside, (content + placed) / np.sqrt(q.shape[-1]), -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1)
        return self.linear_out(jnp.einsum("hij,jhd->ihd", weights, v).reshape(x.shape))


class FeedForward(nnx.Module):
    """Linear, ReLU, linear."""

    def __init__(self, config: LipReaderConfig, *, rngs: nnx.Rngs):
        self.w_1 = nnx.Linear(config.width, config.feed_forward, rngs=rngs)
        self.w_2 = nnx.Linear(config.feed_forward, config.width, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.w_2(nnx.relu(self.w_1(x)))


class ConvModule(nnx.Module):
    """Gated linear unit and a depthwise convolution over time: `[T, D]` -> same."""

    def __init__(self, config: LipReaderConfig, *, rngs: nnx.Rngs):
        width, half = config.width, config.kernel // 2
        self.pointwise_cov1 = nnx.Linear(width, 2 * width, rngs=rngs)
        self.depthwise_conv = nnx.Conv(
            width, width, (config.kernel,), padding=[(half, half)], feature_group_count=width, rngs=rngs
        )
        self.norm = BatchNorm(width, rngs=rngs)
        self.pointwise_cov2 = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, x: Array, inside: Array) -> Array:
        value, gate = jnp.split(self.pointwise_cov1(x), 2, axis=-1)
        # The convolution sees zeros beyond the clip's end.
        x = self.depthwise_conv(jnp.where(inside[:, None], value * nnx.sigmoid(gate), 0)[None])[0]
        return self.pointwise_cov2(nnx.silu(self.norm(x)))


class ConformerLayer(nnx.Module):
    """Half a feed-forward, attention, convolution, half a feed-forward; pre-norm: `[T, D]` -> same."""

    def __init__(self, config: LipReaderConfig, *, rngs: nnx.Rngs):
        self.norm_ff_macaron, self.norm_mha, self.norm_conv, self.norm_ff, self.norm_final = (
            _norm(config, rngs) for _ in range(5)
        )
        self.feed_forward_macaron = FeedForward(config, rngs=rngs)
        self.self_attn = RelativeAttention(config, rngs=rngs)
        self.conv_module = ConvModule(config, rngs=rngs)
        self.feed_forward = FeedForward(config, rngs=rngs)

    def __call__(self, x: Array, positions: Array, inside: Array) -> Array:
        x = x + 0.5 * self.feed_forward_macaron(self.norm_ff_macaron(x))
        x = x + self.self_attn(self.norm_mha(x), positions, inside)
        x = x + self.conv_module(self.norm_conv(x), inside)
        x = x + 0.5 * self.feed_forward(self.norm_ff(x))
        return self.norm_final(x)


class LipReader(nnx.Module):
    """The whole encoder, fp32."""

    def __init__(self, config: LipReaderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.frontend = Frontend(config, rngs=rngs)
        self.proj_encoder = nnx.Linear(config.trunk[-1], config.width, rngs=rngs)
        self.encoders = nnx.List([ConformerLayer(config, rngs=rngs) for _ in range(config.layers)])
        self.after_norm = _norm(config, rngs)

    def project(self, mouths: Array) -> Array:
        """The part that looks at a few frames.

        Args:
          mouths: grey `[T + 4, 88, 88]`, normalised: two frames before the first and after the last, zeros
            beyond the clip's ends.

        Returns:
          `[T, D]`.
        """
        return self.proj_encoder(self.frontend(mouths))

    def encode(self, x: Array, frames: Array | int) -> Array:
        """The part that looks at the whole clip.

        Args:
          x: `[M, D]`, the first `frames` of it the clip's.
          frames: T, at most M.

        Returns:
          `[M, D]`, what is after `frames` without meaning.
        """
        inside = jnp.arange(len(x)) < frames
        positions = jnp.asarray(relative_positions(len(x), self.config.width))
        x = x * np.sqrt(self.config.width)
        for layer in self.encoders:
            x = layer(x, positions, inside)
        return self.after_norm(x)

    def __call__(self, mouths: Array) -> Array:
        """A clip at once: grey `[T, 88, 88]`, normalised, -> `[T, D]`."""
        padded = jnp.pad(mouths, ((HALO, HALO), (0, 0), (0, 0)))
        return self.encode(self.project(padded), len(mouths))


def make_lip_reader(rngs: nnx.Rngs) -> LipReader:
    """The network at full size, for `nn.functional`."""
    return LipReader(LipReaderConfig(), rngs=rngs)


def _norm(config: LipReaderConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(config.width, epsilon=NORM_EPS, use_fast_variance=False, rngs=rngs)
