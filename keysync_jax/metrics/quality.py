"""Quality of pictures: distance from the truth, sharpness, and restlessness over time."""

from collections.abc import Iterable
from itertools import pairwise, repeat

import cv2
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


SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
SSIM_EDGE = SSIM_WINDOW // 2
"""Pixels at each edge of a picture that have no whole window."""

_C1, _C2 = (0.01 * BRIGHTEST) ** 2, (0.03 * BRIGHTEST) ** 2


def ssim_map(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Structural similarity around each pixel; no unit, -1 to 1, higher is better, 1 where they are equal.

    Wang et al. 2004, eq. 13, with the Gaussian window of 11 pixels and sigma 1.5, of each colour, averaged.

    Args:
      a, b: uint8 `[H, W, 3]`, 11 pixels or more each way.

    Returns:
      float64 `[H - 10, W - 10]`: pixels whose window is inside the picture.

    Raises:
      ValueError: the shapes differ, the dtype is not uint8, or the pictures are too small.
    """
    if a.shape != b.shape or a.dtype != np.uint8 or b.dtype != np.uint8:
        raise ValueError(f"expected equal shapes of uint8, got {a.dtype} {a.shape} and {b.dtype} {b.shape}")
    if min(a.shape[:2]) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs {SSIM_WINDOW} pixels each way, not {a.shape[1]} x {a.shape[0]}")
    x, y = a.astype(np.float64), b.astype(np.float64)
    mean_x, mean_y = _windowed(x), _windowed(y)
    var_x = _windowed(x * x) - mean_x * mean_x
    var_y = _windowed(y * y) - mean_y * mean_y
    covariance = _windowed(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + _C1) / (mean_x * mean_x + mean_y * mean_y + _C1)
    structure = (2 * covariance + _C2) / (var_x + var_y + _C2)
    return (luminance * structure).mean(axis=-1)


def laplacian_variance(frame: np.ndarray) -> float:
    """Variance of a frame's Laplacian: sharpness, in squared grey levels.

    Higher is sharper, and noisier: what is good is the truth's own number. It depends on the frame's size.

    Args:
      frame: uint8 RGB `[H, W, 3]`.
    """
    return float(_laplacian(frame).var())


def sharpness_ratio(dub: np.ndarray, truth: np.ndarray, region: np.ndarray) -> float:
    """Variance of the Laplacian of a dub over that of the truth within a region; no unit, 1 is best.

    Below it the dub is softer than the truth, above it sharper or noisier. Variances are means over frames.

    Args:
      dub, truth: uint8 RGB `[T, H, W, 3]`.
      region: bool or 0 and 1, `[T, H, W]` or `[H, W]`; frames without a pixel of it do not count.

    Raises:
      ValueError: there is no such frame, or the truth is flat within the region.
    """
    inside = _inside(region, truth.shape[:-1])

    def variance(frames: np.ndarray) -> float:
        found = [
            _laplacian(frame)[pixels].var()
            for frame, pixels in zip(frames, inside, strict=True)
            if pixels.any()
        ]
        return float(np.mean(found)) if found else 0.0

    reference = variance(truth)
    if reference == 0:
        raise ValueError("the region is empty, or the truth is flat within it")
    return variance(dub) / reference


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


def _laplacian(frame: np.ndarray) -> np.ndarray:
    """Of the grey levels of a uint8 RGB picture, float64 `[H, W]`."""
    return cv2.Laplacian(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), cv2.CV_64F)


def _windowed(x: np.ndarray) -> np.ndarray:
    """Means under the Gaussian window, where it is inside the picture."""
    blurred = cv2.GaussianBlur(x, (SSIM_WINDOW, SSIM_WINDOW), SSIM_SIGMA)
    return blurred[SSIM_EDGE:-SSIM_EDGE, SSIM_EDGE:-SSIM_EDGE]


def _frames(pictures: np.ndarray) -> np.ndarray:
    return pictures.reshape(-1, *pictures.shape[-3:])


def _inside(region: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray:
    """The region as bool of the shape of the pictures' pixels."""
    if region is None:
        return np.ones(shape, bool)
    return np.broadcast_to(np.asarray(region, bool), shape)
