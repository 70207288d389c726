"""Scaled dot-product attention: one function, the kernel chosen by platform and size.

| where | tokens | kernel |
|---|---|---|
| GPU, bf16 or fp16 | 1024 and more | cuDNN flash attention |
| TPU, bf16 | 1024 and more, multiples of 128 | splash (`nn/splash.py`), blocks of up to 1024 x 1024 |
| elsewhere | scores above `MAX_SCORE_BYTES`, of a CPU `CPU_SCORE_BYTES` | XLA, a block of queries at a time |
| everywhere | the rest | XLA |
"""

from functools import partial

import jax
import jax.numpy as jnp

from keysync_jax.backend import batch_shards, on_shards, platform, row_shards
from keysync_jax.typing import Array

LONG = 1024
"""Tokens from which a fused kernel pays."""

CUDNN_WIDTH = 128
"""The widest heads that cuDNN's kernel takes on every GPU that has it."""

MAX_SCORE_BYTES = 256 * 2**20
"""Scores (fp32) that a device may hold at once; above it the queries are walked in blocks."""

CPU_SCORE_BYTES = 4 * 2**20
"""The same of a CPU, whose caches hold as much; blocks have `CPU_QUERIES` queries or more."""

CPU_QUERIES, CPU_KEYS = 16, 256
"""The fewest queries of a block, and the fewest keys for which a CPU takes blocks."""


@jax.named_scope("attention")
def attention(query: Array, key: Array, value: Array) -> Array:
    """softmax(q k^T / sqrt(D)) v.

    Args:
      query: `[B, ..., N, heads, D]`, with any number of axes of tokens.
      key, value: `[B, M, heads, D]`.

    Returns:
      Like the query, in its dtype; the softmax is taken in fp32. Where pictures are split by their rows
      (`backend.row_shards`), each device has its queries, the N of its rows, and all keys and values.
    """
    if row_shards() > 1:
        return on_shards(attention, query, key, value, rows=(query.ndim - 3, None, None))
    return _attention(query.reshape(len(query), -1, *query.shape[-2:]), key, value).reshape(query.shape)


def _attention(query: Array, key: Array, value: Array) -> Array:
    """`attention` of `[B, N, heads, D]`."""
    if _has_long_halves(query, key):
        if platform() == "gpu" and query.shape[-1] <= CUDNN_WIDTH:
            return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")
        if platform() == "tpu" and query.dtype == jnp.bfloat16 and len(query) % batch_shards() == 0:
            from keysync_jax.nn.splash import block_of, splash_attention

            if block_of(query.shape[1]) and block_of(key.shape[1]):
                return splash_attention(query, key, value)
    block = _queries_at_once(query, key)
    if block == query.shape[1]:
        return _xla(query, key, value)
    # The queries, not the batch: a batch may lie on several devices, and must stay there.
    blocks = query.reshape(query.shape[0], -1, block, *query.shape[2:]).swapaxes(0, 1)
    # A block's scores are computed again in the backward pass, never kept.
    out = jax.lax.map(jax.checkpoint(lambda q: _xla(q, key, value)), blocks)
    return out.swapaxes(0, 1).reshape(query.shape)


@jax.named_scope("attention")
def attention_over_frames(query: Array, key: Array, value: Array, heads: int) -> Array:
    """softmax(q k^T / sqrt(D)) v over the frames of every pixel.

    Args:
      query, key, value: `[B, T, N, C]`, the heads side by side in the channels.
      heads: their number; D = C / heads.

    Returns:
      `[B, T, N, C]`, in the query's dtype; the softmax is taken in fp32.
    """
    if row_shards() > 1:
        return on_shards(partial(attention_over_frames, heads=heads), query, key, value, rows=(2, 2, 2))
    b, t, n, c = query.shape
    if platform() == "tpu" and query.dtype == jnp.bfloat16 and b % batch_shards() == 0:
        from keysync_jax.nn.frame_attention import fits, frame_attention

        if fits(n, c, heads):
            return on_shards(partial(frame_attention, heads=heads), query, key, value)
    q, k, v = (x.swapaxes(1, 2).reshape(b * n, t, heads, -1) for x in (query, key, value))
    return attention(q, k, v).reshape(b, n, t, c).swapaxes(1, 2)


_plain = partial(jax.nn.dot_product_attention, implementation="xla")


def _xla(query: Array, key: Array, value: Array) -> Array:
    if query.dtype == jnp.float16 and platform() == "cpu":
        # JAX would ask for products of fp16 that are summed in fp32, which XLA has for no CPU.
        return _plain(*(x.astype(jnp.float32) for x in (query, key, value))).astype(jnp.float16)
    return _plain(query, key, value)


def _queries_at_once(query: Array, key: Array) -> int:
    """The largest divisor of N whose scores fit in what each device of the batch may hold."""
    batch, n, heads, _ = query.shape
    keys, shards = key.shape[1], batch_shards()
    most = MAX_SCORE_BYTES * shards // (4 * batch * heads * keys)
    if platform() == "cpu" and keys >= CPU_KEYS:
        most = min(most, max(CPU_SCORE_BYTES * shards // (4 * batch * heads * keys), CPU_QUERIES))
    return max(size for size in range(1, n + 1) if n % size == 0 and size <= max(most, 1))


def _has_long_halves(query: Array, key: Array) -> bool:
    """Whether a fused kernel, which computes in half precision, does what is asked and pays."""
    long = min(query.shape[1], key.shape[1]) >= LONG
    return long and query.dtype in (jnp.bfloat16, jnp.float16)
