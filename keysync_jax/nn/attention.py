"""Scaled dot-product attention: one function, the kernel chosen by backend and size.

| where | tokens | kernel |
|---|---|---|
| GPU, bf16 or fp16 | 1024 and more | cuDNN flash attention |
| elsewhere | scores above `MAX_SCORE_BYTES` | XLA, a few rows of the batch at a time |
| everywhere | the rest | XLA |
"""

import jax
import jax.numpy as jnp

from keysync_jax.typing import Array

LONG = 1024
"""Tokens from which a fused kernel pays."""

MAX_SCORE_BYTES = 256 * 2**20
"""Scores (fp32) that XLA may hold at once; above it the batch is walked in pieces."""


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
    batch, n, heads, _ = query.shape
    rows = MAX_SCORE_BYTES // (4 * heads * n * key.shape[1])
    if rows < batch:
        return jax.lax.map(_row, (query, key, value), batch_size=max(rows, 1))
    return jax.nn.dot_product_attention(query, key, value, implementation="xla")


@jax.checkpoint
def _row(qkv: tuple[Array, Array, Array]) -> Array:
    """One row of the batch; its scores are computed again in the backward pass, never kept."""
    q, k, v = (x[None] for x in qkv)
    return jax.nn.dot_product_attention(q, k, v, implementation="xla")[0]


def _flash(query: Array, key: Array) -> bool:
    """Whether cuDNN has a kernel for this call and it pays."""
    long = min(query.shape[1], key.shape[1]) >= LONG
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    return jax.default_backend() == "gpu" and long and half and query.shape[-1] <= 128
