"""`keysync train --report`: what became of a run's time, from its events.

Goodput is the share of the wall time, from the first start to the last event, that went into steps which
count: those that no later attempt had to do again, at the median time of a step. The rest is told by cause.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from keysync_jax.errors import UserError
from keysync_jax.train.events import FILE, read_events

CAUSES = {
    "down": "between attempts",
    "start": "starting and joining",
    "restore": "reading the state",
    "compile": "the first step",
    "data": "waiting for data",
    "save": "waiting for saves",
    "preview": "previews",
    "lost": "steps done again",
    "slow": "slow steps, and everything else",
}


@dataclass
class Report:
    """What became of a run's time.

    Attributes:
      attempts: starts of the run.
      wall: seconds from the first start to the last event.
      steps: that count.
      median: seconds of a step.
      lost: seconds by cause, of `CAUSES`.
      stops: how each attempt ended.
      slow: sentences on slow hosts.
    """

    attempts: int
    wall: float
    steps: int
    median: float
    lost: dict[str, float] = field(default_factory=dict)
    stops: list[str] = field(default_factory=list)
    slow: list[str] = field(default_factory=list)

    @property
    def goodput(self) -> float:
        """Share of the wall time, 0 to 1."""
        return min(1.0, self.steps * self.median / self.wall) if self.wall else 0.0

    def table(self) -> str:
        """Lines of text."""
        share = 100 / self.wall if self.wall else 0.0
        rows = [
            f"goodput {100 * self.goodput:.1f} %: {self.steps} steps of {self.median:.3f} s in "
            f"{_time(self.wall)}, {self.attempts} attempt{'s' if self.attempts > 1 else ''}"
        ]
        for cause, seconds in sorted(self.lost.items(), key=lambda pair: -pair[1]):
            rows.append(f"  {CAUSES[cause]:<32}{_time(seconds):>12}{seconds * share:7.1f} %")
        rows += [f"attempt {number}: {stop}" for number, stop in enumerate(self.stops, 1)]
        return "\n".join(rows + self.slow)


def report(workdir: Path) -> Report:
    """The report of a run's folder.

    Raises:
      UserError: it has no events.
    """
    events = read_events(workdir)
    if not events:
        raise UserError(f"{workdir}: has no {FILE}; a run writes it from its first start on")
    numbers = sorted({event["attempt"] for event in events})
    attempts = [[e for e in events if e["attempt"] == number] for number in numbers]
    lines = [e for e in events if e["event"] == "steps"]
    median = float(np.median([e["median"] for e in lines])) if lines else 0.0
    wall = events[-1]["time"] - events[0]["time"]
    lost = dict.fromkeys(CAUSES, 0.0)
    done = again = 0
    for index, attempt in enumerate(attempts):
        _phases(attempt, lost)
        if index:
            lost["down"] += max(0.0, attempt[0]["time"] - attempts[index - 1][-1]["time"])
        first = next((e["step"] for e in attempt if e["event"] == "ready"), done)
        again += max(0, done - first)
        done = max([first] + [e["step"] for e in attempt if e["event"] in ("first_step", "steps")])
    start = next((e["step"] for e in attempts[0] if e["event"] == "ready"), 0)
    lost["lost"] = again * median
    found = Report(len(attempts), wall, done - start, median, lost, [_end(attempt) for attempt in attempts])
    lost["slow"] = max(0.0, wall - found.steps * median - sum(lost.values()))
    found.slow = [e["sentence"] for e in events if e["event"] == "straggler"]
    return found


def _phases(attempt: Sequence[dict[str, Any]], lost: dict[str, float]) -> None:
    """Adds the parts of an attempt that were no steps."""
    times = {e["event"]: e["time"] for e in reversed(attempt)}
    for cause, begin, end in (
        ("start", "start", "joined"),
        ("restore", "joined", "ready"),
        ("compile", "ready", "first_step"),
    ):
        if begin in times and end in times:
            lost[cause] += times[end] - times[begin]
    for event in attempt:
        if event["event"] == "steps":
            for cause in ("data", "save", "preview"):
                lost[cause] += event[cause]


def _end(attempt: Sequence[dict[str, Any]]) -> str:
    stop = next((e for e in reversed(attempt) if e["event"] == "stop"), None)
    last = max((e["step"] for e in attempt if e["event"] in ("ready", "first_step", "steps")), default=0)
    if stop is None:
        return f"no word after step {last} (killed, or still running)"
    return f"{stop['reason']} at step {stop.get('step', last)}"


def _time(seconds: float) -> str:
    if seconds < 600:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 36_000 else f"{seconds / 3600:.1f} h"
