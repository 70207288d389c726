"""What happened to a run, over all its attempts: `events.jsonl`, one line an event, only ever added to.

    {"attempt": 2, "time": 1790000000.0, "event": "restored", "step": 4000}

start (processes, devices, hosts), joined, ready (the state is there: `restored` with the step it is of, or
`began`), first_step, steps (what went since the line before: `steps`, their `seconds`, of these waited for
`data`, for `save`s and for `preview`s, and the `median` step), save_begin, save_end, stop (`reason`).
`train.report` reads them. Process 0 alone writes; the others' events would only say the same.
"""

import json
import logging
import time
from pathlib import Path
from typing import Any

from keysync_jax.files import append_line

log = logging.getLogger(__name__)

FILE = "events.jsonl"


class Events:
    """Adds events of one attempt. What cannot be written is told once, and the run goes on.

    Args:
      folder: where the file lies.
      active: whether this process writes.
    """

    def __init__(self, folder: Path, active: bool):
        self._path, self._active = folder / FILE, active
        self.attempt = 1 + max((e["attempt"] for e in read_events(folder)), default=0) if active else 0

    def add(self, event: str, at: float | None = None, **values: Any) -> None:
        """An event, now or at a time before (seconds since 1970)."""
        if not self._active:
            return
        line = {"attempt": self.attempt, "time": time.time() if at is None else at, "event": event, **values}
        try:
            append_line(self._path, json.dumps(line))
        except OSError as error:
            self._active = False
            log.warning("%s: cannot be written (%s); the run goes on without", self._path, error.strerror)


def read_events(folder: Path) -> list[dict[str, Any]]:
    """The events of a run so far, in the order they were written; lines that were cut off are left out."""
    path = folder / FILE
    events = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and {"attempt", "time", "event"} <= event.keys():
            events.append(event)
    return events
