"""Large activations, a piece at a time: what a TPU computes of a piece stays in its scratch memory.

A transformer of the U-Net's first level has 110 MB of activations and widens them eight times. Layer by layer
all of that goes to the chip's memory and comes back. Frames do not meet in the spatial transformer, nor
pixels in the temporal one, so each takes some of them through all of its layers before it turns to the next
ones: only its input and its output are moved.
"""

from collections.abc import Callable

import jax

from keysync_jax.backend import batch_shards, platform
from keysync_jax.typing import Array

WIDENED = 8
"""Width of a feed-forward's hidden values over that of its tokens."""

PIECE_BYTES = 40 * 2**20
"""Of the widest values of a piece; the scratch memory (128 MiB) holds what is around them, and weights."""

PIXELS = 64
"""Pixels of a piece are a multiple of it: `nn.frame_attention` takes so many at once."""

Place = tuple[Array, Array]
"""Number of the window and of the first frame of a piece."""


def pays(x: Array) -> bool:
    """Whether `[B, T, N, D]` should be walked in pieces: on a TPU, where it is too large to stay on the chip.

    Not where the batch is split over a mesh, whose compiler would have to move pieces between devices.
    """
    return platform() == "tpu" and batch_shards() == 1 and _hidden_bytes(x) > PIECE_BYTES


def in_pieces(
    run: Callable[[Array, Place], Array], x: Array, frames: int, pixels: int, width: int | None = None
) -> Array:
    """`run(piece, place)` of every piece, put together.

    Args:
      run: of a piece `[1, frames, pixels, D]`; returns one of `width` channels.
      x: `[B, T, N, D]`; `frames` divides T and `pixels` divides N.
      width: D' of the result; D where None.

    Returns:
      `[B, T, N, D']`; of D channels it takes the place of x, where nothing else needs that.
    """
    b, t, n, d = x.shape
    across, down = n // pixels, t // frames

    def step(number: Array, whole: Array) -> Array:
        window, first = number // (down * across), number // across % down * frames
        at = (window, first, number % across * pixels, 0)
        piece = jax.lax.dynamic_slice(whole if width is None else x, at, (1, frames, pixels, d))
        return jax.lax.dynamic_update_slice(whole, run(piece, (window, first)), at)

    start = x if width is None else jax.lax.empty((b, t, n, width), x.dtype)
    return jax.lax.fori_loop(0, b * down * across, step, start)


def frames_at_once(x: Array) -> int:
    """The most whole frames of `[B, T, N, D]` whose hidden values fit; 1 where not even one's do."""
    frames = x.shape[1]
    return _largest(frames, 1, PIECE_BYTES * frames * len(x) // _hidden_bytes(x))


def pixels_at_once(x: Array) -> int:
    """The most pixels of `[B, T, N, D]`, in all frames, whose hidden values fit."""
    pixels = x.shape[2]
    step = PIXELS if pixels % PIXELS == 0 else 1
    return _largest(pixels, step, PIECE_BYTES * pixels * len(x) // _hidden_bytes(x))


def _hidden_bytes(x: Array) -> int:
    return WIDENED * x.size * x.dtype.itemsize


def _largest(total: int, step: int, most: int) -> int:
    """The largest multiple of `step` that divides `total` and is at most `most`; `step` where none is."""
    return max((size for size in range(step, most + 1, step) if total % size == 0), default=step)
