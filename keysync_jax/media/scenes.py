"""Hard cuts between scenes."""

import cv2
import numpy as np


class SceneCuts:
    """Finds scene cuts as PySceneDetect's ContentDetector does, on frames of at most 256 pixels' width.

    A cut is where the mean difference of hue, saturation and value of two frames is 27 or more, 15 frames or
    more after the one before it.

    Attributes:
      frames: numbers of the frames that begin a scene, without the first.
    """

    LEAST, APART, WIDTH = 27.0, 15, 256

    def __init__(self) -> None:
        self.frames: list[int] = []
        self._before: np.ndarray | None = None
        self._number = self._since = 0

    @property
    def count(self) -> int:
        """Cuts so far."""
        return len(self.frames)

    def update(self, frame: np.ndarray) -> None:
        """Takes the next frame, uint8 RGB `[H, W, 3]`."""
        factor = max(1, frame.shape[1] // self.WIDTH)
        size = (frame.shape[1] // factor, frame.shape[0] // factor)
        small = cv2.cvtColor(cv2.resize(frame, size, interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2HSV)
        small = small.astype(np.int16)
        self._since += 1
        far = self._before is not None and np.abs(small - self._before).mean() >= self.LEAST
        if far and self._since >= self.APART:
            self.frames.append(self._number)
            self._since = 0
        self._before = small
        self._number += 1
