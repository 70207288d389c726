"""How sure a mean over clips is, and whether two systems differ.

The unit is the clip, or the speaker where clips share one: clips of one speaker are drawn together. All
intervals of a table come from the same draws, and a difference is drawn as a difference of the same clips,
never read off two intervals. Everything is a function of its arguments and a seed.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import product

import numpy as np

DRAWS = 10_000
LEVEL = 0.95
POWER = 0.8

_EXACT = 13
"""Units up to which a permutation test goes through all signs."""

_BLOCK = 1_000
"""Draws of signs that are held at once."""


@dataclass(frozen=True)
class Estimate:
    """A number and its interval.

    Attributes:
      value: of all clips.
      low, high: percentiles of the draws, `LEVEL` of them between; NaN where there is one speaker alone.
      clips: how many it is of.
    """

    value: float
    low: float
    high: float
    clips: int


class Resampling:
    """Draws of clips with replacement: percentile bootstrap.

    Attributes:
      units: number of the speaker (or clip) of each clip, `[clips]`.
      weights: how often each clip is in each draw, `[draws, clips]`.
    """

    def __init__(self, speakers: Sequence[str], draws: int = DRAWS, seed: int = 0) -> None:
        """Draws as many speakers as there are, `draws` times.

        Args:
          speakers: one for each clip; clips that share one are drawn together.

        Raises:
          ValueError: there is no clip.
        """
        if not speakers:
            raise ValueError("there is no clip to draw")
        names, units = np.unique(np.array(speakers, dtype=str), return_inverse=True)
        count = len(names)
        drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=draws)
        self.units = units.reshape(-1)
        self.weights = drawn[:, self.units].astype(np.float64)
        self.seed = seed

    def of(self, clips: Sequence[int]) -> "Resampling":
        """The same draws of some of the clips, by their numbers; draws without any of them are left out."""
        part = copy(self)
        weights = self.weights[:, list(clips)]
        part.weights = weights[weights.sum(axis=1) > 0]
        part.units = np.unique(self.units[list(clips)], return_inverse=True)[1].reshape(-1)
        return part

    def means(self, values: np.ndarray) -> np.ndarray:
        """The mean of each draw: values `[clips]` or `[clips, k]` to `[draws]` or `[draws, k]`."""
        totals = self.weights @ np.asarray(values, np.float64)
        count = self.weights.sum(axis=1)
        return totals / (count if totals.ndim == 1 else count[:, None])

    def mean(self, values: np.ndarray) -> Estimate:
        """The mean of finite values `[clips]` with its interval."""
        values = np.asarray(values, np.float64)
        return self.estimate(float(values.mean()), self.means(values))

    def estimate(self, value: float, draws: np.ndarray) -> Estimate:
        """A number of all clips with the interval of its draws; a single speaker tells nothing of others."""
        clips = len(self.units)
        if self.units.max() == 0:
            return Estimate(value, float("nan"), float("nan"), clips)
        return estimate(value, draws, clips)

    def by_unit(self, values: np.ndarray) -> np.ndarray:
        """Sums of values `[clips, ...]` over the clips of each unit: `[units, ...]`."""
        values = np.asarray(values, np.float64)
        sums = np.zeros((self.units.max() + 1, *values.shape[1:]))
        np.add.at(sums, self.units, values)
        return sums


def estimate(value: float, draws: np.ndarray, clips: int) -> Estimate:
    """A number with the percentile interval of its draws `[draws]`."""
    low, high = interval(draws)
    return Estimate(value, low, high, clips)


def interval(draws: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """The percentiles of draws `[draws]` with `level` of them between."""
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


@dataclass(frozen=True)
class Comparison:
    """A metric of two systems on the same clips, the first less the second.

    Attributes:
      difference: of the means, with its interval.
      permutation: p of a two-sided test that exchanges the systems within clips.
      wilcoxon: p of the signed-rank test, a second opinion; None where every difference is 0.
      visible: the smallest difference that so many clips show in `POWER` of cases, at p < 1 - `LEVEL`.
    """

    difference: Estimate
    permutation: float
    wilcoxon: float | None
    visible: float


def compare(first: np.ndarray, second: np.ndarray, resampling: Resampling) -> Comparison:
    """Compares two systems by a metric of clips, `[clips]` each; the clips are those of the resampling."""
    differences = np.asarray(first, np.float64) - np.asarray(second, np.float64)
    draws = resampling.means(differences)
    sums = resampling.by_unit(differences)
    # Normal quantiles of the level (two-sided) and of the power.
    reach = _normal_quantile((1 + LEVEL) / 2) + _normal_quantile(POWER)
    return Comparison(
        resampling.estimate(float(differences.mean()), draws),
        permutation_test(sums, resampling.seed),
        wilcoxon(sums),
        float(reach * draws.std()),
    )


def _normal_quantile(share: float) -> float:
    from statistics import NormalDist

    return NormalDist().inv_cdf(share)


def permutation_test(differences: np.ndarray, seed: int = 0, draws: int = DRAWS) -> float:
    """p of a two-sided test that paired differences `[units]` have no sign of their own.

    All signs up to 13 units; beyond, drawn ones, the observed ones counted among them.
    """
    differences = np.asarray(differences, np.float64)
    observed = abs(differences.sum())
    # Sums of the same numbers in another order differ by rounding.
    enough = observed - 1e-12 * np.abs(differences).sum()
    count, total = _signed(differences, enough, seed, draws)
    return count / total


def _signed(differences: np.ndarray, enough: float, seed: int, draws: int) -> tuple[int, int]:
    """Of how many choices of signs the absolute sum reaches `enough`, and how many there are."""
    units = len(differences)
    if units <= _EXACT:
        signs = np.array(list(product((-1.0, 1.0), repeat=units)))
        return int((np.abs(signs @ differences) >= enough).sum()), len(signs)
    count = 1
    for block in signs_of(units, seed, draws):
        count += int((np.abs(block @ differences) >= enough).sum())
    return count, draws + 1


def signs_of(units: int, seed: int, draws: int = DRAWS) -> "list[np.ndarray]":
    """Random signs, -1 or 1, in blocks `[n, units]`."""
    rng = np.random.default_rng([seed, 1])
    sizes = [min(_BLOCK, draws - start) for start in range(0, draws, _BLOCK)]
    return [rng.integers(0, 2, (size, units)) * 2.0 - 1 for size in sizes]


def wilcoxon(differences: np.ndarray) -> float | None:
    """p of Wilcoxon's signed-rank test, two-sided, of paired differences `[units]`; None where all are 0."""
    from scipy.stats import wilcoxon as signed_rank

    moved = np.asarray(differences, np.float64)
    moved = moved[moved != 0]
    return float(signed_rank(moved).pvalue) if len(moved) else None


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down adjustment: p-values by name to adjusted ones, for all tests of one table."""
    adjusted, floor = {}, 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        floor = max(floor, min(1.0, (len(p_values) - rank) * p))
        adjusted[name] = floor
    return {name: adjusted[name] for name in p_values}


@dataclass(frozen=True)
class Shift:
    """LSD: how far the sync of the set moves between matched and mismatched voices.

    Attributes:
      value: mean over the measures of |mean of AM - mean of XM|, with the interval of resampled sets. An
        absolute difference is above 0 by chance alone, and so is its interval: read `chance` and `p`.
      signed: AM - XM of each measure.
      chance: mean of the value where the two setups are exchanged at random within clips.
      p: share of such exchanges that reach the value.
    """

    value: Estimate
    signed: tuple[float, ...]
    chance: float
    p: float


def shift(matched: np.ndarray, mismatched: np.ndarray, resampling: Resampling) -> Shift:
    """LSD of sync measures of the same clips in two setups, `[clips, measures]` each.

    The difference of set means, never the mean of clips' differences (of absolute value): see `lsd`.
    """
    matched, mismatched = np.asarray(matched, np.float64), np.asarray(mismatched, np.float64)
    first, second = matched.mean(axis=0), mismatched.mean(axis=0)
    value = float(lsd(first, second))
    draws = lsd(resampling.means(matched), resampling.means(mismatched))
    sums = resampling.by_unit(matched - mismatched)
    exchanged = [np.abs(block @ sums).mean(axis=1) for block in signs_of(len(sums), resampling.seed)]
    null = np.concatenate(exchanged) / len(matched)
    return Shift(
        resampling.estimate(value, draws),
        tuple(float(x) for x in first - second),
        float(null.mean()),
        float((1 + (null >= value - 1e-12).sum()) / (1 + len(null))),
    )


def lsd(matched: np.ndarray, mismatched: np.ndarray) -> np.ndarray:
    """Mean of |AM - XM| over the measures, of set means `[..., measures]` (arXiv 2511.08613)."""
    return np.asarray(np.abs(np.asarray(matched) - np.asarray(mismatched)).mean(axis=-1))


@dataclass(frozen=True)
class Distance:
    """A distance of two sets of clips (FID, FVD, CMMD), whose value depends on their size.

    Attributes:
      value: of all clips.
      halves: mean of random halves, drawn without replacement, and the range of `LEVEL` of them; each is of
        `clips // 2` clips.
      bias: the same distance between two halves of the real set, which have none: what so few clips give.
      clips: how many the value is of.
    """

    value: float
    halves: Estimate
    bias: float
    clips: int


def distance(
    between: Callable[[np.ndarray, np.ndarray], float],
    real: Callable[[np.ndarray, np.ndarray], float],
    clips: int,
    seed: int = 0,
    rounds: int = 20,
) -> Distance:
    """Measures a distance of sets on all clips and on halves of them.

    Drawing with replacement would add to it, as near copies do; so clips are drawn without.

    Args:
      between: (numbers of the real clips, of the system's) -> distance.
      real: the same with real clips on both sides.
      clips: 4 or more.

    Raises:
      ValueError: there are fewer.
    """
    if clips < 4:
        raise ValueError(f"a distance of sets is of 4 clips or more, not {clips}")
    rng, every, half = np.random.default_rng([seed, 2]), np.arange(clips), clips // 2
    orders = [rng.permutation(clips) for _ in range(rounds)]
    values = np.array([between(order[:half], order[:half]) for order in orders])
    bias = float(np.mean([real(order[:half], order[half : 2 * half]) for order in orders]))
    return Distance(float(between(every, every)), estimate(float(values.mean()), values, half), bias, clips)
