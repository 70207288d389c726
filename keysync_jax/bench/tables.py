"""The Markdown of a report: the tables that docs/performance.md and docs/parity.md have."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

GIB = 2**30


def markdown(content: Mapping[str, Any]) -> str:
    """A document of a report (`report.json`): a section for what shares a table, with its commands."""
    versions = ", ".join(f"{name} {number}" for name, number in content["versions"].items())
    lines = [
        f"# {content['devices']} x {content['device']}, size {content['size']}",
        "",
        f"{versions}. Every command is run in this folder.",
    ]
    sections: dict[str, list[Mapping[str, Any]]] = {}
    for part in content["parts"]:
        sections.setdefault(part["section"], []).append(part)
    for name, parts in sections.items():
        lines += ["", f"## {name}", "", "```sh", *(part["command"] for part in parts), "```"]
        lines += _section(parts)
    return "\n".join(lines) + "\n"


def _section(parts: Sequence[Mapping[str, Any]]) -> list[str]:
    """The table of all parts that were measured, their times, and why others were not."""
    done = [part for part in parts if part["figures"] is not None]
    lines = []
    if done:
        figures = [part["figures"] for part in done]
        together = figures[0] if len(figures) == 1 else {"rows": [row for f in figures for row in f["rows"]]}
        lines = ["", *_SECTIONS[done[0]["kind"]](together), ""]
        lines.append(f"The commands took {sum(part['seconds'] for part in done):.0f} s.")
    for part in parts:
        if part["figures"] is None:
            lines += ["", f"Not measured: {part['name']}: {part['why']}."]
    return lines


def _networks(figures: Mapping[str, Any]) -> list[str]:
    heads = ["", "compile s", "median s", "spread", "frames/s", "TFLOP", "TFLOP/s", "of peak", "device GiB"]
    rows = []
    for row in figures["rows"]:
        median = row["timing"]["median"]
        rate = row["flop"] / median
        rows.append(
            [
                row["name"],
                f"{row['compile_seconds']:.1f}",
                f"{median:.4f}",
                _spread(row, 4),
                f"{row['frames'] / median:.1f}",
                f"{row['flop'] / 1e12:.3g}",
                f"{rate / 1e12:.3g}",
                _share(rate, row["peak"]),
                f"{row['device_bytes'] / GIB:.2f}",
            ]
        )
    return [*_table(heads, rows), "", *_notes(figures)]


def _train(figures: Mapping[str, Any]) -> list[str]:
    heads = [
        "",
        "compile s",
        "s a step",
        "clips/s",
        "TFLOP/s",
        "of peak",
        "arguments GiB",
        "temporaries",
        "peak",
    ]
    rows = []
    for row in figures["rows"]:
        if row["timing"] is None:
            rows.append([row["name"], row["fault"], *[""] * (len(heads) - 2)])
            continue
        median = row["timing"]["median"]
        rate = row["flop"] / median
        rows.append(
            [
                row["name"],
                f"{row['compile_seconds']:.0f}",
                f"{median:.3f}",
                f"{row['clips'] / median:.2f}",
                f"{rate / 1e12:.3g}",
                _share(rate, row["peak"]),
                f"{row['arguments'] / GIB:.2f}",
                f"{row['temporaries'] / GIB:.2f}",
                "-" if row["device_bytes"] is None else f"{row['device_bytes'] / GIB:.2f}",
            ]
        )
    return [*_table(heads, rows), "", f"As it is: {figures['rows'][0]['note']}."]


def _dub(figures: Mapping[str, Any]) -> list[str]:
    parts = ("device", "decoder", "encoder")
    heads = ["", "compile s", "median s", "spread", "frames/s", *(f"{part} busy / waiting" for part in parts)]
    rows = []
    for row in figures["rows"]:
        median, busy = row["timing"]["median"], row["busy"]
        rows.append(
            [
                row["name"].removeprefix("dub ") if row["name"] != "dub" else "the whole",
                f"{row['compile_seconds']:.1f}",
                f"{median:.2f}",
                _spread(row, 2),
                f"{row['frames'] / median:.1f}",
                *(f"{busy[p]:.2f} / {max(median - busy[p], 0):.2f}" if p in busy else "" for p in parts),
            ]
        )
    return [*_table(heads, rows), "", *_notes({"rows": figures["rows"][-1:]})]


def _golden(table: str) -> list[str]:
    """The table that `keysync parity` wrote, without its title."""
    return table.strip().splitlines()[2:]


_SECTIONS: Mapping[str, Callable[[Any], list[str]]] = {
    "networks": _networks,
    "train": _train,
    "dub": _dub,
    "golden": _golden,
}


def _spread(row: Mapping[str, Any], digits: int) -> str:
    timing = row["timing"]
    return f"{timing['lowest']:.{digits}f}-{timing['highest']:.{digits}f}"


def _share(rate: float, peak: float | None) -> str:
    return "-" if peak is None else f"{rate / peak:.1%}"


def _notes(figures: Mapping[str, Any]) -> list[str]:
    return [f"{row['name']}: {row['note']}." for row in figures["rows"]]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows)]
