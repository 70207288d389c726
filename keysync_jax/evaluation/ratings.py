"""Ratings of systems from votes on pairs: Elo, Bradley-Terry, win rates, and whether to trust the votes.

Both ratings are on Elo's scale: 400 points are odds of 10 to 1. Elo is what papers print; it depends on the
order of the votes. Bradley-Terry does not.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from keysync_jax.evaluation.statistics import interval

K, BASE, SCALE, START = 4.0, 10.0, 400.0, 1000.0
"""Of Elo, as FastChat has them."""

RIDGE = 0.01
"""Weight of the squared ratings (in nats) beside the votes' log likelihood.

Without it a system that wins everything has no finite rating. It moves a rating of 100 votes by less than a
point.
"""

ROUNDS = 1_000


@dataclass(frozen=True)
class Vote:
    """One comparison.

    Attributes:
      voter: who.
      left, right: systems, as they stood on the page.
      choice: what was better.
    """

    voter: str
    left: str
    right: str
    choice: str

    @property
    def score(self) -> float:
        """Of the left system: 1 won, 0.5 a tie, 0 lost."""
        return {"left": 1.0, "tie": 0.5, "right": 0.0}[self.choice]


@dataclass(frozen=True)
class Rating:
    """A system's rating with the interval of resampled votes; `rank` 1 is the best.

    The rank is 1 + the number of systems whose interval lies wholly above.
    """

    value: float
    low: float
    high: float
    rank: int


def elo(votes: Sequence[Vote], systems: Sequence[str]) -> np.ndarray:
    """Elo ratings `[systems]` after the votes in their order."""
    place = {name: i for i, name in enumerate(systems)}
    ratings = np.full(len(systems), START)
    for vote in votes:
        a, b = place[vote.left], place[vote.right]
        expected = 1 / (1 + BASE ** ((ratings[b] - ratings[a]) / SCALE))
        step = K * (vote.score - expected)
        ratings[a] += step
        ratings[b] -= step
    return ratings


def wins_of(votes: Sequence[Vote], systems: Sequence[str]) -> np.ndarray:
    """How often each system (row) won against each other one (column), ties half: `[systems, systems]`."""
    place = {name: i for i, name in enumerate(systems)}
    wins = np.zeros((len(systems), len(systems)))
    for vote in votes:
        wins[place[vote.left], place[vote.right]] += vote.score
        wins[place[vote.right], place[vote.left]] += 1 - vote.score
    return wins


def bradley_terry(wins: np.ndarray, ridge: float = RIDGE) -> np.ndarray:
    """Maximum-likelihood ratings `[systems]` of a matrix of wins, with a mean of 1000 (Newton's method).

    log likelihood = sum over i, j of wins[i, j] log sigmoid(r_i - r_j) - ridge / 2 sum of r_i^2.
    """
    count = len(wins)
    ratings, played = np.zeros(count), wins + wins.T
    for _ in range(100):
        chances = 1 / (1 + np.exp(ratings[None] - ratings[:, None]))
        gradient = wins.sum(axis=1) - (played * chances).sum(axis=1) - ridge * ratings
        information = played * chances * (1 - chances)
        curvature = np.diag(information.sum(axis=1) + ridge) - information
        step = np.linalg.solve(curvature, gradient)
        # A step of more than e^2 in odds is cut: far from the solution the curvature misleads.
        ratings = ratings + step * min(1.0, 2.0 / max(np.abs(step).max(), 1e-12))
        if np.abs(step).max() < 1e-10:
            break
    return START + (ratings - ratings.mean()) * SCALE / math.log(BASE)


def win_rates(wins: np.ndarray) -> np.ndarray:
    """Share of the comparisons that the row's system won, ties half; NaN where two never met."""
    played = wins + wins.T
    with np.errstate(invalid="ignore"):
        return np.where(played > 0, wins / np.where(played > 0, played, 1), np.nan)


@dataclass(frozen=True)
class Standing:
    """What a set of votes says.

    Attributes:
      systems: names, best first by Bradley-Terry.
      bradley_terry, elo: rating by system.
      wins, rates: of rows against columns, in the order of `systems`.
      unit: what was resampled, "voter" or "vote".
      votes: how many were counted.
    """

    systems: tuple[str, ...]
    bradley_terry: Mapping[str, Rating]
    elo: Mapping[str, Rating]
    wins: np.ndarray
    rates: np.ndarray
    unit: str
    votes: int


def standing(votes: Sequence[Vote], rounds: int = ROUNDS, seed: int = 0) -> Standing:
    """Rates the systems of some votes.

    Voters are resampled, whole, because a voter's votes are alike; with fewer than three of them single
    votes are, and `unit` says so.

    Raises:
      ValueError: there is no vote.
    """
    if not votes:
        raise ValueError("there is no vote")
    names = sorted({name for vote in votes for name in (vote.left, vote.right)})
    value = bradley_terry(wins_of(votes, names))
    systems = [names[i] for i in np.argsort(-value, kind="stable")]
    voters = sorted({vote.voter for vote in votes})
    unit = "voter" if len(voters) >= 3 else "vote"
    bt_draws, elo_draws = _resampled(votes, systems, voters, unit, rounds, seed)
    wins = wins_of(votes, systems)
    return Standing(
        tuple(systems),
        _rated(systems, bradley_terry(wins), bt_draws),
        _rated(systems, elo(votes, systems), elo_draws),
        wins,
        win_rates(wins),
        unit,
        len(votes),
    )


def _resampled(
    votes: Sequence[Vote], systems: Sequence[str], voters: Sequence[str], unit: str, rounds: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Bradley-Terry and Elo ratings of resampled votes, `[rounds, systems]` each."""
    rng = np.random.default_rng(seed)
    groups = [[v for v in votes if v.voter == name] for name in voters]
    groups = groups if unit == "voter" else [[vote] for vote in votes]
    tables = np.stack([wins_of(group, systems) for group in groups])
    found, sequential = [], []
    for _ in range(rounds):
        drawn = rng.integers(0, len(groups), len(groups))
        found.append(bradley_terry(tables[drawn].sum(axis=0)))
        sequential.append(elo([vote for i in drawn for vote in groups[i]], systems))
    return np.array(found), np.array(sequential)


def _rated(systems: Sequence[str], values: np.ndarray, draws: np.ndarray) -> dict[str, Rating]:
    intervals = [interval(draws[:, i]) for i in range(len(systems))]
    ranks = [1 + sum(other[0] > own[1] for other in intervals) for own in intervals]
    rows = zip(systems, values, intervals, ranks, strict=True)
    return {name: Rating(float(v), low, high, rank) for name, v, (low, high), rank in rows}


def binomial_test(successes: int, trials: int) -> float:
    """Two-sided p that a fair coin gives so many heads or something as unlikely; 1 without trials."""
    if trials == 0:
        return 1.0
    chances = np.array([math.comb(trials, k) / 2**trials for k in range(trials + 1)])
    return float(min(1.0, chances[chances <= chances[successes] * (1 + 1e-9)].sum()))
