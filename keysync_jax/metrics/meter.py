"""What metrics are computed from, and what comes out: a clip is read once, frame by frame, by all of them.

A meter computes metrics of one clip. It is told beforehand what is small (voice, landmarks, boxes), then
shown the frames in order, and keeps no more than a few of them. `registry.Bench` opens the meters of a set of
metrics and shows them the same frames.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

import numpy as np

Need = Literal[
    "source", "truth", "mask", "landmarks", "truth_landmarks", "source_landmarks", "voice", "speaker", "boxes"
]
"""What a metric can need beside the frames of the dub: a field of `Moment` or of `Subject`, by its name."""

NEEDS: Mapping[Need, str] = {
    "source": "the source video's frames",
    "truth": "frames that show the right mouth",
    "mask": "the mask of what was repainted",
    "landmarks": "the output's landmarks",
    "truth_landmarks": "the truth's landmarks",
    "source_landmarks": "the source video's landmarks",
    "voice": "a voice",
    "speaker": "the video whose voice drives, and its landmarks",
    "boxes": "the face's box in each frame",
}
"""What each is, for messages."""


@dataclass(frozen=True)
class Unavailable:
    """Stands where a metric has no number; its text is the sentence to show."""

    reason: str

    def __str__(self) -> str:
        return f"not available: {self.reason}"


@dataclass(frozen=True)
class Subject:
    """What of a clip is known before its frames are read. All of it is at 25 fps and in pixels of the frames.

    Attributes:
      frames: how many there are, T.
      streams: which fields of `Moment` beside `frame` every frame will have.
      voice: float32 `[S]`, 16 kHz mono, full scale 1: the voice that scores the clip. It begins with frame 0.
      landmarks: `[T, 68, 2]` of the output; NaN where a frame has no face.
      truth_landmarks: the same of `Moment.truth`.
      source_landmarks: the same of `Moment.source`.
      speaker_landmarks: the same of `Moment.speaker`.
      boxes: int `[T, 4]` as `media.crop` has them: the declared square that metrics of pictures look at; the
        whole frame where None.
    """

    frames: int
    streams: frozenset[Literal["source", "truth", "mask", "speaker"]] = frozenset()
    voice: np.ndarray | None = None
    landmarks: np.ndarray | None = None
    truth_landmarks: np.ndarray | None = None
    source_landmarks: np.ndarray | None = None
    speaker_landmarks: np.ndarray | None = None
    boxes: np.ndarray | None = None

    def has(self, need: Need) -> bool:
        """Whether a clip brings something, its landmarks with a face in at least one frame."""
        if need == "speaker":
            return "speaker" in self.streams and _seen(self.speaker_landmarks)
        if need in ("source", "truth", "mask"):
            return need in self.streams
        if need == "voice":
            return self.voice is not None
        if need == "boxes":
            return self.boxes is not None
        return _seen(getattr(self, need))


def _seen(landmarks: np.ndarray | None) -> bool:
    return landmarks is not None and bool(np.isfinite(landmarks).all(axis=(1, 2)).any())


@dataclass(frozen=True)
class Moment:
    """One frame of a clip, and the frames of other videos that belong to it; pictures of one size.

    Attributes:
      frame: of the output, uint8 RGB `[H, W, 3]`.
      source: of the video that was dubbed, aligned with it.
      truth: what the output should be, its mouth too. In reconstruction it is `source`, the same array.
      mask: bool `[H, W]`, what the system repainted.
      speaker: of the video whose voice drives, uint8 RGB of any size.
    """

    frame: np.ndarray
    source: np.ndarray | None = None
    truth: np.ndarray | None = None
    mask: np.ndarray | None = None
    speaker: np.ndarray | None = None


Found: TypeAlias = Mapping[str, float | np.ndarray | Unavailable]
"""A meter's results by name: numbers of metrics, series of the clip (arrays), or why there is none."""


class Meter(Protocol):
    """Computes metrics of one clip."""

    def update(self, moment: Moment) -> None:
        """Takes the next frame. What it is given is not kept as a reference for longer than the call."""
        ...

    def result(self) -> Found:
        """What was found, once after the last frame."""
        ...


Start: TypeAlias = Callable[[Subject], Meter]
"""Begins a clip. What costs time to open (networks) is in it already, so one serves all clips."""

Open: TypeAlias = Callable[[Path], "Start | Unavailable"]
"""Opens a measure, with the folder of the weights."""


@dataclass(frozen=True)
class Record:
    """What is kept of one clip.

    Attributes:
      values: metric -> number.
      missing: metric -> why it has none.
      series: name -> array of the clip, from which metrics of sets of clips are made ("mar": `[T]`).
    """

    values: Mapping[str, float] = field(default_factory=dict)
    missing: Mapping[str, Unavailable] = field(default_factory=dict)
    series: Mapping[str, np.ndarray] = field(default_factory=dict)
