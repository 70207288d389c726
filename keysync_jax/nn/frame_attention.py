"""Attention over the frames of every pixel on TPU: a kernel that takes activations as they lie in memory.

The frames of a pixel are few (14), and a frame's pixels lie between them. A batched product over pixels would
first copy all queries, keys and values into another order. The kernel instead reads some neighbouring pixels
of all frames, takes all products of their tokens with one another on the matrix unit, and masks those of
different pixels: arithmetic that is not needed, and costs less than the copies.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from keysync_jax.typing import Array

LANES = 128
"""Channels that the chip takes together: heads are computed as many at a time as fill them."""

PIXELS = 16
"""Neighbouring pixels whose tokens are multiplied with one another: a register's rows in bf16."""

GROUPS = 4
"""Groups of pixels that a step of the grid takes."""


def fits(pixels: int, channels: int, heads: int) -> bool:
    """Whether the kernel takes these shapes: whole groups of pixels, heads that do not straddle 128 lanes."""
    width = channels // heads
    return pixels % (PIXELS * GROUPS) == 0 and LANES % width == 0


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def frame_attention(query: Array, key: Array, value: Array, heads: int, interpret: bool = False) -> Array:
    """softmax(q k^T / sqrt(D)) v over the frames of each pixel and head.

    Args:
      query, key, value: `[B, T, N, C]`, the heads side by side in the channels; `fits(N, C, heads)`.
      heads: their number; D = C / heads.
      interpret: run it on any platform, slowly.

    Returns:
      `[B, T, N, C]` in the query's dtype; softmax and sums are in fp32.
    """
    b, t, n, c = query.shape
    taken = GROUPS * PIXELS
    block = pl.BlockSpec((1, t, taken, c), lambda i, j: (i, 0, j, 0))
    return pl.pallas_call(
        functools.partial(_kernel, heads=heads),
        grid=(b, n // taken),
        in_specs=[block] * 3,
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct(query.shape, query.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        cost_estimate=pl.CostEstimate(
            flops=4 * b * t * t * n * c,
            transcendentals=b * t * t * n * heads,
            bytes_accessed=4 * query.size * query.dtype.itemsize,
        ),
        interpret=interpret,
        name="frame_attention",
    )(query, key, value)


def reference(query: Array, key: Array, value: Array, heads: int) -> Array:
    """The same by XLA, and what the backward pass differentiates."""
    split = (*query.shape[:3], heads, -1)
    # [B, N, T, heads, D]: a pixel's frames become a row of tokens.
    q, k, v = (x.reshape(split).swapaxes(1, 2) for x in (query, key, value))
    attend = jax.vmap(functools.partial(jax.nn.dot_product_attention, implementation="xla"))
    return attend(q, k, v).swapaxes(1, 2).reshape(query.shape)


def _forward(query: Array, key: Array, value: Array, heads: int, interpret: bool):  # type: ignore[no-untyped-def]
    return frame_attention(query, key, value, heads, interpret), (query, key, value)


def _backward(heads: int, interpret: bool, kept: tuple[Array, Array, Array], out: Array):  # type: ignore[no-untyped-def]
    return jax.vjp(functools.partial(reference, heads=heads), *kept)[1](out)


frame_attention.defvjp(_forward, _backward)


def _kernel(query_ref, key_ref, value_ref, out_ref, *, heads: int) -> None:  # type: ignore[no-untyped-def]
    """Each reference: `[1, T, GROUPS * PIXELS, C]`."""
    t, c = query_ref.shape[1], query_ref.shape[3]
    width, tokens = c // heads, t * PIXELS
    # Tokens lie frame by frame, so those of one pixel are PIXELS apart.
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (tokens, tokens), axis) for axis in (0, 1))
    same_pixel = row % PIXELS == column % PIXELS

    def group(number: jax.Array, _: None) -> None:
        pixels = pl.ds(pl.multiple_of(number * PIXELS, PIXELS), PIXELS)
        for first in range(0, c, LANES):
            lanes = slice(first, min(first + LANES, c))
            q, k, v = (
                ref[0, :, pixels, lanes].reshape(tokens, -1) for ref in (query_ref, key_ref, value_ref)
            )
            out_ref[0, :, pixels, lanes] = _attend(q, k, v, same_pixel, width).reshape(t, PIXELS, -1)

    jax.lax.fori_loop(0, GROUPS, group, None)


def _attend(query: Array, key: Array, value: Array, allowed: Array, width: int) -> Array:
    """Attention of the heads that lie in these lanes, `[tokens, lanes]`.

    A head's scores are the product over all lanes with the other heads' queries set to zero: lanes that are
    not used would be idle.
    """
    head = jax.lax.broadcasted_iota(jnp.int32, query.shape, 1) // width
    out = jnp.zeros(query.shape, jnp.float32)
    for each in range(query.shape[1] // width):
        own = jnp.where(head == each, query, jnp.zeros_like(query))
        scores = jax.lax.dot_general(own, key, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        scores = jnp.where(allowed, scores * width**-0.5, -jnp.inf)
        weights = jnp.exp(scores - scores.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        mixed = jnp.dot(weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
        out = jnp.where(head == each, mixed, out)
    return out.astype(query.dtype)
