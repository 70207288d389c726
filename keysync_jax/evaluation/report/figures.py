"""The report's figures: the leakage plane, LipLeak_lite against its threshold, mouths over time, stills."""

import base64
from collections.abc import Mapping, Sequence
from typing import Any

from keysync_jax.evaluation.report.charts import Line, Point, legend, lines, plane
from keysync_jax.evaluation.report.clips import SideBySide
from keysync_jax.evaluation.report.markup import cells, escape, figure, note, table
from keysync_jax.evaluation.report.stills import Still
from keysync_jax.evaluation.report.tables import name_of, number, ordered

ABOUT_PLANE = (
    "To the right: the mouth follows the voice that it was given. Upwards: in silence it follows the "
    "voice that it was never given, which only the source's mouth can tell. Good is below and to the "
    "right."
)

ABOUT_THRESHOLD = (
    "LipLeak_lite is the share at .25, one point of these curves: where two of them cross, the ranking "
    "is the threshold's."
)

ABOUT_MOUTHS = "Clip {clip}. The source's own mouth is that of the real video."

ABOUT_SILENT_MOUTHS = " A mouth that rests in silence is a flat dashed line."

ABOUT_STILLS = "Clip {clip} at {seconds:.2f} s, where the mouth of the real video is widest."

ABOUT_SILENT_STILLS = " What is open in silence (SI) is the source's."

SMALL = 380, 190
"""Width and height of a chart that stands among others."""

SPOKEN, SILENT = 0, 1
"""Kinds of the two lines of a mouth."""


def leakage_plane(content: Mapping[str, Any]) -> str:
    """Sync with the foreign voice against sync with the voice that was never given."""
    measure = next(iter(content["sync"]), "")
    points = []
    for kind, row in enumerate(ordered(content)):
        reference = row["reference"]
        voice = row["cells"].get(f"XM-{reference}" if reference else "XM", {}).get(measure)
        source = row["leakage"].get(f"{measure}_s")
        if voice and source:
            points.append(_point(name_of(row), voice, source, kind))
    if not points:
        return ""
    title, words = content["metrics"][measure]["title"], ABOUT_PLANE
    chance = [row["chance"]["SI"] for row in content["rows"] if "SI" in row["chance"]]
    if chance:
        words += f" Chance, by voices of other clips: {number(min(chance))} to {number(max(chance))}."
    return figure(
        plane(points, f"{title} with a foreign voice", f"{title} with the source's, in silence"), words
    )


def _point(name: str, x: Mapping[str, Any], y: Mapping[str, Any], kind: int) -> Point:
    ranges = [None if e["low"] is None else (e["low"], e["high"]) for e in (x, y)]
    return Point(name, x["value"], y["value"], ranges[0], ranges[1], kind)


def thresholds(content: Mapping[str, Any]) -> str:
    """The share of open frames in silence against what counts as open."""
    rows = [(kind, row) for kind, row in enumerate(ordered(content)) if row["open"]]
    if not rows:
        return ""
    drawn = [Line(name_of(row), content["thresholds"], row["open"], kind) for kind, row in rows]
    chart = lines(drawn, "threshold of the mouth aspect ratio", "share of open frames in silence", (0, 1))
    return figure(chart, ABOUT_THRESHOLD, legend([(name_of(row), kind) for kind, row in rows]))


def mouths(content: Mapping[str, Any]) -> str:
    """MAR over time of one clip: speech against silence, a chart a system."""
    shown = content["mar"]
    if not shown:
        return ""
    every = [x for cells in shown["systems"].values() for mar in cells.values() for x in mar if x is not None]
    charts = []
    for system, runs in shown["systems"].items():
        spoken = next((runs[run] for setup in ("XM", "AM") for run in runs if run.startswith(setup)), None)
        silent = next((runs[run] for run in runs if run.startswith("SI")), None)
        both = [("with a voice", spoken, SPOKEN), ("in silence", silent, SILENT)]
        drawn = [
            Line(name, [t / 25 for t in range(len(mar))], mar, kind)
            for name, mar, kind in both
            if mar is not None
        ]
        chart = lines(drawn, "seconds", "mouth aspect ratio", (0, 1.05 * max(every, default=1.0)), *SMALL)
        charts.append(f"<figure><h3>{escape(system)}</h3>{chart}</figure>")
    silence = any(run.startswith("SI") for runs in shown["systems"].values() for run in runs)
    names = [("with a voice, foreign where there is one", SPOKEN), ("in silence", SILENT)]
    words = ABOUT_MOUTHS.format(clip=shown["clip"]) + (ABOUT_SILENT_MOUTHS if silence else "")
    return f'{note(words)}{legend(names if silence else names[:1])}<div class="grid">{"".join(charts)}</div>'


def stills_table(stills: Sequence[Still]) -> str:
    """The stills, a row a system and a column a run."""
    if not stills:
        return ""
    runs = list(dict.fromkeys(still.cell for still in stills))
    systems = list(dict.fromkeys(still.system for still in stills))
    pictures = {(still.system, still.cell): still for still in stills}
    rows = [
        f"<tr><th>{escape(system)}</th>"
        + "".join(_still(pictures.get((system, run))) for run in runs)
        + "</tr>"
        for system in systems
    ]
    words = ABOUT_STILLS.format(clip=stills[0].clip, seconds=stills[0].frame / 25)
    words += ABOUT_SILENT_STILLS if any(run.startswith("SI") for run in runs) else ""
    return note(words) + table(f"<tr><th></th>{cells('th', runs)}</tr>", rows, "stills")


def _still(still: Still | None) -> str:
    if still is None:
        return "<td></td>"
    data = base64.b64encode(still.jpeg).decode()
    words = escape(f"{still.system}, {still.cell}")
    return f'<td><img alt="{words}" src="data:image/jpeg;base64,{data}"></td>'


def clips_to_play(clips: Sequence[SideBySide]) -> str:
    """The videos, a figure each; those that are too large for the page by their names."""
    shown = [_clip_to_play(one) for one in clips if one.shown]
    left = [f"{one.file.parent.name}/{one.file.name}" for one in clips if not one.shown]
    return "".join(shown) + (note(f"As files beside this page: {', '.join(left)}.") if left else "")


def _clip_to_play(one: SideBySide) -> str:
    data = base64.b64encode(one.file.read_bytes()).decode()
    video = f'<video controls preload="metadata" src="data:video/mp4;base64,{data}"></video>'
    return figure(video, f"{one.clip}, {one.cell}; from the left: {', '.join(one.systems)}.")
