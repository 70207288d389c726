"""Quality of pictures: distance from the truth, and restlessness over time."""

from collections.abc import Iterable
from itertools import pairwise, repeat

import numpy as np

BRIGHTEST = 255.0

GREY = np.array([0.299, 0.587, 0.114])
"""Weights of red, green and blue in a grey level (Rec. 601)."""


def psnr(a: np.ndarray, b: np.ndarray, region: np.ndarray | None = None) -> float:
    """Peak signal-to-noise ratio in dB, higher is better; infinite where the pictures are equal.

    10 log10(255^2 / mean squared difference), the mean over all frames, pixels and channels at once.

    Args:
      a: uint8 `[T, H, W, 3]` or `[H, W, 3]`.
      b: the same shape.
      region: bool or 0 and 1, `[T, H, W]` or `[H, W]`, the pixels to compare; all of them for None.

    Raises:
      ValueError: the shapes differ, the dtype is not uint8, or the region is empty.
    """
    if a.shape != b.shape or a.dtype != np.uint8 or b.dtype != np.uint8:
        raise ValueError(f"expected equal shapes of uint8, got {a.dtype} {a.shape} and {b.dtype} {b.shape}")
    inside = _inside(region, a.shape[:-1])
    square, count = 0.0, 0
    # Frame by frame: a whole clip in floating point would be eight times its size.
    for x, y, pixels in zip(_frames(a), _frames(b), inside.reshape(-1, *a.shape[-3:-1]), strict=True):
        difference = x[pixels].astype(np.int64) - y[pixels]
        square, count = square + float((difference * difference).sum()), count + difference.size
    if count == 0:
        raise ValueError("the region is empty")
    return float("inf") if square == 0 else float(10 * np.log10(BRIGHTEST**2 * count / square))


def flicker(frames: Iterable[np.ndarray], region: np.ndarray) -> float:
    """Mean absolute difference of consecutive frames; grey levels (0 to 255), lower is calmer.

    A talking mouth is not still: what is good is the truth's own number, see `flicker_ratio`.

    Args:
      frames: uint8 RGB `[H, W, 3]`, two or more.
      region: bool or 0 and 1, `[T, H, W]` or `[H, W]`. Of two frames' regions, pixels in both are compared.

    Raises:
      ValueError: there are fewer than two frames, not as many regions, or no pixel to compare.
    """
    total, count = 0.0, 0
    regions = np.asarray(region, bool)
    each: Iterable[np.ndarray] = regions if regions.ndim == 3 else repeat(regions)
    greys = ((frame @ GREY, inside) for frame, inside in zip(frames, each, strict=regions.ndim == 3))
    for (before, first), (after, second) in pairwise(greys):
        both = first & second
        total, count = total + float(np.abs(after - before)[both].sum()), count + int(both.sum())
    if count == 0:
        raise ValueError("two or more frames with a common region are needed")
    return total / count


def flicker_ratio(dub: Iterable[np.ndarray], truth: Iterable[np.ndarray], region: np.ndarray) -> float:
    """`flicker` of a dub over that of the truth; no unit, 1 is best, above it the dub flickers.

    Raises:
      ValueError: the truth does not move within the region; see also `flicker`.
    """
    reference = flicker(truth, region)
    if reference == 0:
        raise ValueError("the truth does not move within the region")
    return flicker(dub, region) / reference


def _frames(pictures: np.ndarray) -> np.ndarray:
    return pictures.reshape(-1, *pictures.shape[-3:])


def _inside(region: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray:
    """The region as bool of the shape of the pictures' pixels."""
    if region is None:
        return np.ones(shape, bool)
    return np.broadcast_to(np.asarray(region, bool), shape)
