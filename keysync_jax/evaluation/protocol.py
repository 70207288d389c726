"""What every clip is dubbed with: matched, mismatched and silent voices, current and alternative references.

The settings of arXiv 2511.08613. `reconstruction` is the matched voice alone; `cross` the mismatched one,
with a silent run for LipLeak; `leakage` all three with both references, six runs a clip.
"""

from dataclasses import dataclass
from typing import Literal

Setup = Literal["AM", "XM", "SI"]
Reference = Literal["", "CR", "AR"]

SETUPS: dict[Setup, str] = {
    "AM": "matched: the clip's own voice",
    "XM": "mismatched: another clip's voice",
    "SI": "silent: no voice; scored with the clip's own",
}
REFERENCES: dict[Reference, str] = {
    "": "the system's default reference",
    "CR": "current: frame t is its own reference",
    "AR": "alternative: another frame of the clip",
}


@dataclass(frozen=True)
class Cell:
    """One run of every clip."""

    setup: Setup
    reference: Reference = ""

    @property
    def name(self) -> str:
        return f"{self.setup}-{self.reference}" if self.reference else self.setup


PROTOCOLS: dict[str, tuple[Cell, ...]] = {
    "reconstruction": (Cell("AM"),),
    "cross": (Cell("XM"), Cell("SI")),
    "leakage": (
        Cell("AM", "CR"), Cell("XM", "CR"), Cell("SI", "CR"),
        Cell("AM", "AR"), Cell("XM", "AR"), Cell("SI", "AR"),
    ),
}  # fmt: skip


def references_of(protocol: str) -> tuple[Reference, ...]:
    """The references of a protocol, in the order of its columns."""
    return tuple(dict.fromkeys(cell.reference for cell in PROTOCOLS[protocol]))
