"""Small parts that the U-Net and the VAE share. Every width and epsilon is explicit."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jax.sharding import PartitionSpec

from keysync_jax.backend import row_shards
from keysync_jax.nn.attention import attention, attention_over_frames
from keysync_jax.typing import Array

KeyValue = tuple[Array, Array]
"""Keys and values of an attention layer, `[B, M, heads, D]` each."""

Record = dict[str, Array]
"""Named intermediates of a call, filled where the caller gives an empty one."""


class GroupNorm(nnx.GroupNorm):
    """Moments of each channel first, then of its group.

    Cut into groups, an activation would have to be copied: their channels (10 of 320) fill no register. In
    fp32 the variance is taken around the mean, since E[x^2] - E[x]^2 loses digits where the mean is large.
    Half precision has lost more digits before, and there the activation is read once for both moments.
    """

    def __init__(self, dim: int, groups: int, *, epsilon: float, dtype: Any, rngs: nnx.Rngs):
        super().__init__(dim, groups, epsilon=epsilon, dtype=dtype, rngs=rngs)

    @jax.named_scope("norm")
    def __call__(self, x: Array) -> Array:  # type: ignore[override]  # no mask
        """`[B, ..., C]` -> same; moments over all axes but the first, in fp32."""
        wide = x.astype(jnp.float32)
        mean = self._mean(wide)
        if x.dtype == jnp.float32:
            variance = self._mean(jnp.square(wide - mean))
        else:
            variance = jnp.maximum(self._mean(jnp.square(wide)) - jnp.square(mean), 0)
        assert self.scale is not None
        assert self.bias is not None
        factor = jax.lax.rsqrt(variance + self.epsilon) * self.scale[...]
        return ((wide - mean) * factor + self.bias[...]).astype(self.dtype)

    def _mean(self, x: Array) -> Array:
        """Of each channel's group in its place: `[B, ..., C]` -> `[B, 1, ..., C]`."""
        for axis in range(x.ndim - 2, 0, -1):
            x = x.mean(axis, keepdims=True)  # Rows before columns: sums of many numbers lose digits.
        groups = x.reshape(*x.shape[:-1], self.num_groups, -1)
        return jnp.broadcast_to(groups.mean(-1, keepdims=True), groups.shape).reshape(x.shape)


class LayerNorm(nnx.LayerNorm):
    """With the two-pass variance."""

    def __init__(self, dim: int, *, dtype: Any, rngs: nnx.Rngs):
        super().__init__(dim, epsilon=1e-5, use_fast_variance=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array, **kwargs: Any) -> Array:
        with jax.named_scope("norm"):
            return super().__call__(x, **kwargs)


class BatchNorm(nnx.Module):
    """Batch normalisation with the statistics of training, for a finished network: `[..., C]` -> same."""

    def __init__(self, dim: int, *, epsilon: float = 1e-5, rngs: nnx.Rngs):
        self.epsilon = epsilon
        zeros, ones = nnx.initializers.zeros, nnx.initializers.ones
        self.scale, self.var = (nnx.Param(ones(rngs.params(), (dim,))) for _ in range(2))
        self.bias, self.mean = (nnx.Param(zeros(rngs.params(), (dim,))) for _ in range(2))

    def __call__(self, x: Array) -> Array:
        factor = self.scale[...] * jax.lax.rsqrt(self.var[...] + self.epsilon)
        return (x - self.mean[...]) * factor + self.bias[...]


def gathered_kernel(args: tuple[Any, ...], *, dtype: Any = None, **options: Any) -> Any:
    """nnx's `promote_dtype` of a convolution's input, kernel and bias; whole kernels where rows are split.

    XLA (of jaxlib 0.10.2) multiplies gradients of a convolution by the devices of an axis that its kernel and
    its batch share where rows are split over another one.
    """
    x, kernel, *bias = promote_dtype(args, dtype=dtype, **options)
    if row_shards() > 1:
        kernel = jax.lax.with_sharding_constraint(kernel, PartitionSpec())
    return x, kernel, *bias


class Conv2d(nnx.Conv):
    """A convolution of `[N, H, W, C]` with torch's padding: the same number on both sides.

    (At stride 2 "SAME" pads only one side, which shifts the result by half a cell.)
    """

    def __init__(
        self, in_dim: int, out_dim: int, size: int = 3, stride: int = 1, *, dtype: Any, rngs: nnx.Rngs
    ):
        super().__init__(
            in_dim,
            out_dim,
            (size, size),
            strides=stride,
            padding=size // 2,
            dtype=dtype,
            promote_dtype=gathered_kernel,
            rngs=rngs,
        )


