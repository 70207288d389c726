"""What a mouth does, frame by frame: the one thing that the voice and the face of this world share."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Articulation:
    """A mouth at 25 frames a second, smooth in time; float32 `[T]` each.

    Attributes:
      opening: gap between the inner lips, 0 (closed) to 1 (widest open).
      width: distance of the corners, -1 (narrow, as in "oo") through 0 (rest) to 1 (spread, as in "ee").
      rounding: protrusion of the lips, 0 to 1; rounded lips look fuller.
      teeth: how much the upper teeth show in an open mouth, 0 to 1.
    """

    opening: np.ndarray
    width: np.ndarray
    rounding: np.ndarray
    teeth: np.ndarray

    def __len__(self) -> int:
        return len(self.opening)


def at_rest(frames: int) -> Articulation:
    """A closed mouth for so many frames."""
    return Articulation(*(np.zeros(frames, np.float32) for _ in range(4)))
