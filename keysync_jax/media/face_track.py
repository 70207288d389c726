"""The face crop that SyncNet and Light-ASD were trained on: smoothed over time, wider below, 224 pixels.

The numbers are those of `run_pipeline.py` in `joonson/syncnet_python`. There the boxes are of the S3FD
detector; here any will do, and `face_boxes` makes them from 68 landmarks. The framing moves LSE by more than
a unit, so numbers are comparable only where the boxes come from the same place.
"""

from collections.abc import Iterable, Iterator

import cv2
import numpy as np

SIDE = 224
"""Of the crop, pixels."""

SCALE = 0.4
"""Margin of the crop over half of the face's larger side."""

FOREHEAD = 0.3
"""What a detector's box shows above the brows, over the height of the landmarks (ours)."""

GREY = 110
"""Pixels outside of the frame."""

_SMOOTHED = 13
"""Frames of the median."""


def face_boxes(landmarks: np.ndarray) -> np.ndarray:
    """Boxes as a face detector gives them, forehead included: `[T, 68, 2]` to float64 `[T, 4]`.

    (x0, y0, x1, y1) in pixels. A frame without a face gets what lies between its neighbours.

    Raises:
      ValueError: no frame has a face.
    """
    points = np.asarray(landmarks, np.float64)
    low, high = points.min(axis=1), points.max(axis=1)
    low[:, 1] -= FOREHEAD * (high - low)[:, 1]
    return without_gaps(np.concatenate([low, high], axis=1))


def without_gaps(track: np.ndarray) -> np.ndarray:
    """A track over time with its NaN rows between their neighbours, and beyond them as the nearest: float64.

    Args:
      track: `[T, ...]`.

    Raises:
      ValueError: no row is whole.
    """
    rows = np.asarray(track, np.float64).reshape(len(track), -1)
    seen = np.flatnonzero(np.isfinite(rows).all(axis=1))
    if not len(seen):
        raise ValueError("no frame has a face")
    every = np.arange(len(rows))
    filled = [np.interp(every, seen, column) for column in rows[seen].T]
    return np.stack(filled, axis=1).reshape(np.shape(track))


def face_track(boxes: np.ndarray) -> np.ndarray:
    """Centre and half side of the face over time: float `[T, 4]` to float64 `[T, 3]`, (x, y, s).

    Medians of 13 frames; beyond the clip's ends zeros are counted, as `scipy.signal.medfilt` does.
    """
    boxes = np.asarray(boxes, np.float64)
    x, y = (boxes[:, 0] + boxes[:, 2]) / 2, (boxes[:, 1] + boxes[:, 3]) / 2
    half = np.maximum(boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]) / 2
    padded = np.pad(np.stack([x, y, half]), ((0, 0), (_SMOOTHED // 2, _SMOOTHED // 2)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, _SMOOTHED, axis=1)
    return np.median(windows, axis=-1).T


def cut_face(frame: np.ndarray, place: np.ndarray) -> np.ndarray:
    """The crop of a frame: x - 1.4 s to x + 1.4 s, y - s to y + 1.8 s, resized (bilinear).

    Args:
      frame: uint8 `[H, W, 3]`.
      place: (x, y, s), a row of `face_track`.

    Returns:
      uint8 `[224, 224, 3]`; grey where the frame ends.
    """
    x, y, s = (float(v) for v in place)
    top, bottom = int(np.floor(y - s)), int(np.floor(y + s * (1 + 2 * SCALE)))
    left, right = int(np.floor(x - s * (1 + SCALE))), int(np.floor(x + s * (1 + SCALE)))
    bottom, right = max(bottom, top + 1), max(right, left + 1)
    height, width = frame.shape[:2]
    crop = np.full((bottom - top, right - left, 3), GREY, np.uint8)
    rows, columns = slice(max(top, 0), min(bottom, height)), slice(max(left, 0), min(right, width))
    if rows.start < rows.stop and columns.start < columns.stop:
        at = (slice(rows.start - top, rows.stop - top), slice(columns.start - left, columns.stop - left))
        crop[at] = frame[rows, columns]
    return cv2.resize(crop, (SIDE, SIDE))


def cut_track(frames: Iterable[np.ndarray], boxes: np.ndarray) -> Iterator[np.ndarray]:
    """The crops of a clip, uint8 `[224, 224, 3]` each.

    Args:
      frames: uint8 `[H, W, 3]`.
      boxes: `[T, 4]`, one of each frame.

    Raises:
      ValueError: there are more frames than boxes, or fewer.
    """
    for frame, place in zip(frames, face_track(boxes), strict=True):
        yield cut_face(frame, place)
