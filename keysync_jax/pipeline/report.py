"""What a dub was made from and what came of it, also as JSON."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from keysync_jax import __version__
from keysync_jax.files import sha256_of, write_json
from keysync_jax.pipeline.phases import Phases

FORMAT = "keysync-dub-1"

WITHOUT_FACE = "no face was found"


@dataclass(frozen=True)
class DubReport:
    """What `dub` did; `phases.table()` has time and memory.

    Attributes:
      undubbed: stretches (first, frames) of the dub that passed through, for they have no face.
      border: how much more there is to see along the border of what was pasted than there in the source:
        gradient energy over gradient energy (`composite.seam_energy`) of some frames; None where nothing was.
      made_from: everything that the frames depend on: SHA-256 of the inputs and of the model, the settings
        that count, the code, the libraries and the device.
      settings: all of them, in JSON's types.
      warnings: what was logged as such, each once.
    """

    output: Path
    frames: int
    frames_without_face: int
    phases: Phases = field(compare=False)
    undubbed: tuple[tuple[int, int], ...] = ()
    border: float | None = field(default=None, compare=False)
    made_from: Mapping[str, object] = field(default_factory=dict)
    settings: Mapping[str, object] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def save(self, path: Path, **further: Any) -> None:
        """Writes the report as JSON.

        Args:
          further: more of JSON's types, by name.
        """
        timing = [asdict(phase) for phase in self.phases.done]
        write_json(
            path,
            {
                "format": FORMAT,
                "version": __version__,
                "output": {"file": self.output.name, "sha256": sha256_of(self.output)},
                "frames": self.frames,
                "undubbed": [
                    {"first": first, "frames": count, "why": WITHOUT_FACE} for first, count in self.undubbed
                ],
                "border": self.border,
                "made_from": dict(self.made_from),
                "settings": dict(self.settings),
                "seconds": sum(phase["seconds"] for phase in timing),
                "phases": timing,
                "warnings": list(self.warnings),
                **further,
            },
        )


@contextmanager
def warned() -> Iterator[list[str]]:
    """A list of what this package logs as warnings while the block runs; each still goes its way."""
    log, kept = logging.getLogger("keysync_jax"), _Kept(logging.WARNING)
    log.addHandler(kept)
    try:
        yield kept.messages
    finally:
        log.removeHandler(kept)


class _Kept(logging.Handler):
    """Keeps messages; prints them where nobody else does, as logging does by itself without a handler."""

    def __init__(self, level: int):
        super().__init__(level)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if (message := record.getMessage()) not in self.messages:
            self.messages.append(message)
        others = (*logging.getLogger("keysync_jax").handlers, *logging.root.handlers)
        if all(isinstance(handler, _Kept) for handler in others) and logging.lastResort is not None:
            logging.lastResort.handle(record)
