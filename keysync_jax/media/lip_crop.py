"""The mouth crop of Auto-AVSR, which LipScore's encoder was trained on.

The face is laid on a mean face by its stable points, so the mouth is always as large and as upright. The
numbers are those of `VideoProcess` in `mpc001/auto_avsr` and of its training's transform.
"""

import cv2
import numpy as np

from keysync_jax.media.face_track import without_gaps

SIDE, PATCH, CANVAS = 88, 96, 256
"""Pixels of the result, of the patch that it is the middle of, and of the mean face's picture."""

STABLE = (28, 33, 36, 39, 42, 45, 48, 54)
"""Points that speech moves little: nose, corners of the eyes and of the mouth."""

MEAN_FACE = np.array(
    [
        [128.49, 106.92], [128.87, 137.30], [92.52, 94.37], [112.77, 94.94],
        [145.53, 94.53], [166.68, 93.57], [107.17, 157.20], [152.19, 156.99],
    ]
)  # fmt: skip
"""Where the stable points are in a picture of 256 pixels."""

FEWEST_FRAMES = 12
"""A shorter clip is not cropped."""

_SMOOTHED = 6
_FARTHEST = PATCH / 2 + 5
GREY = np.array([0.2989, 0.587, 0.114], np.float32)
PIXEL_MEAN, PIXEL_STD = 0.421, 0.165


def lip_track(landmarks: np.ndarray) -> np.ndarray:
    """Landmarks smoothed as the crop needs them: `[T, 68, 2]` to float64 of that shape, without gaps.

    The mean of up to six frames to each side (as many on both), moved to where the frame's own mean is.

    Raises:
      ValueError: no frame has a face.
    """
    points = without_gaps(landmarks)
    smooth = np.empty_like(points)
    for t in range(len(points)):
        reach = min(_SMOOTHED, t, len(points) - 1 - t)
        mean = points[t - reach : t + reach + 1].mean(axis=0)
        smooth[t] = mean + points[t].mean(axis=0) - mean.mean(axis=0)
    return smooth


def cut_lips(frame: np.ndarray, points: np.ndarray) -> np.ndarray:
    """The mouth of a frame, normalised.

    Args:
      frame: uint8 RGB `[H, W, 3]`.
      points: `[68, 2]`, a row of `lip_track`.

    Returns:
      float32 `[88, 88]`, grey less the training's mean over its standard deviation.

    Raises:
      ValueError: the face cannot be laid on the mean face, or its mouth is too far from there.
    """
    turn, _ = cv2.estimateAffinePartial2D(points[list(STABLE)], MEAN_FACE, method=cv2.LMEDS)
    if turn is None:
        raise ValueError("a face cannot be laid on the mean face")
    laid = cv2.warpAffine(frame, turn, (CANVAS, CANVAS), flags=cv2.INTER_LINEAR)
    centre = (points[48:68] @ turn[:, :2].T + turn[:, 2]).mean(axis=0)
    if (np.abs(centre - CANVAS / 2) > _FARTHEST).any():
        raise ValueError("a mouth is too far from where the mean face has it")
    x, y = (round(float(v) - PATCH / 2) for v in centre)
    edge = (PATCH - SIDE) // 2
    patch = laid[y + edge : y + edge + SIDE, x + edge : x + edge + SIDE].astype(np.float32)
    return (patch @ GREY / 255 - PIXEL_MEAN) / PIXEL_STD
