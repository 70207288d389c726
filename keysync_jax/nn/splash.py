"""Flash attention on TPU: JAX's splash kernel, with the shapes of this project's networks."""

from functools import partial

import jax
from jax.experimental.pallas.ops.tpu.splash_attention import (
    BlockSizes,
    FullMask,
    MultiHeadMask,
    make_splash_mha_single_device,
)

from keysync_jax.backend import on_shards
from keysync_jax.typing import Array

LANES = 128
"""Tokens that blocks are multiples of."""

LARGEST_BLOCK = 1024
"""Queries, and keys, that a step of the kernel holds: their scores in fp32 are 4 MiB of scratch memory."""


def block_of(tokens: int) -> int | None:
    """The most tokens, a multiple of 128, that divide a length; None where there are none."""
    sizes = range(LARGEST_BLOCK, 0, -LANES)
    return next((size for size in sizes if tokens % size == 0), None)


def splash_attention(query: Array, key: Array, value: Array, interpret: bool = False) -> Array:
    """softmax(q k^T / sqrt(D)) v, no scores stored, in the backward pass either.

    On a mesh (`backend.tracing_for`) every device runs the kernel on its part of the batch; the compiler
    cannot split a kernel by itself.

    Args:
      query: `[B, N, heads, D]`.
      key, value: `[B, M, heads, D]`; `block_of` has an answer for N and M.
      interpret: run it on any platform, slowly.

    Returns:
      `[B, N, heads, D]` in the query's dtype; softmax and sums are in fp32.
    """
    return on_shards(partial(_on_one_device, interpret=interpret), query, key, value)


def _on_one_device(query: Array, key: Array, value: Array, interpret: bool) -> Array:
    queries, heads, width = query.shape[1:]
    keys = key.shape[1]
    bq, bkv = block_of(queries), block_of(keys)
    assert bq is not None
    assert bkv is not None
    blocks = BlockSizes(
        block_q=bq,
        block_kv=bkv,
        block_kv_compute=bkv,
        block_q_dkv=bq,
        block_kv_dkv=bkv,
        block_kv_dkv_compute=bkv,
        use_fused_bwd_kernel=True,
    )
    mask = MultiHeadMask([FullMask((queries, keys))] * heads)
    kernel = make_splash_mha_single_device(mask, block_sizes=blocks, interpret=interpret)
    # The kernel does not scale.
    q, k, v = (x.swapaxes(1, 2) for x in (query * width**-0.5, key, value))
    return jax.vmap(kernel)(q, k, v).swapaxes(1, 2).astype(query.dtype)