class ConvTime(nnx.Conv):
    """A convolution over time, torch's 3-D kernel (3, 1, 1), of `[B, T, H * W, C]`."""

    def __init__(self, in_dim: int, out_dim: int, *, dtype: Any, rngs: nnx.Rngs):
        super().__init__(
            in_dim,
            out_dim,
            (3, 1),
            padding=((1, 1), (0, 0)),
            dtype=dtype,
            promote_dtype=gathered_kernel,
            rngs=rngs,
        )


def sinusoid(position: Array, dim: int, max_period: float = 10_000.0) -> Array:
    """Sinusoidal embedding, cosines first, in fp32.

    Args:
      position: `[...]`, any real numbers (c_noise, frame numbers).
      dim: width, even.

    Returns:
      `[..., dim]` fp32.
    """
    half = dim // 2
    frequency = jnp.exp(-jnp.log(max_period) * jnp.arange(half, dtype=jnp.float32) / half)
    angle = jnp.asarray(position, jnp.float32)[..., None] * frequency
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def gelu(x: Array) -> Array:
    """The exact gelu, as PyTorch writes it; JAX's own, by erfc, takes twice the time."""
    return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))


class TimestepEmbedding(nnx.Module):
    """Linear, SiLU, Linear (diffusers' name)."""

    def __init__(self, in_dim: int, dim: int, out_dim: int | None = None, *, dtype: Any, rngs: nnx.Rngs):
        self.linear_1 = nnx.Linear(in_dim, dim, dtype=dtype, rngs=rngs)
        self.linear_2 = nnx.Linear(dim, out_dim or dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.linear_2(nnx.silu(self.linear_1(x)))


class FeedForward(nnx.Module):
    """GEGLU with the exact gelu, widened four times."""

    def __init__(self, dim: int, *, dtype: Any, rngs: nnx.Rngs):
        self.proj_in = nnx.Linear(dim, 8 * dim, dtype=dtype, rngs=rngs)
        self.proj_out = nnx.Linear(4 * dim, dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        hidden, gate = jnp.split(self.proj_in(x), 2, axis=-1)
        return self.proj_out(hidden * gelu(gate))


class Attention(nnx.Module):
    """Multi-head attention to itself or to a context whose keys and values are given.

    Args:
      dim: width of the tokens.
      head_dim: width of a head.
      context_dim: width of the context; the tokens' own where None.
      bias: whether q, k and v have a bias (the VAE's do, the U-Net's do not).
    """

    def __init__(
        self,
        dim: int,
        head_dim: int,
        context_dim: int | None = None,
        bias: bool = False,
        *,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.heads = dim // head_dim
        linear = partial(nnx.Linear, dtype=dtype, rngs=rngs)
        self.to_q = linear(dim, dim, use_bias=bias)
        self.to_k = linear(context_dim or dim, dim, use_bias=bias)
        self.to_v = linear(context_dim or dim, dim, use_bias=bias)
        self.to_out = linear(dim, dim)

    def key_value(self, context: Array) -> KeyValue:
        """Keys and values of `[B, M, D]`."""
        return self._split(self.to_k(context)), self._split(self.to_v(context))

    def __call__(self, x: Array, key_value: KeyValue | None = None) -> Array:
        """`[B, ..., N, D]` -> same; `[B, N, D]` attends to itself where no keys and values are given."""
        key, value = key_value or self.key_value(x)
        return self.to_out(attention(self._split(self.to_q(x)), key, value).reshape(x.shape))

    def over_frames(self, x: Array) -> Array:
        """`[B, T, N, D]` -> same; every token attends to those at its place in the other frames."""
        return self.to_out(attention_over_frames(self.to_q(x), self.to_k(x), self.to_v(x), self.heads))

    def _split(self, x: Array) -> Array:
        return x.reshape(*x.shape[:-1], self.heads, x.shape[-1] // self.heads)


class AlphaBlender(nnx.Module):
    """alpha * a + (1 - alpha) * b with a learned alpha = sigmoid(mix_factor), one number."""

    def __init__(self) -> None:
        self.mix_factor = nnx.Param(jnp.zeros((1,)))

    def __call__(self, a: Array, b: Array) -> Array:
        alpha = nnx.sigmoid(self.mix_factor[...]).astype(a.dtype)
        return alpha * a + (1 - alpha) * b


class Downsample(nnx.Module):
    """3x3 convolution of stride 2 with a padding of 1."""

    def __init__(self, dim: int, *, dtype: Any, rngs: nnx.Rngs):
        self.conv = Conv2d(dim, dim, stride=2, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.conv(x)


class Upsample(nnx.Module):
    """Nearest-neighbour doubling, then a 3x3 convolution."""

    def __init__(self, dim: int, *, dtype: Any, rngs: nnx.Rngs):
        self.conv = Conv2d(dim, dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.conv(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2))
