"""The two-stage plan: which frames each network call takes. Integers only.

Keyframes are 13 frames apart; a keyframe call takes an anchor (frame 0) and 13 keyframes; an
interpolation call takes the 14 frames from one keyframe to the next, so neighbours share a frame.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

FRAMES = 14
"""T, frames of a network call."""

HOP = FRAMES - 1
"""Frames from one keyframe to the next."""


@dataclass(frozen=True)
class KeyframeCall:
    """One call of the keyframe stage.

    Attributes:
      source: frame whose audio, latent and mask each of the T places takes.
      keyframe: the frame that each place generates; None where the place is dropped afterwards
        (anchors and padding).
    """

    source: tuple[int, ...]
    keyframe: tuple[int | None, ...]

    @property
    def kept(self) -> list[int]:
        """Places that generate a keyframe; the last call of a plan can have none."""
        return [place for place, frame in enumerate(self.keyframe) if frame is not None]


@dataclass(frozen=True)
class Plan:
    """Network calls for a clip.

    Attributes:
      keyframe_calls: in order.
      windows: first and last frame of each interpolation call, both keyframes.
    """

    keyframe_calls: tuple[KeyframeCall, ...]
    windows: tuple[tuple[int, int], ...]

    @property
    def keyframes(self) -> list[int]:
        """Frames that the keyframe stage generates, ascending."""
        return [k for call in self.keyframe_calls for k in call.keyframe if k is not None]


def padded_length(frames: int) -> int:
    """The next length 13 k + 1 (k >= 1), whose plan covers every one of `frames` frames."""
    return max(-(-(frames - 1) // HOP), 1) * HOP + 1


def make_plan(frames: int) -> Plan:
    """The reference's plan. Frames after the last whole window are not covered: see `padded_length`.

    Raises:
      ValueError: fewer frames than a window.
    """
    if frames < FRAMES:
        raise ValueError(f"a plan needs at least {FRAMES} frames, not {frames}")
    windows = tuple((start, start + HOP) for start in range(0, frames - HOP, HOP))
    keyframes: list[int | None] = [*range(0, windows[-1][1] + 1, HOP)]
    return Plan(_keyframe_calls(keyframes), windows)


def _keyframe_calls(keyframes: list[int | None]) -> tuple[KeyframeCall, ...]:
    """Anchors at every 14th place, the last call filled up with its last entry.

    The reference's count of anchors can exceed the calls by one; that anchor then ends the list and
    is what fills the last call, which the temporal layers see.
    """
    places = list(keyframes)
    for at in range(0, len(keyframes) + (len(keyframes) + 1) % FRAMES, FRAMES):
        places.insert(at, None)
    calls = []
    for start in range(0, len(places), FRAMES):
        kept = places[start : start + FRAMES]
        padding = FRAMES - len(kept)
        source = [0 if k is None else k for k in kept]
        source += source[-1:] * padding
        calls.append(KeyframeCall(tuple(source), (*kept, *[None] * padding)))
    return tuple(calls)


def merge_windows(windows: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Frames of a clip from those of its windows; the frame that two neighbours share is averaged.

    Args:
      windows: arrays `[T, ...]` in order; one at a time is held.

    Yields:
      Frames `[...]`, 13 a window and one more at the end.
    """
    shared: np.ndarray | None = None
    for window in windows:
        yield window[0] if shared is None else (shared + window[0]) / 2
        yield from window[1:-1]
        shared = window[-1]
    if shared is not None:
        yield shared
