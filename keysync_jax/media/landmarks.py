"""68 landmarks a frame: reading and saving them, finding them in frames, bridging gaps.

Landmarks are float32 `[T, 68, 2]`, (x, y) in pixels of the upright frame, in the 68-point order of 300-W
(0-16 jaw, 17-26 brows, 27-35 nose, 36-47 eyes, 48-67 mouth); a frame without a face is NaN.
"""

from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from keysync_jax.errors import UserError
from keysync_jax.files import replacing
from keysync_jax.media.crop import square_pixels
from keysync_jax.media.timeline import FPS, Timeline

T = TypeVar("T")

POINTS = 68
MAX_GAP = FPS // 2
"""Frames without a face that are bridged; a longer stretch passes through undubbed."""


class Detector(Protocol):
    """Finds the 68 landmarks of one face; frames are shown to it in order."""

    def detect(self, frame: np.ndarray) -> np.ndarray | None:
        """Return float32 `[68, 2]` in pixels for a uint8 RGB frame `[H, W, 3]`, or None without a face."""
        ...

    def close(self) -> None:
        """Free what the detector holds; it is not used afterwards."""
        ...


def load_landmarks(path: Path, frames: int, source: Timeline | None = None) -> np.ndarray:
    """Read landmarks from a `.npy` file as float32 `[frames, 68, 2]`.

    The file has one row for each of the `frames` frames at 25 fps, or, if `source` is given, one for each
    frame of the source video, whatever its rate. A row with a NaN is a frame without a face.
    Raises UserError if the file is unreadable, no `.npy`, or of the wrong kind, shape or length.
    """
    try:
        array = np.load(path, allow_pickle=False)
    except FileNotFoundError as error:
        raise UserError(f"the landmark file {path} does not exist") from error
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"cannot read {path} as a .npy file of landmarks") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
        raise UserError(f"{path} must hold one array of numbers, [frames, {POINTS}, 2]")
    if array.ndim != 3 or array.shape[1:] != (POINTS, 2):
        raise UserError(f"{path} has shape {list(array.shape)}; landmarks are [frames, {POINTS}, 2]")
    if source is not None and len(array) == source.source_frames:
        array = array[source.index]
    if len(array) != frames:
        raise UserError(f"{path} has landmarks for {len(array)} frames, but the video has {frames}")
    if np.isinf(array).any():
        raise UserError(f"{path} holds infinite coordinates; a frame without a face must be NaN")
    landmarks = array.astype(np.float32)
    landmarks[np.isnan(landmarks).any(axis=(1, 2))] = np.nan
    return landmarks


def save_landmarks(path: Path, landmarks: np.ndarray) -> None:
    """Write landmarks `[T, 68, 2]` as a float32 `.npy` file that `load_landmarks` reads."""
    with replacing(path) as partial, partial.open("wb") as file:
        np.save(file, np.asarray(landmarks, np.float32))


def detect_all(
    frames: Iterable[np.ndarray],
    detector: Detector,
    progress: Callable[[int], object] | None = None,
    aspect: Fraction | float = 1,
) -> np.ndarray:
    """Landmarks of a stream of uint8 RGB frames: float32 `[T, 68, 2]`, NaN where no face is found.

    `progress` is called with 1 after each frame. `aspect` is the width of the frames' pixels over their
    height: the detector sees square ones, the landmarks are in the frames' own.
    """
    rows: list[np.ndarray] = []
    for _, row in detect_each(frames, detector, aspect):
        rows.append(row)
        if progress is not None:
            progress(1)
    return np.stack(rows) if rows else np.empty((0, POINTS, 2), np.float32)


def detect_each(
    frames: Iterable[np.ndarray], detector: Detector, aspect: Fraction | float = 1
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Each frame with its landmarks `[68, 2]`, as `detect_all` finds them."""
    for frame in frames:
        shown = square_pixels(frame, aspect)
        found = detector.detect(shown)
        if found is not None and shown is not frame:
            found = (found / shown.shape[1::-1] * frame.shape[1::-1]).astype(np.float32)
        yield frame, np.full((POINTS, 2), np.nan, np.float32) if found is None else found


def bridge(landmarks: np.ndarray, max_gap: int = MAX_GAP) -> tuple[np.ndarray, np.ndarray]:
    """Fill the frames without a face: finite float32 `[T, 68, 2]`, and present, bool `[T]`.

    Missing frames are interpolated linearly between their neighbours, those at the ends repeat the nearest.
    A gap of more than `max_gap` frames is filled too, so that every frame has a geometry, but counts as
    absent. Raises UserError if no frame has a face.
    """
    found = ~np.isnan(landmarks).any(axis=(1, 2))
    if not found.any():
        raise UserError("no face was found in any frame of the video")
    known, every = np.flatnonzero(found), np.arange(len(landmarks))
    flat = landmarks.reshape(len(landmarks), -1)
    columns = [np.interp(every, known, flat[known, column]) for column in range(flat.shape[1])]
    filled = np.stack(columns, axis=1).reshape(landmarks.shape).astype(np.float32)
    filled[found] = landmarks[found]
    present = found.copy()
    borders = np.concatenate([[-1], known, [len(landmarks)]])
    for before, after in pairwise(borders.tolist()):
        if after - before - 1 <= max_gap:
            present[before + 1 : after] = True
    return filled, present


def bridge_each(
    rows: Iterable[tuple[T, np.ndarray]], most: int, max_gap: int = MAX_GAP
) -> Iterator[tuple[T, np.ndarray, bool]]:
    """`bridge` of a stream of (item, landmarks `[68, 2]`), as early as what follows does not change it.

    Items without a face are held until the next face, or the end. Where more than `most` would be held
    nothing is yielded any more, though all rows are taken.

    Yields:
      (item, landmarks, present) of the stream's first items, in order; of none where there is no face.
    """
    held: list[tuple[T, np.ndarray]] = []
    last: list[np.ndarray] = []  # the face before those held
    for item, row in rows:
        held.append((item, row))
        if not np.isnan(row).any():
            yield from _bridged(last, held, max_gap)
            last, held = [row], []
        elif len(held) > most:
            held = []
            for _ in rows:
                pass
    if last:
        yield from _bridged(last, held, max_gap)


def _bridged(
    last: list[np.ndarray], held: list[tuple[T, np.ndarray]], max_gap: int
) -> Iterator[tuple[T, np.ndarray, bool]]:
    filled, present = bridge(np.stack([*last, *(row for _, row in held)]), max_gap)
    first = len(last)
    for (item, _), landmarks, here in zip(held, filled[first:], present[first:], strict=True):
        yield item, landmarks, bool(here)


def runs_without(present: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Stretches (first, count) where a bool `[T]` is false."""
    edges = np.flatnonzero(np.diff(np.concatenate([[True], present, [True]])))
    return tuple((int(a), int(b - a)) for a, b in zip(edges[::2], edges[1::2], strict=True))
