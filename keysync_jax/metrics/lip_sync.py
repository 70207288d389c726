"""LSE-C, LSE-D and the audio-visual offset: how well lips and voice agree, by SyncNet.

As `SyncNetInstance.py` of `joonson/syncnet_python` and the scripts of Wav2Lip compute them, over one face,
the dubbed one, from a crop by landmarks (`media.face_track`).
"""

from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from keysync_jax.backend import computing
from keysync_jax.convert.scorers import load_scorer
from keysync_jax.media.face_track import cut_face, face_boxes, face_track
from keysync_jax.media.mfcc import PER_FRAME, RATE, mfcc, to_int16
from keysync_jax.media.timeline import FPS
from keysync_jax.metrics.meter import Found, Moment, Start, Subject, Unavailable
from keysync_jax.model import Network
from keysync_jax.nn import functional as F
from keysync_jax.nn.syncnet import FRAMES, VECTORS, WIDTH

REACH = 15
"""Offsets that are tried each way, frames."""

CERTAIN = 1.5
"""LSE-C below which an offset is noise (ours)."""

_TINY = 1e-6
_LIPS, _VOICES = 16, 64
"""Windows that the network is given at a time."""


class LipSync(NamedTuple):
    """What SyncNet says of a clip.

    Attributes:
      confidence: LSE-C, the median over the offsets less the smallest; higher is better.
      distance: LSE-D, the smallest mean distance of lips and voice; lower is better.
      offset: frames by which the voice is early, the picture late; 0 is best.
    """

    confidence: float
    distance: float
    offset: int


class LipSyncNetwork:
    """SyncNet, compiled for batches of one size."""

    def __init__(self, network: Network) -> None:
        graphdef, self._params = network
        self._lips = jax.jit(lambda params, x: F.bind(graphdef, params).lips(x))
        self._voice = jax.jit(lambda params, x: F.bind(graphdef, params).voice(x))

    def lips(self, faces: np.ndarray) -> np.ndarray:
        """Faces of at most 20 consecutive frames, uint8 BGR `[T, 224, 224, 3]`, to fp32 `[T - 4, 1024]`."""
        whole = np.zeros((_LIPS + FRAMES - 1, *faces.shape[1:]), np.uint8)
        whole[: len(faces)] = faces
        with computing("fp32"):
            return np.asarray(self._lips(self._params, whole))[: len(faces) - FRAMES + 1]

    def voice(self, vectors: np.ndarray, count: int) -> np.ndarray:
        """The first `count` windows of MFCC `[N, 13]`, four vectors apart: fp32 `[count, 1024]`."""
        found = np.empty((count, WIDTH), np.float32)
        for first in range(0, count, _VOICES):
            last = min(first + _VOICES, count)
            windows = np.zeros((_VOICES, VECTORS, vectors.shape[1]), np.float32)
            for i in range(first, last):
                windows[i - first] = vectors[PER_FRAME * i : PER_FRAME * i + VECTORS]
            with computing("fp32"):
                found[first:last] = np.asarray(self._voice(self._params, windows))[: last - first]
        return found


def distances(lips: np.ndarray, voice: np.ndarray, reach: int = REACH) -> np.ndarray:
    """Distance of each window's lips from the voice some windows away.

    Args:
      lips, voice: features `[W, D]` each. Beyond its ends the voice's are zero.
      reach: windows each way.

    Returns:
      float64 `[2 reach + 1, W]`; in row i the voice is i - reach windows later.
    """
    padded = np.pad(np.asarray(voice, np.float64), ((reach, reach), (0, 0)))
    # The constant is within the norm, as in PyTorch's pairwise distance.
    return np.stack(
        [np.linalg.norm(lips - padded[i : i + len(lips)] + _TINY, axis=1) for i in range(2 * reach + 1)]
    )


def lip_sync(lips: np.ndarray, voice: np.ndarray) -> LipSync:
    """LSE-C, LSE-D and offset of a clip's features `[W, 1024]` each.

    Raises:
      ValueError: there is no window.
    """
    if not len(lips):
        raise ValueError("no window to measure")
    means = distances(lips, voice).mean(axis=1)
    best = int(means.argmin())
    return LipSync(float(np.median(means) - means[best]), float(means[best]), REACH - best)


def windows_of(frames: int, samples: int) -> int:
    """Windows that are compared; one fewer than fits, as the original loop ends."""
    return max(0, min(frames, samples * FPS // RATE) - FRAMES)


class _Meter:
    def __init__(self, network: LipSyncNetwork, subject: Subject) -> None:
        assert subject.voice is not None  # `Metric.needs` says so.
        assert subject.landmarks is not None
        self._network = network
        self._track = face_track(face_boxes(subject.landmarks))
        self._voice = to_int16(subject.voice)
        self._frames = 0
        self._faces: list[np.ndarray] = []
        self._lips: list[np.ndarray] = []

    def update(self, moment: Moment) -> None:
        face = cut_face(moment.frame, self._track[self._frames])
        self._faces.append(face[..., ::-1])
        self._frames += 1
        if len(self._faces) == _LIPS + FRAMES - 1:
            self._flush()

    def _flush(self) -> None:
        if len(self._faces) >= FRAMES:
            self._lips.append(self._network.lips(np.stack(self._faces)))
            self._faces = self._faces[1 - FRAMES :]

    def result(self) -> Found:
        self._flush()
        count = windows_of(self._frames, len(self._voice))
        names = ("lse_c", "lse_d", "av_offset")
        if not count:
            return dict.fromkeys(names, Unavailable("needs six frames and as much of the voice"))
        lips = np.concatenate(self._lips)[:count]
        found = lip_sync(lips, self._network.voice(mfcc(self._voice), count))
        offset: float | Unavailable = float(found.offset)
        if found.confidence < CERTAIN:
            offset = Unavailable(f"an offset at a confidence of {found.confidence:.2f} is noise")
        return dict(zip(names, (found.confidence, found.distance, offset), strict=True))


def open_lip_sync(weights: Path) -> Start:
    """SyncNet's metrics."""
    network = LipSyncNetwork(load_scorer("syncnet", weights / "syncnet.safetensors"))
    return lambda subject: _Meter(network, subject)
