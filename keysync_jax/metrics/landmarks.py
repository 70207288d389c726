"""Metrics of landmarks: how far a mouth opens (MAR), how far its points are from the truth's (LMD).

They look at no frame: the landmarks are what the clip brings.
"""

from pathlib import Path

import numpy as np

from keysync_jax.metrics.leakage import OPEN, lip_leak_lite
from keysync_jax.metrics.meter import Found, Moment, Start, Subject, Unavailable
from keysync_jax.metrics.mouth import eye_distance
from keysync_jax.synthetic.face import mouth_aspect_ratio

MOUTH = slice(48, 68)
"""The mouth's 20 among the 68 points."""


def landmark_distance(landmarks: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """LMD of each frame: mean distance of the mouth's points from the truth's; px, lower is better.

    Both mouths are centred on the mean of their own 20 points first, so where the head is has no effect.
    Chen et al. 2018 give this formula; their code (ATVGnet) sums the 20 distances instead.

    Args:
      landmarks, truth: `[T, 68, 2]` each.

    Returns:
      `[T]`, NaN where one of them is.

    Raises:
      ValueError: the shapes differ.
    """
    if landmarks.shape != truth.shape:
        raise ValueError(f"expected landmarks of equal shapes, got {landmarks.shape} and {truth.shape}")
    a, b = (np.asarray(x, np.float64)[:, MOUTH] for x in (landmarks, truth))
    a, b = a - a.mean(axis=1, keepdims=True), b - b.mean(axis=1, keepdims=True)
    return np.linalg.norm(a - b, axis=-1).mean(axis=-1)


class _OfLandmarks:
    """A meter that needs no frame."""

    def __init__(self, found: Found) -> None:
        self._found = found

    def update(self, moment: Moment) -> None:
        pass

    def result(self) -> Found:
        return self._found


def _mouth(subject: Subject) -> _OfLandmarks:
    assert subject.landmarks is not None  # `Metric.needs` says so.
    mar = mouth_aspect_ratio(subject.landmarks)
    seen = mar[np.isfinite(mar)]
    if not len(seen):
        nothing = Unavailable("no frame has a mouth with a width")
        return _OfLandmarks({"mar_std": nothing, "mar_open": nothing})
    return _OfLandmarks(
        {"mar_std": float(seen.std()), "mar_open": lip_leak_lite(seen, OPEN), "mar": mar.astype(np.float32)}
    )


def _lmd(subject: Subject) -> _OfLandmarks:
    truth = subject.truth_landmarks
    assert subject.landmarks is not None
    assert truth is not None
    distance = landmark_distance(subject.landmarks, truth)
    seen = np.isfinite(distance)
    if not seen.any():
        nothing = Unavailable("no frame has a face in both videos")
        return _OfLandmarks(dict.fromkeys(("lmd", "lmd_sum", "lmd_eyes"), nothing))
    mean, eyes = float(distance[seen].mean()), float(eye_distance(truth[seen]).mean())
    return _OfLandmarks({"lmd": mean, "lmd_sum": 20 * mean, "lmd_eyes": mean / eyes})


def open_mouth(_: Path) -> Start:
    """MAR."""
    return _mouth


def open_lmd(_: Path) -> Start:
    """LMD."""
    return _lmd
