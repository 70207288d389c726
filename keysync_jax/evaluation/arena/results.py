"""What the votes of an arena say, and how far they are to be trusted."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from keysync_jax.errors import UserError
from keysync_jax.evaluation.arena.votes import BROKEN, Question, plain_votes
from keysync_jax.evaluation.ratings import RIDGE, Standing, binomial_test, standing


def results(votes: Sequence[Mapping[str, Any]], rounds: int = 1_000) -> str:
    """Ratings, win rates and checks as text.

    Raises:
      UserError: no vote counts yet.
    """
    counted = plain_votes(votes)
    if not counted:
        raise UserError("there are no votes yet: keysync arena DIR collects them")
    found = standing(counted, rounds)
    voters = len({vote.voter for vote in counted})
    head = f"{found.votes} votes of {voters} voter{'s' * (voters > 1)}; {rounds} draws of {found.unit}s"
    return "\n\n".join([head, _ratings(found), _rates(found), _checks(votes)])


def _ratings(found: Standing) -> str:
    width = max(len(name) for name in found.systems)
    lines = [f"{'system':<{width}}  rank  Bradley-Terry             Elo (in the votes' order)"]
    for name in found.systems:
        bt, elo = found.bradley_terry[name], found.elo[name]
        both = [f"{r.value:6.0f} [{r.low:.0f}, {r.high:.0f}]" for r in (bt, elo)]
        lines.append(f"{name:<{width}}  {bt.rank:>4}  {both[0]:<24}  {both[1]}")
    lines.append(
        f"(Bradley-Terry with a ridge of {RIDGE:g}; rank: 1 + systems whose interval is wholly above)"
    )
    return "\n".join(lines)


def _rates(found: Standing) -> str:
    """The matrix of win rates: rows against columns."""
    width = max(len(name) for name in found.systems)
    cell = max(width, 5)
    lines = [
        "wins of the row, ties half",
        f"{'':<{width}}" + "".join(f"  {n:>{cell}}" for n in found.systems),
    ]
    for name, row in zip(found.systems, found.rates, strict=True):
        cells = ["-" if np.isnan(rate) else f"{100 * rate:.0f} %" for rate in row]
        lines.append(f"{name:<{width}}" + "".join(f"  {text:>{cell}}" for text in cells))
    return "\n".join(lines)


def _checks(votes: Sequence[Mapping[str, Any]]) -> str:
    """Sides, planted pairs and repeats."""
    sides = [vote["choice"] for vote in votes if vote["kind"] == "plain" and vote["choice"] != "tie"]
    left = sides.count("left")
    lines = [f"left chosen {left} of {len(sides)} times (p = {binomial_test(left, len(sides)):.3f})"]
    for voter in sorted({vote["voter"] for vote in votes}):
        own = [vote for vote in votes if vote["voter"] == voter]
        planted = [vote for vote in own if vote["kind"] == "planted"]
        found = sum(
            vote["choice"] in ("left", "right") and vote[vote["choice"]] != BROKEN for vote in planted
        )
        again, same = _repeated(own)
        lines.append(
            f"{voter}: {len(own)} votes, {found} of {len(planted)} planted pairs found, "
            f"{same} of {again} repeats answered alike"
        )
    return "\n".join(lines)


def _repeated(votes: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """How many pairs a voter saw again, and to how many of them the answer was the same system."""
    first = {
        Question(v["clip"], v["left"], v["right"], "plain").key: _winner(v)
        for v in votes
        if v["kind"] == "plain"
    }
    again = [
        (first[key], _winner(v))
        for v in votes
        if v["kind"] == "repeat" and (key := Question(v["clip"], v["left"], v["right"], "plain").key) in first
    ]
    return len(again), sum(a == b for a, b in again)


def _winner(vote: Mapping[str, Any]) -> str | None:
    return None if vote["choice"] == "tie" else str(vote[vote["choice"]])
