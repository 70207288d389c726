"""The face-centred square crop that follows the track (the crop that the released weights were made for).

A box is int64 (x0, y0, x1, y1) in pixels of the frame, x1 and y1 exclusive. It shows a square of the scene:
where the frame's pixels are not square themselves (anamorphic video) a box is wider or narrower than high, so
that the crop, whose pixels are square, shows a face as it is.
"""

from collections.abc import Iterable, Iterator
from fractions import Fraction

import cv2
import numpy as np

FACE_SHARE = 2.0
"""Side of the crop over the larger side of the landmarks' bounding box."""

SLOWEST, QUICKEST, QUICK_PIXELS = 0.2, 0.8, 100.0
"""Share of the way to its new place that the box moves in a frame: at rest, and from 100 px of motion on."""

ROUNDING = 1e-6
"""Arithmetic noise that must not move a whole number to the next."""

MARGIN = 1.0
"""Pixels kept between a landmark and the crop's edge, so that rounding cuts none off."""


def crop_track(
    landmarks: np.ndarray, present: np.ndarray, height: int, width: int, aspect: Fraction | float = 1
) -> np.ndarray:
    """Follow a face with a smooth square box: int64 `[T, 4]`.

    The target of a frame is a square of side 2 x max(w, h) of the landmarks' bounding box, centred on it and
    moved (if need be shrunk) into the frame. The box moves towards it by 0.2 + 0.6 min(1, motion / 100) of
    the way a frame, motion being the farther corner's distance in pixels; one share for all keeps it square.
    Where that would lag behind a landmark the box follows at once. The track starts anew at the first
    frame of every stretch where the face is present. All this is measured in square pixels as high as the
    frame's; the box is in the frame's own.

    landmarks: float `[T, 68, 2]` in pixels of the frame, finite (see `landmarks.bridge`); present: bool
    `[T]`; aspect: width of a pixel of the frame over its height.
    """
    boxes = list(crop_boxes(zip(landmarks, present, strict=True), height, width, aspect))
    return np.array(boxes, np.int64).reshape(-1, 4)


def crop_boxes(
    faces: Iterable[tuple[np.ndarray, bool]], height: int, width: int, aspect: Fraction | float = 1
) -> Iterator[np.ndarray]:
    """`crop_track` of a stream of (landmarks `[68, 2]`, present); a box follows from faces up to its own."""
    square, before = np.empty(3), None
    pixel = np.array([float(aspect), 1.0])
    frame = np.array([width, height])
    for landmarks, present in faces:
        points = np.asarray(landmarks, np.float64) * pixel
        low, high = points.min(axis=0), points.max(axis=0)
        target = _target(low, high, frame * pixel)
        if before is None or (present and not before):
            square = target
        else:
            square = _approach(square, target)
            square = _contain(square, low - MARGIN * pixel, high + MARGIN * pixel, frame * pixel)
        before = present
        extent = np.minimum(np.ceil(square[2] / pixel - ROUNDING), frame)
        corner = np.clip(np.floor(square[:2] / pixel + ROUNDING), 0, frame - extent)
        yield np.array([*corner, *(corner + extent)], np.int64)


def _target(low: np.ndarray, high: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """(x0, y0, side) of the square around a face's bounding box, inside the frame (its width and height)."""
    side = min(FACE_SHARE * float((high - low).max()), *frame)
    side = max(side, 2.0)
    corner = np.clip((low + high - side) / 2, 0, frame - side)
    return np.array([*corner, side])


def _approach(square: np.ndarray, target: np.ndarray) -> np.ndarray:
    start = target[:2] - square[:2]
    end = start + target[2] - square[2]
    motion = max(np.hypot(*start), np.hypot(*end))
    share = SLOWEST + (QUICKEST - SLOWEST) * min(1.0, motion / QUICK_PIXELS)
    return square + share * (target - square)


def _contain(square: np.ndarray, low: np.ndarray, high: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """Grow and move a square as little as is needed to hold the face, as far as the frame allows."""
    side = min(max(square[2], float((high - low).max())), *frame)
    corner = np.minimum(np.maximum(square[:2], high - side), low)
    return np.array([*np.clip(corner, 0, frame - side), side])


def crop_frame(frame: np.ndarray, box: np.ndarray, size: int = 512) -> np.ndarray:
    """Cut a box out of a uint8 RGB frame `[H, W, 3]` and resize it (bilinear) to `[size, size, 3]`."""
    x0, y0, x1, y1 = box
    return cv2.resize(frame[y0:y1, x0:x1], (size, size), interpolation=cv2.INTER_LINEAR)


def landmarks_in_crop(landmarks: np.ndarray, box: np.ndarray, size: int = 512) -> np.ndarray:
    """Frame coordinates `[..., 68, 2]` as float32 coordinates of the resized crop.

    box: `[4]`, or `[T, 4]` for landmarks `[T, 68, 2]`.
    """
    box = np.asarray(box)
    corner, extent = box[..., None, :2], (box[..., 2:] - box[..., :2])[..., None, :]
    return ((landmarks - corner) * (size / extent)).astype(np.float32)


def square_pixels(frame: np.ndarray, aspect: Fraction | float) -> np.ndarray:
    """Enlarge a uint8 RGB frame `[H, W, 3]` to square pixels; its own are `aspect` times as wide as high."""
    height, width = frame.shape[:2]
    size = (round(width * aspect), height) if aspect >= 1 else (width, round(height / aspect))
    return frame if size == (width, height) else cv2.resize(frame, size, interpolation=cv2.INTER_LINEAR)
