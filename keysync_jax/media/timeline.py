"""The 25 fps timeline: which source frame stands for which output frame.

All arithmetic is in exact fractions of a second, so that every pass over a file chooses the same frames.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np

log = logging.getLogger(__name__)

FPS = 25
"""Frames a second that the networks were trained on."""

LONGEST_GAP = Fraction(10)
"""Seconds from one frame to the next. Timestamps that step further forward are a clock that was set anew (the
limit that FFmpeg's own program takes for broadcasts, `-dts_delta_threshold`): no such time has passed."""

LONGEST_STEP_BACK = Fraction(1)
"""Seconds. A longer step backward is a clock set anew too; a shorter one is disorder or rounding."""

MOST_TOLD = 3
"""Jumps that a warning names."""

Longer = Literal["to-and-fro", "loop", "freeze", "stop"]
"""What a video does under a voice that is longer than it."""

Item = TypeVar("Item")


@dataclass(frozen=True)
class Jump:
    """Where a file's clock was set anew: it steps from `before`, when a frame ended, to `after`.

    Both are timestamps of the file in seconds; between them nothing is shown.
    """

    before: Fraction
    after: Fraction

    @property
    def is_forward(self) -> bool:
        return self.after > self.before


def report_jumps(path: Path, what: str, jumps: Sequence[Jump], start: Fraction) -> None:
    """Warn of jumps in the timestamps of a file's picture or sound (`what`), by the time since `start`."""
    if not jumps:
        return
    times = [f"{_clock_time(j.before - start)} to {_clock_time(j.after - start)}" for j in jumps[:MOST_TOLD]]
    more = f" and {len(jumps) - MOST_TOLD} times more" if len(jumps) > MOST_TOLD else ""
    told = ", from ".join(times) + more
    log.warning("%s: the timestamps of its %s jump from %s; no time passes there", path, what, told)


def _clock_time(seconds: Fraction) -> str:
    hours, rest = divmod(round(abs(seconds) * 1000), 3_600_000)
    minutes, milliseconds = divmod(rest, 60_000)
    sign = "-" if seconds < 0 else ""
    return f"{sign}{hours}:{minutes:02}:{milliseconds / 1000:06.3f}"


class Clock:
    """The time of each frame by the timestamps of a stream: seconds that only increase.

    A timestamp that is missing or does not increase follows its neighbour by `period`. A step of more than
    `LONGEST_GAP`, or of more than `LONGEST_STEP_BACK` backward, counts as one frame's time; `jumps` keeps it.
    """

    def __init__(self, period: Fraction) -> None:
        # An average rate that such a step is part of says nothing.
        self.period = period if period <= LONGEST_GAP else Fraction(1, FPS)
        self.jumps: list[Jump] = []
        self._last: Fraction | None = None
        self._step = min(self.period, Fraction(1, FPS))
        self._lead = Fraction(0)  # of the times over the timestamps

    def time(self, stamp: Fraction | None) -> Fraction:
        """The time of the next frame, whose timestamp is `stamp` (None if it has none)."""
        last, time = self._last, None if stamp is None else stamp + self._lead
        if last is None:
            time = Fraction(0) if time is None else time
        elif time is None or -LONGEST_STEP_BACK <= time - last <= 0:
            time = last + self.period
        elif 0 < time - last <= LONGEST_GAP:
            self._step = time - last
        else:
            self.period = min(self._step, self.period)
            self.jumps.append(Jump(last + self.period - self._lead, time - self._lead))
            self._lead += last + self.period - time
            time = last + self.period
        self._last = time
        return time

    def lasting(self, duration: Fraction) -> Fraction:
        """How long a frame lasts that says `duration`; 0 says nothing."""
        return duration if 0 < duration <= LONGEST_GAP else self.period

    def end(self, duration: Fraction) -> None:
        """The stream ends with a frame that says `duration`: one that is too long is a jump as well."""
        if duration > LONGEST_GAP and self._last is not None:
            stamp = self._last - self._lead
            self.jumps.append(Jump(stamp + self.period, stamp + duration))


@dataclass(frozen=True)
class Timeline:
    """The constant-rate view of a video file.

    `index[k]` is the number of the source frame shown at time k / fps (non-decreasing, int64 `[n]`);
    `pts[i]` is source frame i's timestamp in the stream's time base, None where the file has none;
    `jumps` are the places where the timestamps jump; `interlaced` says whether any frame is.
    """

    index: np.ndarray
    pts: tuple[int | None, ...]
    jumps: tuple[Jump, ...] = ()
    interlaced: bool = False

    def __len__(self) -> int:
        return len(self.index)

    @property
    def source_frames(self) -> int:
        """Number of frames in the file itself, whatever their rate."""
        return len(self.pts)

    @cached_property
    def is_ordered(self) -> bool:
        """Whether a timestamp means one frame, so that frames can be sought."""
        known = [stamp for stamp in self.pts if stamp is not None]
        return all(one < other for one, other in pairwise(known))


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


def source_index(i: int, n: int, longer: Longer = "to-and-fro") -> int:
    """Frame of a video of `n` frames that is shown at output frame `i`, for a voice that is longer.

    Played to and fro, 0 1 .. n-1 n-2 .. 1 0 1 .., neighbouring outputs are neighbours in the source, so the
    voice meets no cut. A loop begins anew, and what freezes or stops shows the last frame.
    """
    if n < 1 or i < 0:
        raise ValueError(f"no frame {i} in a video of {n} frames")
    if longer == "loop":
        return i % n
    if longer != "to-and-fro":
        return min(i, n - 1)
    period = max(2 * (n - 1), 1)
    phase = i % period
    return min(phase, period - phase) if n > 1 else 0
