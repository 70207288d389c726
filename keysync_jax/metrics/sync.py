"""Agreement of a mouth with the voice: correlations over time of what the mouth does and what it should do.

Numbers without a unit, from -1 to 1. Higher is better where one series is the truth of the voice; near 0 is
better where it is the source's own mouth (see `leakage`) or another voice's.
"""

from collections.abc import Sequence

import numpy as np

Pair = tuple[np.ndarray, np.ndarray]
"""Two series over the same frames, `[T]` each."""

CONSTANT = 1e-6
"""Standard deviation, over the largest absolute value, below which a series counts as constant."""


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's correlation of two series `[T]`; no unit, -1 to 1, higher is better sync.

    Where a series is constant the correlation is undefined and 0 is returned: a mouth that does not move
    follows nothing.

    Raises:
      ValueError: the series differ in length, have fewer than two frames, or are not finite.
    """
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if x.shape != y.shape or x.ndim != 1 or len(x) < 2:
        raise ValueError(f"expected two series of two or more frames, got {x.shape} and {y.shape}")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("the series are not finite")
    if _constant(x) or _constant(y):
        return 0.0
    x, y = x - x.mean(), y - y.mean()
    return float(np.clip((x @ y) / np.sqrt((x @ x) * (y @ y)), -1, 1))


def mean_correlation(pairs: Sequence[Pair]) -> float:
    """Plain mean over clips of each clip's `correlation`; no unit, -1 to 1, higher is better sync.

    Offsets and gains that differ between people have no effect.

    Raises:
      ValueError: there is no clip; see also `correlation`.
    """
    if not pairs:
        raise ValueError("no clip to average over")
    return float(np.mean([correlation(a, b) for a, b in pairs]))


def pooled_correlation(pairs: Sequence[Pair]) -> float:
    """`correlation` over the frames of all clips as one series; no unit, -1 to 1, higher is better sync.

    Unlike the mean over clips it asks for the right size of the movement in each clip.

    Raises:
      ValueError: there is no clip; see also `correlation`.
    """
    if not pairs:
        raise ValueError("no clip to pool")
    return correlation(np.concatenate([a for a, _ in pairs]), np.concatenate([b for _, b in pairs]))


def lagged_correlation(a: np.ndarray, b: np.ndarray, lag: int) -> float:
    """`correlation` of a with b earlier: of `a[t + lag]` with `b[t]`, over the frames that both have."""
    first, last = max(0, -lag), len(b) - max(0, lag)
    return correlation(np.asarray(a)[first + lag : last + lag], np.asarray(b)[first:last])


def best_lag(a: np.ndarray, b: np.ndarray, reach: int = 5) -> int:
    """The lag of `a` behind `b` with the highest correlation; frames, -reach to reach, 0 is best.

    Positive: a is late. Of equally good lags it is the shortest, so it is 0 for a mouth that does not move.
    """
    lags = sorted(range(-reach, reach + 1), key=abs)
    return max(lags, key=lambda lag: lagged_correlation(a, b, lag))


def mean_lag(pairs: Sequence[Pair], reach: int = 5) -> int:
    """The lag, common to all clips, with the highest mean correlation; frames, -reach to reach, 0 is best.

    Raises:
      ValueError: there is no clip; see also `correlation`.
    """
    if not pairs:
        raise ValueError("no clip to average over")
    lags = sorted(range(-reach, reach + 1), key=abs)
    return max(lags, key=lambda lag: np.mean([lagged_correlation(a, b, lag) for a, b in pairs]))


def _constant(x: np.ndarray) -> bool:
    return bool(x.std() <= CONSTANT * np.abs(x).max())
