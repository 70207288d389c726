"""The report's table of results as HTML, and what there is to say of its columns."""

from collections.abc import Mapping, Sequence
from typing import Any

from keysync_jax.evaluation.anchors import ANCHORS
from keysync_jax.evaluation.report.markup import cells, escape, note, table
from keysync_jax.evaluation.report.tables import ARROWS, Column, columns, name_of, number, ordered, spread

GROUPS = {
    "leakage": "leakage",
    "AM": "matched voice (AM)",
    "XM": "mismatched voice (XM)",
    "SI": "silence (SI)",
}

ABOUT = (
    "Means over clips, with 95 % intervals of {draws:,} draws of speakers, the same draws for all "
    "systems. Bold: the best system of a column. The anchors stand below: the real video is the ceiling"
    " with its own voice (AM), the floor with a foreign one (XM), and in silence (SI) a mouth that "
    "leaks everything; the frozen mouth shows what is read of one that never moves."
)

ABOUT_SETS = (
    "Such a distance grows as clips get fewer. In brackets: the range of random halves of the clips, "
    "drawn without replacement; real halves: the distance between two halves of the real videos, which "
    "is all bias."
)

ABOUT_LSD = (
    "An absolute difference is above 0 by chance alone. Chance: its mean where the two setups are "
    "exchanged at random within clips; p: the share of exchanges that reach it. LSD rises as well for a"
    " system that cannot follow a foreign voice, and is near 0 for one that ignores voices: read it "
    "beside the sync with the mismatched voice."
)


def results(content: Mapping[str, Any]) -> list[str]:
    """The parts of the section."""
    made = columns(content)
    if not made:
        return ["<p>No dub could be scored.</p>"]
    about = ABOUT.format(draws=content["settings"]["draws"])
    return [results_table(content, made), note(about), _legend(made), *_lsd(content), *_bias(content)]


def results_table(content: Mapping[str, Any], made: Sequence[Column]) -> str:
    """A row a system, a column a metric; the anchors below."""
    groups: list[tuple[str, int]] = []
    for column in made:
        count = groups.pop()[1] if groups and groups[-1][0] == column.group else 0
        groups.append((column.group, count + 1))
    tops = "".join(f'<th colspan="{count}">{escape(GROUPS[group])}</th>' for group, count in groups)
    heads = f"<tr class=groups><th></th><th></th>{tops}</tr><tr>{cells('th', ['system', 'clips'])}"
    heads += "".join(_head(column) for column in made) + "</tr>"
    best = [_best(content, column) for column in made]
    rows, kinds = [], iter(["anchor first-anchor"])
    for row in ordered(content):
        kind = next(kinds, "anchor") if row["system"] in ANCHORS else ""
        values = "".join(
            cell(column.of(row), None if kind else good) for column, good in zip(made, best, strict=True)
        )
        clips = row["clips"]
        name = f'<th>{escape(name_of(row))}</th><td data-value="{clips}">{clips}</td>'
        rows.append(f'<tr class="{kind}">{name}{values}</tr>')
    return table(heads, rows, "sortable")


def _head(column: Column) -> str:
    unit = f" <span class=quiet>{escape(column.unit)}</span>" if column.unit else ""
    return f'<th title="{escape(column.what)}">{escape(column.title)} {ARROWS[column.better]}{unit}</th>'


def _best(content: Mapping[str, Any], column: Column) -> float | None:
    """The best value of the systems, anchors aside; None where no side is better."""
    rows = [row for row in content["rows"] if row["system"] not in ANCHORS]
    found = [float(e["value"]) for row in rows if (e := column.of(row)) and e["value"] is not None]
    if len(found) < 2 or column.better in ("reference", "zero"):
        return None
    return max(found) if column.better == "higher" else min(found)


def cell(found: Mapping[str, Any] | None, best: float | None = None) -> str:
    """A cell of an estimate, bold where it is the best."""
    if found is None or found["value"] is None:
        return '<td data-value="">–</td>'
    value = found["value"]
    marked = ' class="best"' if best is not None and float(value) == best else ""
    interval = spread(found)
    small = f"<small>{interval}</small>" if interval else ""
    return f'<td data-value="{float(value)}"{marked}>{number(value)}{small}</td>'


def _bias(content: Mapping[str, Any]) -> list[str]:
    """Distances of sets beside what so few clips give of themselves."""
    rows = [
        f"<tr><th>{escape(name_of(row))}</th>{cells('td', [content['metrics'][name]['title'], run], 'text')}"
        f"{cell(found)}<td>{number(found['bias'])}</td></tr>"
        for row in ordered(content)
        for run, table in row["distances"].items()
        for name, found in table.items()
    ]
    if not rows:
        return []
    heads = f"<tr>{cells('th', ['system'])}{cells('th', ['distance', 'run'], 'text')}"
    heads += cells("th", ["value [halves]", "real halves"]) + "</tr>"
    return ["<h3>Distances of sets</h3>", table(heads, rows), note(ABOUT_SETS)]


def _legend(made: Sequence[Column]) -> str:
    words = dict.fromkeys(f"<b>{escape(c.title)}</b>: {escape(c.what)}" for c in made)
    return f"<details><summary>What the columns are</summary><p>{'.<br>'.join(words)}.</p></details>"


def _lsd(content: Mapping[str, Any]) -> list[str]:
    """LSD beside its chance level and its signed terms."""
    rows = []
    for row in ordered(content):
        lsd = row["leakage"].get("lsd")
        if lsd:
            signed = ", ".join(f"{name} {number(value)}" for name, value in lsd["signed"].items())
            values = cells("td", [number(lsd["chance"]), number(lsd["p"]), signed])
            rows.append(f"<tr><th>{escape(name_of(row))}</th>{cell(lsd)}{values}</tr>")
    if not rows:
        return []
    heads = f"<tr>{cells('th', ['system', 'LSD', 'chance', 'p', 'AM − XM'])}</tr>"
    return ["<h3>LSD against chance</h3>", table(heads, rows), note(ABOUT_LSD)]
