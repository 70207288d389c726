"""What an examination says, line by line."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "note", "missing"]
"""ok: as it should be. note: to be known before a dub. missing: without it there is no dub."""


@dataclass(frozen=True)
class Finding:
    """One line.

    Attributes:
      about: what was looked at.
      said: what was found; where something is missing, the command that gets it too.
    """

    state: State
    about: str
    said: str


def table(findings: Iterable[Finding]) -> str:
    """Lines of text."""
    lines = list(findings)
    width = max(len(f.about) for f in lines) + 2
    return "\n".join(f"{f.state:<9}{f.about:<{width}}{f.said}" for f in lines)
