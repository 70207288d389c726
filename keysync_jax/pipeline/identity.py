"""What shows the keyframe stage who it is: a frame of the video, each frame itself, or another picture.

The released system takes the first frame. The others are what the leakage study compares: the current frame,
whose mouth is the one that is to be replaced, and alternatives to it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from keysync_jax.errors import UserError
from keysync_jax.files import sha256_of
from keysync_jax.media.crop import crop_frame, crop_track
from keysync_jax.media.detectors import DETECTORS, make_detector
from keysync_jax.media.masks import MOUTH
from keysync_jax.media.video import read_frames

FIRST, CURRENT, RANDOM, DISSIMILAR = "first", "current", "random", "dissimilar"
CHOICES = (FIRST, CURRENT, RANDOM, DISSIMILAR)

Chosen = int | np.ndarray | None
"""A frame of the video; the crop of a picture, uint8 `[S, S, 3]`; None: every frame is its own reference."""

EYES = slice(36, 48)


class _Settings(Protocol):
    """What is read of `dub.DubSettings`."""

    @property
    def identity(self) -> str: ...
    @property
    def landmarks(self) -> str: ...
    @property
    def landmark_model(self) -> Path | None: ...
    @property
    def allow_download(self) -> bool: ...
    @property
    def seed(self) -> int: ...


@dataclass(frozen=True)
class Identity:
    """What the user asked for, checked.

    Attributes:
      name: one of `CHOICES`, or the number of a frame; empty for a picture.
      picture: uint8 `[H, W, 3]`.
      digest: what a kept result depends on, for its fingerprint.
    """

    name: str
    digest: str
    picture: np.ndarray | None = None

    @classmethod
    def given(cls, settings: _Settings, frames: int) -> "Identity":
        """Checks the setting.

        Args:
          frames: of the video that are used.

        Raises:
          UserError: it is neither a choice, nor a frame that is used, nor a picture that can be read.
        """
        name = settings.identity
        if name in CHOICES:
            return cls(name, name)
        if name.isdecimal():
            if int(name) >= frames:
                raise UserError(
                    f"--identity {name}: the dub uses {frames} frames of the video, 0 to {frames - 1}"
                )
            return cls(str(int(name)), str(int(name)))
        path = Path(name)
        if not path.is_file():
            raise UserError(
                f"--identity {name}: is neither {', '.join(CHOICES)}, nor a frame's number, nor a file"
            )
        return cls("", sha256_of(path), next(read_frames(path)))

    def choose(self, landmarks: np.ndarray, present: np.ndarray, settings: _Settings, size: int) -> Chosen:
        """The reference of a clip.

        Args:
          landmarks: `[N, 68, 2]` of its frames.
          present: which have a face, `[N]`.
          size: of a crop.

        Raises:
          UserError: the frame that was asked for has no face, or the picture shows none.
        """
        if self.picture is not None:
            return _face(self.picture, settings, size)
        faces = np.flatnonzero(present)
        if self.name == CURRENT:
            return None
        if self.name == RANDOM:
            return int(np.random.default_rng(settings.seed).choice(faces))
        if self.name == DISSIMILAR:
            return int(faces[_dissimilar(landmarks[faces])])
        # The reference takes frame 0, which may be a title or a fade; it is the same where it has a face.
        frame = int(faces[0]) if self.name == FIRST else int(self.name)
        if not present[frame]:
            raise UserError(f"--identity {frame}: no face was found in that frame")
        return frame


def _dissimilar(landmarks: np.ndarray) -> int:
    """The frame whose lips are the least like those of all frames: `[N, 68, 2]` to its number.

    Lips are compared about their own centre and in units of the eyes, so that the head's place and size do
    not count.
    """
    lips = landmarks[:, MOUTH] - landmarks[:, MOUTH].mean(axis=1, keepdims=True)
    extent = np.ptp(landmarks[:, EYES], axis=1).max(axis=-1)
    lips = lips / extent[:, None, None]
    squares = (lips**2).sum(axis=(1, 2))
    # The mean squared distance to all frames; the same for each up to a constant.
    return int(np.argmax(squares - 2 * (lips * lips.mean(axis=0)).sum(axis=(1, 2))))


def _face(picture: np.ndarray, settings: _Settings, size: int) -> np.ndarray:
    """The crop of a picture, around the face that the detector finds; all of it without a detector."""
    height, width = picture.shape[:2]
    box = np.array([0, 0, width, height])
    if settings.landmarks in DETECTORS:
        detector = make_detector(settings.landmarks, settings.landmark_model, settings.allow_download)
        try:
            found = detector.detect(picture)
        finally:
            detector.close()
        if found is None:
            raise UserError(f"--identity {settings.identity}: no face was found in that picture")
        box = crop_track(found[None], np.ones(1, bool), height, width)[0]
    return crop_frame(picture, box, size)
