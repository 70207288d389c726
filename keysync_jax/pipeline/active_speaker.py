"""Whether a face is speaking the voice that is heard, by Light-ASD: a score of each frame.

As the demo of Light-ASD scores a track: in pieces of one to six seconds, whose six scores are averaged,
because the network is recurrent and what it says depends on where a piece begins and ends.
"""

from pathlib import Path
from typing import NamedTuple

import cv2
import jax
import numpy as np

from keysync_jax.backend import computing
from keysync_jax.convert.scorers import load_scorer
from keysync_jax.media.face_track import SIDE as CROP
from keysync_jax.media.face_track import cut_face, face_track
from keysync_jax.media.mfcc import COEFFICIENTS, PER_FRAME, mfcc, to_int16
from keysync_jax.media.timeline import FPS
from keysync_jax.model import Network
from keysync_jax.nn import functional as F
from keysync_jax.nn.light_asd import SIDE
from keysync_jax.typing import Array

PIECES = tuple(FPS * seconds for seconds in range(1, 7))
"""Frames of the pieces of each of the six passes."""

SMOOTHED = 2
"""Frames to each side that a decision is averaged over."""


class Speaking(NamedTuple):
    """Scores of each frame, float32 `[T]`.

    Attributes:
      logit: of speaking, the demo's own score.
      probability: of speaking, by the softmax; 0 to 1.
    """

    logit: np.ndarray
    probability: np.ndarray

    @property
    def share(self) -> float:
        """Share of the frames that speak: whose logit, averaged over +-2 frames, is not negative."""
        reach = range(len(self.logit))
        means = [self.logit[max(0, t - SMOOTHED) : t + SMOOTHED + 1].mean() for t in reach]
        return float(np.mean([mean >= 0 for mean in means]))


class SpeakerNetwork:
    """Light-ASD, compiled for each length of a piece."""

    def __init__(self, network: Network) -> None:
        graphdef, self._params = network

        def logits(params: Array, faces: Array, vectors: Array) -> Array:
            return F.bind(graphdef, params)(faces, vectors)

        self._logits = jax.jit(logits)

    @classmethod
    def load(cls, path: Path) -> "SpeakerNetwork":
        """From a file that `keysync convert --light-asd` wrote. Raises UserError if it is none."""
        return cls(load_scorer("light-asd", path))

    def logits(self, faces: np.ndarray, vectors: np.ndarray) -> np.ndarray:
        """Of (silent, speaking): grey uint8 `[T, 112, 112]` and MFCC `[4 T, 13]` to fp32 `[T, 2]`."""
        with computing("fp32"):
            return np.asarray(self._logits(self._params, faces[None], vectors[None]))[0]


class SpeakerTrack:
    """Scores one face of a clip, frame by frame; holds six seconds of it.

    Args:
      boxes: of the face, `[T, 4]` in pixels, one of each frame.
      voice: float32 `[S]`, 16 kHz, full scale 1; frames after its end have no score.
    """

    def __init__(self, network: SpeakerNetwork, boxes: np.ndarray, voice: np.ndarray) -> None:
        self._network, self._track = network, face_track(boxes)
        vectors = mfcc(to_int16(voice))
        self._length = min(len(boxes), len(vectors) // PER_FRAME)
        self._vectors = vectors[: self._length * PER_FRAME].reshape(self._length, PER_FRAME, COEFFICIENTS)
        self._faces: list[np.ndarray] = []
        self._first = 0
        """Number of the first face that is held."""
        self._done = dict.fromkeys(PIECES, 0)
        self._scores: dict[int, list[np.ndarray]] = {piece: [] for piece in PIECES}

    def update(self, frame: np.ndarray) -> None:
        """Takes the next frame, uint8 RGB `[H, W, 3]`."""
        t = self._first + len(self._faces)
        if t >= self._length:
            return
        grey = cv2.cvtColor(cut_face(frame, self._track[t]), cv2.COLOR_RGB2GRAY)
        edge = (CROP - SIDE) // 2
        self._faces.append(grey[edge : edge + SIDE, edge : edge + SIDE])
        for piece in PIECES:
            if t + 1 - self._done[piece] == piece:
                self._score(piece, t + 1)
        kept = min(self._done.values())
        self._faces = self._faces[kept - self._first :]
        self._first = kept

    def _score(self, piece: int, last: int) -> None:
        first = self._done[piece]
        faces = np.stack(self._faces[first - self._first : last - self._first])
        vectors = self._vectors[first:last].reshape(-1, COEFFICIENTS)
        self._scores[piece].append(self._network.logits(faces, vectors))
        self._done[piece] = last

    def result(self) -> Speaking:
        """The scores of all frames that were shown, once after the last.

        Raises:
          ValueError: there is no frame with a voice.
        """
        last = self._first + len(self._faces)
        for piece in PIECES:
            if last > self._done[piece]:
                self._score(piece, last)
        if not last:
            raise ValueError("no frame with a voice")
        logits = np.stack([np.concatenate(self._scores[piece]) for piece in PIECES])
        speaking = 1 / (1 + np.exp(logits[..., 0] - logits[..., 1]))
        return Speaking(logits[..., 1].mean(axis=0), speaking.mean(axis=0))
