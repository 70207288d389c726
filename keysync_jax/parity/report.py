"""What a comparison found: a table as it goes, the first place where the two part, and files to keep."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from keysync_jax.files import write_json, write_text
from keysync_jax.parity.bounds import MULTIPLE, kind_of
from keysync_jax.parity.compare import Comparison, first_parting
from keysync_jax.parity.picture import write_picture

NAMES = {
    "cond": "projected conditions",
    "layer": "layers",
    "block": "blocks of the network",
    "network": "network",
    "denoised": "denoised",
    "step": "Euler steps",
    "sample": "samplers",
    "loss": "training loss",
    "grad": "gradients",
    "mix": "gradients of mixing factors",
    "vae": "VAE",
    "clip": "whole pipeline",
}
"""Kind of entry -> what a table calls it."""

Write = Callable[[str], object]


def report(comparisons: Iterator[Comparison], write: Write = print) -> list[Comparison]:
    """Writes a row for each entry as soon as it is there, then the verdict; returns them all."""
    write(f"{'entry':<83} {'error':>10} {'floor':>10} {'bound':>10}  verdict")
    done = []
    for c in comparisons:
        verdict = ("ok" if c.bounded else "no bound") if c.ok else "EXCEEDED"
        floor = f"{c.floor:10.2e}" if c.floor is not None else " " * 10
        write(f"{c.entry:<83} {c.error:10.2e} {floor} {c.bound:10.1e}  {verdict}")
        done.append(c)
    write(f"{sum(c.ok for c in done)} of {len(done)} entries within their bounds")
    if (parting := first_parting(done)) is not None:
        write(f"first place where the two part: {parting.entry}")
    return done


def held(comparisons: Sequence[Comparison]) -> bool:
    """Whether there is an entry, and every one is within its bound."""
    return bool(comparisons) and all(c.ok for c in comparisons)


def write_report(folder: Path, comparisons: Sequence[Comparison], about: Mapping[str, Any]) -> None:
    """Writes `report.md`, `errors.png` and `report.json` into a folder that is there.

    Args:
      about: what was compared, in JSON's types; `title` heads the table.
    """
    write_text(folder / "report.md", markdown(comparisons, about))
    write_picture(folder / "errors.png", comparisons, str(about["title"]))
    entries = [_values(c) for c in comparisons]
    write_json(folder / "report.json", {"about": dict(about), "multiple": MULTIPLE, "entries": entries})


def markdown(comparisons: Sequence[Comparison], about: Mapping[str, Any]) -> str:
    """A table with a row for each kind of entry, the largest of each distance, for a document to hold."""
    exact = any(c.floor is not None for c in comparisons)
    heads = ["", "entries", "ours - release"]
    heads += ["release - fp64", "ours - fp64", "largest share of the bound"] if exact else ["bound"]
    lines = [f"{about['title']}:", "", _row(heads), _row(["---"] * len(heads))]
    for kind, name in NAMES.items():
        if entries := [c for c in comparisons if kind_of(c.entry) == kind]:
            lines.append(_row([name, *_cells(entries, exact)]))
    parting = first_parting(comparisons)
    within = f"{sum(c.ok for c in comparisons)} of {len(comparisons)} entries are within their bounds"
    tail = "." if parting is None else f"; the first beyond it is `{parting.entry}`."
    lines += ["", within + tail, *(f"- {note}" for note in about.get("notes", []))]
    return "\n".join(lines) + "\n"


def _cells(entries: Sequence[Comparison], exact: bool) -> list[str]:
    cells = [str(len(entries)), f"{max(c.difference for c in entries):.1e}"]
    if not exact:
        return [*cells, f"{max(c.bound for c in entries):.1e}" if entries[0].bounded else "none"]
    share = max(c.error / c.bound for c in entries)
    bounded = f"{share:.0%}" if entries[0].bounded else "no bound"
    return [
        *cells,
        f"{max(c.floor or 0 for c in entries):.1e}",
        f"{max(c.error for c in entries):.1e}",
        bounded,
    ]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _values(c: Comparison) -> dict[str, Any]:
    bound = c.bound if math.isfinite(c.bound) else None
    return {"entry": c.entry, "error": c.error, "difference": c.difference, "floor": c.floor, "bound": bound}
