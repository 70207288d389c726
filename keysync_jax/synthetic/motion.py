"""How a head moves in front of the camera. Speech has no part in it: only the voice tells the mouth."""

from dataclasses import dataclass

import numpy as np

FPS = 25


@dataclass(frozen=True)
class Motion:
    """The movement of a head at 25 frames a second; float32 `[T]` each.

    Attributes:
      x: shift to the right, pixels of a 256 x 256 picture.
      y: shift downwards, the same.
      scale: factor on the head's size.
      roll: tilt, radians, clockwise in the picture.
      yaw: turn to the picture's right, -1 to 1 (full is some ten degrees).
      pitch: nod downwards, -1 to 1.
      blink: 0 (eyes open) to 1 (closed).
      gaze_x: where the eyes look, -1 (picture's left) to 1.
      gaze_y: -1 (up) to 1 (down).
      brow: raising of the brows, -1 to 1.
      flicker: factor on the brightness, near 1.
    """

    x: np.ndarray
    y: np.ndarray
    scale: np.ndarray
    roll: np.ndarray
    yaw: np.ndarray
    pitch: np.ndarray
    blink: np.ndarray
    gaze_x: np.ndarray
    gaze_y: np.ndarray
    brow: np.ndarray
    flicker: np.ndarray

    def __len__(self) -> int:
        return len(self.x)


def still(frames: int) -> Motion:
    """A head that does not move, eyes open."""
    nought = np.zeros(frames, np.float32)
    one = np.ones(frames, np.float32)
    return Motion(nought, nought, one, nought, nought, nought, nought, nought, nought, nought, one)


def draw_motion(rng: np.random.Generator, frames: int) -> Motion:
    """Draw a movement: slow drift with faster nods on top, blinks every few seconds, small saccades.

    Some heads are livelier than others; all stay inside a 256 x 256 picture.
    """
    lively = rng.uniform(0.35, 1.0)

    def wander(reach: float, slow: float = 1.2, fast: float = 0.28, share: float = 0.25) -> np.ndarray:
        drift = _noise(rng, frames, slow) + share * lively * _noise(rng, frames, fast)
        return (reach * lively * np.tanh(drift / 1.6)).astype(np.float32)

    return Motion(
        x=wander(9),
        y=wander(6, share=0.35),
        scale=1 + wander(0.035, slow=1.8),
        roll=wander(0.09),
        yaw=wander(1.0),
        pitch=wander(1.0, share=0.4),
        blink=_blinks(rng, frames),
        gaze_x=_saccades(rng, frames, 0.7),
        gaze_y=_saccades(rng, frames, 0.4),
        brow=wander(0.9, slow=0.7, share=0.5),
        flicker=1 + 0.006 * np.tanh(_noise(rng, frames, 0.3)),
    )


def _noise(rng: np.random.Generator, frames: int, seconds: float) -> np.ndarray:
    """Gaussian noise of unit variance that is smooth over so many seconds: float32 `[T]`."""
    width = seconds * FPS / 2
    reach = int(np.ceil(3 * width))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    kernel /= np.sqrt((kernel**2).sum())
    return np.convolve(rng.standard_normal(frames + 2 * reach), kernel, "valid").astype(np.float32)


def _blinks(rng: np.random.Generator, frames: int) -> np.ndarray:
    """Closings of about a quarter of a second, one to six seconds apart."""
    closed = np.zeros(frames, np.float32)
    time = np.arange(frames)
    at = rng.uniform(0, 4 * FPS)
    while at < frames + FPS:
        fall, rise = rng.uniform(1.6, 2.2), rng.uniform(2.4, 3.6)
        away = (time - at) / np.where(time < at, fall, rise)
        closed = np.maximum(closed, np.exp(-(away**4)).astype(np.float32))
        at += FPS * rng.uniform(1.2, 6.0)
    return closed


def _saccades(rng: np.random.Generator, frames: int, reach: float) -> np.ndarray:
    """Gaze that rests for a while and then jumps within two frames, mostly near the middle."""
    gaze = np.zeros(frames, np.float32)
    at = 0
    while at < frames:
        gaze[at:] = np.clip(rng.normal(0, reach / 2), -reach, reach)
        at += int(rng.integers(FPS // 2, 3 * FPS))
    softened = np.convolve(np.pad(gaze, 1, mode="edge"), np.array([0.25, 0.5, 0.25]), "valid")
    return softened.astype(np.float32)
