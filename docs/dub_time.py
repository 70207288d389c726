"""Where the time of a dub goes: a picture of the tables that `keysync dub` prints.

    python docs/dub_time.py -o docs/dub_time.png "before=BEFORE.txt" "after=AFTER.txt"

The phases follow each other from left to right. In each the dark part is the share of its time in which the
device, the decoder or the encoder was busy.
"""

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

PARTS = {"device": "#1f5fa8", "decoder": "#2e8b57", "encoder": "#c05a1a"}
NOT_SHOWN = 0.04
"""Share of a dub below which a phase has no name."""


@dataclass
class Phase:
    """A row of the table: seconds, and the busy seconds of the parts that it has."""

    name: str
    seconds: float
    busy: dict[str, float]


def read_table(text: str) -> list[Phase]:
    """The phases of a table, without the total."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("phase "))
    ends = {part: m.end() for part in PARTS if (m := re.search(rf"\b{part}\b", lines[start]))}
    phases = []
    for line in lines[start + 1 :]:
        name, seconds, *_ = line.split()
        if name == "total":
            return phases
        cells = {part: line[end - 15 : end].split("/")[0].strip() for part, end in ends.items()}
        busy = {part: float(cell) for part, cell in cells.items() if cell}
        phases.append(Phase(name, float(seconds), busy))
    raise ValueError("the table has no total")


def draw(axes: Axes, title: str, phases: list[Phase]) -> None:
    """One dub."""
    at, total = 0.0, sum(phase.seconds for phase in phases)
    for phase in phases:
        for row, (part, colour) in enumerate(PARTS.items()):
            axes.barh(row, phase.seconds, left=at, color=colour, alpha=0.12, height=0.8)
            axes.barh(row, min(phase.busy.get(part, 0), phase.seconds), left=at, color=colour, height=0.8)
        axes.axvline(at, color="black", linewidth=0.5)
        if phase.seconds > NOT_SHOWN * total:
            axes.text(at + phase.seconds / 2, -0.55, phase.name, ha="center", va="bottom", fontsize=8)
        at += phase.seconds
    axes.set_yticks(range(len(PARTS)), list(PARTS))
    axes.set_ylim(len(PARTS) - 0.5, -1)
    axes.set_title(f"{title}: {total:.0f} s", loc="left", fontsize=10)


def main() -> None:
    """Draws the dubs of the command line, one below the other."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tables", nargs="+", metavar="TITLE=FILE")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="PNG")
    arguments = parser.parse_args()
    count = len(arguments.tables)
    figure, rows = plt.subplots(count, 1, figsize=(10, 1.9 * count), sharex=True, squeeze=False)
    for axes, table in zip(rows[:, 0], arguments.tables, strict=True):
        title, _, file = table.partition("=")
        draw(axes, title, read_table(Path(file).read_text()))
    rows[-1, 0].set_xlabel("seconds")
    figure.tight_layout()
    figure.savefig(arguments.output, dpi=120)


if __name__ == "__main__":
    main()
