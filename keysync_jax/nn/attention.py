"""Scaled dot-product attention: one function, the kernel chosen by platform and size.

| where | tokens | kernel |
|---|---|---|
| GPU, bf16 or fp16 | 1024 and more | cuDNN flash attention |
| elsewhere | scores above `MAX_SCORE_BYTES` | XLA, a block of the queries at a time |
| everywhere | the rest | XLA |
"""

from functools import partial

import jax
import jax.numpy as jnp

from keysync_jax.backend import batch_shards, platform
from keysync_jax.typing import Array

LONG = 1024
"""Tokens from which a fused kernel pays."""

MAX_SCORE_BYTES = 256 * 2**20
"""Scores (fp32) that a device may hold at once; above it the queries are walked in blocks."""


def attention(query: Array, key: Array, value: Array) -> Array:
    """softmax(q k^T / sqrt(D)) v.

    Args:
      query: `[B, N, heads, D]`.
      key, value: `[B, M, heads, D]`.

    Returns:
      `[B, N, heads, D]`, in the query's dtype; the softmax is taken in fp32.
    """
    if _flash(query, key):
        return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")
    block = _queries_at_once(query, key)
    if block == query.shape[1]:
        return _xla(query, key, value)
    # The queries, not the batch: a batch may lie on several devices, and must stay there.
    blocks = query.reshape(query.shape[0], -1, block, *query.shape[2:]).swapaxes(0, 1)
    # A block's scores are computed again in the backward pass, never kept.
    out = jax.lax.map(jax.checkpoint(lambda q: _xla(q, key, value)), blocks)
    return out.swapaxes(0, 1).reshape(query.shape)


_plain = partial(jax.nn.dot_product_attention, implementation="xla")


def _xla(query: Array, key: Array, value: Array) -> Array:
    if query.dtype == jnp.float16 and platform() == "cpu":
        # JAX would ask for products of fp16 that are summed in fp32, which XLA has for no CPU.
        return _plain(*(x.astype(jnp.float32) for x in (query, key, value))).astype(jnp.float16)
    return _plain(query, key, value)


def _queries_at_once(query: Array, key: Array) -> int:
    """The largest divisor of N whose scores fit in what each device of the batch may hold."""
    batch, n, heads, _ = query.shape
    most = MAX_SCORE_BYTES * batch_shards() // (4 * batch * heads * key.shape[1])
    return max(size for size in range(1, n + 1) if n % size == 0 and size <= max(most, 1))


def _flash(query: Array, key: Array) -> bool:
    """Whether cuDNN has a kernel for this call and it pays."""
    long = min(query.shape[1], key.shape[1]) >= LONG
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    return platform() == "gpu" and long and half and query.shape[-1] <= 128
