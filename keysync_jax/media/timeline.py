"""The 25 fps timeline: which source frame stands for which output frame.

All arithmetic is in exact fractions of a second, so that every pass over a file chooses the same frames.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeVar

import numpy as np

FPS = 25
"""Frames a second that the networks were trained on."""

Item = TypeVar("Item")


@dataclass(frozen=True)
class Timeline:
    """The constant-rate view of a video file.

    `index[k]` is the number of the source frame shown at time k / fps (non-decreasing, int64 `[n]`);
    `pts[i]` is source frame i's timestamp in the stream's time base, None where the file has none.
    """

    index: np.ndarray
    pts: tuple[int | None, ...]

    def __len__(self) -> int:
        return len(self.index)

    @property
    def source_frames(self) -> int:
        """Number of frames in the file itself, whatever their rate."""
        return len(self.pts)


def nearest_items(
    items: Iterable[tuple[Fraction, Fraction, Item]], fps: int | Fraction = FPS
) -> Iterator[Item]:
    """Resample a stream of (time, duration, item) to a constant rate by the nearest time.

    Times and durations are seconds, times increase. Output k is the item nearest to first time + k / fps,
    the earlier one on a tie. The last item lasts for its duration, so the number of outputs is the stream's
    duration in frames, rounded. Holds one item. A stream that already has the rate passes unchanged.
    """
    start: Fraction | None = None
    held: tuple[Fraction, Fraction, Item] | None = None
    emitted = 0
    for time, duration, item in items:
        start = time if start is None else start
        if held is not None:
            middle = (held[0] + time) / 2 - start
            while Fraction(emitted) / fps <= middle:
                yield held[2]
                emitted += 1
        held = (time, duration, item)
    if held is None or start is None:
        return
    total = (held[0] + held[1] - start) * fps + Fraction(1, 2)
    for _ in range(emitted, max(total.numerator // total.denominator, 1)):
        yield held[2]


def source_index(i: int, n: int) -> int:
    """Frame shown at output frame `i` when `n` frames are played to and fro: 0 1 .. n-1 n-2 .. 1 0 1 ..

    Neighbouring outputs are neighbours in the source, so a voice longer than the video meets no cut.
    """
    if n < 1 or i < 0:
        raise ValueError(f"no frame {i} in a video of {n} frames")
    period = max(2 * (n - 1), 1)
    phase = i % period
    return min(phase, period - phase) if n > 1 else 0
