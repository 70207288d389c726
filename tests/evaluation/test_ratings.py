"""Ratings of systems whose odds are known."""

import numpy as np
import pytest

from keysync_jax.evaluation.ratings import (
    Vote,
    binomial_test,
    bradley_terry,
    elo,
    standing,
    win_rates,
    wins_of,
)


def odds(ratings: np.ndarray, games: float) -> np.ndarray:
    """Wins of every pair as their ratings say."""
    chance = 1 / (1 + 10 ** ((ratings[None] - ratings[:, None]) / 400))
    return games * chance * (1 - np.eye(len(ratings)))


def test_bradley_terry_returns_the_odds() -> None:
    true = np.array([1120.0, 1000, 880])
    np.testing.assert_allclose(bradley_terry(odds(true, 1e6)), true, atol=0.01)
    # The ridge at the size of a study, and where someone wins everything.
    np.testing.assert_allclose(bradley_terry(odds(true, 100)), true, atol=1)
    swept = bradley_terry(np.array([[0, 10.0], [0, 0]]))
    assert np.isfinite(swept).all()
    assert swept[0] > 1200 > 800 > swept[1]


def test_elo_by_hand() -> None:
    votes = [Vote("v", "a", "b", "left"), Vote("v", "b", "a", "tie")]
    # 1000 to 1000: K / 2; then a tie of 998 and 1002 moves them a little together.
    moved = 4 * (0.5 - 1 / (1 + 10 ** (4 / 400)))
    np.testing.assert_allclose(elo(votes, ["a", "b"]), [1002 - moved, 998 + moved])


def test_ties_are_half_a_win_and_strangers_have_no_rate() -> None:
    votes = [Vote("v", "a", "b", "tie"), Vote("v", "a", "b", "left"), Vote("w", "b", "a", "left")]
    wins = wins_of(votes, ["a", "b", "c"])
    np.testing.assert_array_equal(wins, [[0, 1.5, 0], [1.5, 0, 0], [0, 0, 0]])
    rates = win_rates(wins)
    assert rates[0, 1] == rates[1, 0] == 0.5
    assert np.isnan(rates[2, 0])


def test_a_standing_ranks_by_intervals_and_draws_voters() -> None:
    rng, votes = np.random.default_rng(0), []
    strength = {"good": 2.0, "fair": 0.0, "poor": -2.0}
    for voter in range(8):
        for _ in range(40):
            left, right = rng.choice(list(strength), 2, replace=False)
            wins = rng.random() < 1 / (1 + np.exp(strength[right] - strength[left]))
            votes.append(Vote(f"v{voter}", left, right, "left" if wins else "right"))
    found = standing(votes, rounds=100)
    assert (found.systems, found.unit, found.votes) == (("good", "fair", "poor"), "voter", 320)
    assert [found.bradley_terry[name].rank for name in found.systems] == [1, 2, 3]
    good = found.bradley_terry["good"]
    assert good.low < 1000 + 2 * 400 / np.log(10) < good.high
    assert good.low < good.value < good.high
    assert [round(r.value) for r in standing(votes, rounds=100).elo.values()] == [
        round(r.value) for r in found.elo.values()
    ]
    few = [vote for vote in votes if vote.voter == "v0"]
    assert standing(few, rounds=20).unit == "vote"
    with pytest.raises(ValueError, match="no vote"):
        standing([])


def test_votes_for_a_side_are_tested() -> None:
    assert binomial_test(5, 10) == 1
    assert binomial_test(0, 10) == pytest.approx(2 / 1024)
    assert binomial_test(0, 0) == 1
