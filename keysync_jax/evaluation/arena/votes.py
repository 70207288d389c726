"""What people are asked, and what they answered: pairs in an order of each voter's own, and a file of votes.

Beside the plain pairs there are planted ones, a video against itself played backwards under the same voice,
which nobody who looks can miss, and repeats of earlier pairs with the sides exchanged.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np

from keysync_jax.errors import UserError
from keysync_jax.evaluation.ratings import Vote
from keysync_jax.files import append_line

VOTES = "votes.jsonl"
BROKEN = "broken"
"""Name of the worse side of a planted pair."""

PLANTED_EVERY, REPEATED_EVERY = 12, 15
"""Plain pairs to one planted, and to one repeated."""

MOST_BROKEN = 3
"""Lines of the file that may be cut off, by as many writers who were killed."""

CHOICES = ("left", "right", "tie")

Kind = Literal["plain", "planted", "repeat"]


@dataclass(frozen=True)
class Question:
    """Two videos of one clip, side by side.

    Attributes:
      left, right: systems; in a planted pair one of them is `BROKEN`.
    """

    clip: str
    left: str
    right: str
    kind: Kind

    @property
    def key(self) -> tuple[str, frozenset[str], str]:
        """The same whichever side is left."""
        return self.clip, frozenset((self.left, self.right)), self.kind


def questions(systems: Mapping[str, Sequence[str]], voter: str, seed: int) -> list[Question]:
    """All pairs of systems on all clips that both have, in a voter's own order.

    Args:
      systems: name -> clips.
    """
    rng = np.random.default_rng([seed, *voter.encode()])
    pairs: list[tuple[str, str, str]] = [
        (clip, first, second)
        for first, second in combinations(sorted(systems), 2)
        for clip in sorted(set(systems[first]) & set(systems[second]))
    ]
    plain = [_sided(*pairs[int(i)], "plain", rng) for i in rng.permutation(len(pairs))]
    asked: list[Question] = []
    for number, question in enumerate(plain, 1):
        asked.append(question)
        if number % PLANTED_EVERY == PLANTED_EVERY // 2:
            whole = question.left if rng.integers(0, 2) else question.right
            asked.append(_sided(question.clip, whole, BROKEN, "planted", rng))
        if number % REPEATED_EVERY == 0:
            old = plain[int(rng.integers(0, max(1, number - 3)))]
            asked.append(Question(old.clip, old.right, old.left, "repeat"))
    return asked


def _sided(clip: str, first: str, second: str, kind: Kind, rng: np.random.Generator) -> Question:
    exchanged = bool(rng.integers(0, 2))
    return Question(clip, second, first, kind) if exchanged else Question(clip, first, second, kind)


def save_vote(folder: Path, voter: str, question: Question, choice: str, further: Mapping[str, Any]) -> None:
    """Adds a vote to the file; it is on the disk when this returns."""
    told = {
        "voter": voter,
        "clip": question.clip,
        "left": question.left,
        "right": question.right,
        "kind": question.kind,
        "choice": choice,
        **further,
    }
    append_line(folder / VOTES, json.dumps(told, sort_keys=True))


def load_votes(folder: Path) -> list[dict[str, Any]]:
    """The votes in a folder, in their order; lines that were cut off are left out.

    Raises:
      UserError: more than a few lines are no votes.
    """
    try:
        text = (folder / VOTES).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    # What follows the last line break was being written when its writer was killed, as were such lines that
    # a later writer has ended: neither can be told from a damaged one but by its being cut off.
    votes, broken = [], []
    *lines, _ = text.split("\n")
    for number, line in enumerate(lines, 1):
        vote = _vote(line)
        if vote is None:
            broken.append(number)
        else:
            votes.append(vote)
    if len(broken) > MOST_BROKEN:
        raise UserError(f"{folder / VOTES}: {len(broken)} lines are no votes, the first is line {broken[0]}")
    return votes


def _vote(line: str) -> dict[str, Any] | None:
    """A line of the file; None where it is no vote."""
    try:
        vote: dict[str, Any] = json.loads(line)
        texts = [vote[key] for key in ("voter", "clip", "left", "right", "kind", "choice")]
    except (ValueError, KeyError, TypeError):
        return None
    return vote if vote["choice"] in CHOICES and all(isinstance(t, str) and t for t in texts) else None


def answered(votes: Sequence[Mapping[str, Any]], voter: str) -> set[tuple[str, frozenset[str], str]]:
    """Keys of the questions that a voter has answered."""
    own = (vote for vote in votes if vote["voter"] == voter)
    return {Question(v["clip"], v["left"], v["right"], v["kind"]).key for v in own}


def plain_votes(votes: Sequence[Mapping[str, Any]]) -> list[Vote]:
    """The votes that count: neither planted pairs nor repeats."""
    return [Vote(v["voter"], v["left"], v["right"], v["choice"]) for v in votes if v["kind"] == "plain"]
