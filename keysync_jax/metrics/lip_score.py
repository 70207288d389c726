"""LipScore: whether lips look as if they said the same, by the features of a lip reader.

The cosine of Auto-AVSR's encoder outputs for the output and for the video whose voice drives it, of each
frame, averaged over the clip (`evaluation/lipscore.py` of the release). No audio enters.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from keysync_jax.backend import computing
from keysync_jax.convert.scorers import load_scorer
from keysync_jax.media.lip_crop import FEWEST_FRAMES, SIDE, cut_lips, lip_track
from keysync_jax.metrics.meter import Found, Moment, Start, Subject, Unavailable
from keysync_jax.model import Network
from keysync_jax.nn import functional as F
from keysync_jax.nn.lip_reader import HALO

LONGEST = 1800
"""Frames that are encoded at once, the training's own limit; a longer clip is taken in pieces of it."""

BATCH = 16
_STEP = 300
"""Clips are filled up to a multiple of this many frames."""


class LipReaderNetwork:
    """The encoder, compiled for pieces of few lengths."""

    def __init__(self, network: Network) -> None:
        graphdef, self._params = network
        self._project = jax.jit(lambda params, x: F.bind(graphdef, params).project(x))
        self._encode = jax.jit(lambda params, x, frames: F.bind(graphdef, params).encode(x, frames))

    def project(self, mouths: np.ndarray) -> np.ndarray:
        """Normalised mouths `[n + 4, 88, 88]`, n at most 16, to fp32 `[n, D]`."""
        whole = np.zeros((BATCH + 2 * HALO, SIDE, SIDE), np.float32)
        whole[: len(mouths)] = mouths
        with computing("fp32"):
            return np.asarray(self._project(self._params, whole))[: len(mouths) - 2 * HALO]

    def encode(self, x: np.ndarray) -> np.ndarray:
        """A clip's `[T, D]` to fp32 `[T, D]`, in pieces where it is longer than `LONGEST`."""
        pieces = []
        for first in range(0, len(x), LONGEST):
            piece = x[first : first + LONGEST]
            whole = np.zeros((-(-len(piece) // _STEP) * _STEP, x.shape[1]), np.float32)
            whole[: len(piece)] = piece
            with computing("fp32"):
                pieces.append(
                    np.asarray(self._encode(self._params, whole, jnp.int32(len(piece))))[: len(piece)]
                )
        return np.concatenate(pieces)


class LipVideo:
    """The features of one video's lips, frame by frame; it holds 20 mouths.

    Args:
      landmarks: `[T, 68, 2]`, NaN where a frame has no face.
    """

    def __init__(self, network: LipReaderNetwork, landmarks: np.ndarray) -> None:
        self._network, self._track = network, lip_track(landmarks)
        self._mouths = [np.zeros((SIDE, SIDE), np.float32)] * HALO
        self._projected: list[np.ndarray] = []
        self._frames = 0

    def update(self, frame: np.ndarray) -> None:
        """Takes the next frame, uint8 RGB. Raises ValueError where it has no mouth to crop."""
        self._mouths.append(cut_lips(frame, self._track[self._frames]))
        self._frames += 1
        if len(self._mouths) == BATCH + 2 * HALO:
            self._flush()

    def _flush(self) -> None:
        if len(self._mouths) > 2 * HALO:
            self._projected.append(self._network.project(np.stack(self._mouths)))
            self._mouths = self._mouths[-2 * HALO :]

    def result(self) -> np.ndarray:
        """The features, fp32 `[T, D]`, once after the last frame."""
        self._mouths += [np.zeros((SIDE, SIDE), np.float32)] * HALO
        if len(self._mouths) > BATCH + 2 * HALO:
            last = self._mouths[BATCH:]
            self._mouths = self._mouths[: BATCH + 2 * HALO]
            self._flush()
            self._mouths = last
        self._flush()
        return self._network.encode(np.concatenate(self._projected))


def lip_score(a: np.ndarray, b: np.ndarray) -> float:
    """Mean over frames of the cosine of two features; -1 to 1, higher is better.

    Args:
      a, b: `[T, D]`; the longer one is cut.

    Raises:
      ValueError: there is no frame.
    """
    frames = min(len(a), len(b))
    if not frames:
        raise ValueError("no frame to compare")
    x, y = a[:frames].astype(np.float64), b[:frames].astype(np.float64)
    lengths = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    return float(((x * y).sum(axis=1) / np.maximum(lengths, 1e-8)).mean())


class _Meter:
    def __init__(self, network: LipReaderNetwork, subject: Subject) -> None:
        assert subject.landmarks is not None  # `Metric.needs` says so.
        assert subject.speaker_landmarks is not None
        self._videos = [LipVideo(network, subject.landmarks), LipVideo(network, subject.speaker_landmarks)]
        self._frames = 0
        self._missing: Unavailable | None = None

    def update(self, moment: Moment) -> None:
        if self._missing is None and moment.speaker is not None:
            try:
                for video, frame in zip(self._videos, (moment.frame, moment.speaker), strict=True):
                    video.update(frame)
                self._frames += 1
            except ValueError as error:
                self._missing = Unavailable(f"{error} (frame {self._frames})")

    def result(self) -> Found:
        if self._missing is None and self._frames < FEWEST_FRAMES:
            self._missing = Unavailable(f"needs {FEWEST_FRAMES} frames of both videos")
        if self._missing is not None:
            return {"lip_score": self._missing}
        return {"lip_score": lip_score(*(video.result() for video in self._videos))}


def open_lip_score(weights: Path) -> Start:
    """LipScore."""
    network = LipReaderNetwork(load_scorer("lip-reader", weights / "lip_reader.safetensors"))
    return lambda subject: _Meter(network, subject)
