"""A voice at another pitch, in the same time.

The voice is resampled, which moves its pitch, and brought back to its length by overlapping windows that
are joined where their waves agree (WSOLA: Verhelst and Roelands, ICASSP 1993). FFmpeg's `atempo` does the
same, but moves sounds by some 25 ms, more than half a video frame, and not every build has its rubberband.
"""

import numpy as np

from keysync_jax.errors import UserError
from keysync_jax.media.audio import RATE, resample

LARGEST_SHIFT = 12.0
"""Semitones, up or down."""

HOP = 160
"""Samples from window to window, 10 ms; a window has twice as many."""

REACH = 112
"""Samples that a window may be moved to agree with the one before: half a period at 71 Hz."""

# What a move by REACH costs, in correlation: of the periods that agree, the nearest is taken.
_NEARNESS = 0.1


def check_semitones(semitones: float) -> None:
    """Raises UserError unless `semitones` is a shift of at most an octave, and not none."""
    if not 0 < abs(semitones) <= LARGEST_SHIFT:
        raise UserError(f"a pitch shift is up to {LARGEST_SHIFT:g} semitones up or down, not {semitones:g}")


def shifted(wave: np.ndarray, semitones: float) -> np.ndarray:
    """A voice with all its frequencies times 2^(semitones / 12), every sound where it was to a few ms.

    Args:
      wave: float32 mono `[samples]` at 16 kHz.
      semitones: up, or down if negative; at most 12.

    Returns:
      float32 `[samples]`, as many as given.

    Raises:
      UserError: `semitones` is out of range.
    """
    check_semitones(semitones)
    rate = round(RATE * 2 ** (semitones / 12))
    # The silence at the end gives the resampler enough to start on.
    block = np.pad(wave, (0, HOP)).astype(np.float32)[None]
    faster = np.concatenate(list(resample([block], "mono", rate, RATE)), axis=1)[0]
    return _stretched(faster, RATE / rate, len(wave))


def _stretched(wave: np.ndarray, speed: float, samples: int) -> np.ndarray:
    """`samples` samples that run through `wave` at `speed`, its frequencies kept; float32.

    The middle of each window's second half stands at its own time, for that half is what the next window
    is moved to agree with. So a sound moves by no more than REACH and its share of half a window.
    """
    edge = 2 * HOP + REACH
    padded = np.pad(wave, (edge, edge + HOP + max(0, round(samples * speed) - len(wave))))
    window = 0.5 - 0.5 * np.cos(np.pi * np.arange(2 * HOP) / HOP)
    out = np.zeros(samples + 4 * HOP)
    continuation = padded[:0]
    for centre in range(0, samples + HOP, HOP):
        first = edge + round((centre + HOP / 2) * speed - HOP / 2) - HOP
        if len(continuation):
            first += _best_move(padded[first - REACH : first + REACH + HOP], continuation)
        out[centre : centre + 2 * HOP] += window * padded[first : first + 2 * HOP]
        continuation = padded[first + HOP : first + 2 * HOP]
    return out[HOP : HOP + samples].astype(np.float32)


def _best_move(candidates: np.ndarray, continuation: np.ndarray) -> int:
    """Move in [-REACH, REACH] at which `candidates` go on best from the window before; 0 in silence."""
    energy = np.convolve(candidates.astype(np.float64) ** 2, np.ones(HOP), "valid")
    likeness = np.correlate(candidates, continuation, "valid")
    norm = np.sqrt(np.maximum(energy, 0) * np.square(continuation, dtype=np.float64).sum())
    likeness = np.where(norm > 1e-9, likeness / np.maximum(norm, 1e-9), 0)
    moves = np.arange(-REACH, REACH + 1)
    return int(moves[np.argmax(likeness - _NEARNESS * np.abs(moves) / REACH)])
