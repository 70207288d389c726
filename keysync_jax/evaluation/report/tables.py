"""The report's tables, in the papers' form: a row a system, a column a metric, an arrow to the better side.

The same table as Markdown, LaTeX and for the page; and every number there is as CSV.
"""

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from keysync_jax.evaluation.anchors import ANCHORS
from keysync_jax.evaluation.summary import DETAILS

ARROWS = {"higher": "↑", "lower": "↓", "zero": "→ 0", "reference": "→ real"}
LATEX_ARROWS = {
    "higher": r"$\uparrow$",
    "lower": r"$\downarrow$",
    "zero": r"$\to 0$",
    "reference": r"$\to$ real",
}

OF_SETUP = {"source": ("XM",), "vl": ("AM",)}
"""Metrics that say something in some setups alone, of the small table."""

SIDES: Mapping[str, str] = {"lse_c_s": "lower", "lse_d_s": "higher", "sync_s": "zero", "gain_s": "zero"}

LEAKAGE = {
    "lip_leak": ("LipLeak", "lower", "mean std of MAR in silence / with the foreign voice"),
    "lip_leak_lite": ("LipLeak_lite", "lower", "share of frames in silence with a MAR above 0.25"),
    "sync_s": ("sync_S", "zero", "sync in silence with the voice that was never given: the source's mouth"),
    "lse_c_s": ("LSE-C_S", "lower", "LSE-C in silence, scored with the voice that was never given"),
    "lse_d_s": ("LSE-D_S", "higher", "LSE-D in silence, scored with the voice that was never given"),
    "gain_s": ("gain_S", "zero", "share of the source's movement that is left in silence"),
    "lsd": ("LSD", "lower", "|sync with the matched - sync with the mismatched voice|, mean of the measures"),
}
"""Leakage metrics: title, better side, what they are."""


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
      group: what it stands under: a setup, or "leakage".
      of: a row of the report's content -> its estimate there, None where there is none.
    """

    group: str
    title: str
    better: str
    unit: str
    what: str
    of: Callable[[Mapping[str, Any]], Mapping[str, Any] | None]


def columns(content: Mapping[str, Any], details: bool = False) -> list[Column]:
    """The columns that any row has a number in; `details`: those of the large table too."""
    found = [*_leakage_columns(content), *_metric_columns(content, details)]
    return [column for column in found if any(column.of(row) for row in content["rows"])]


def _leakage_columns(content: Mapping[str, Any]) -> Iterator[Column]:
    for key, (title, better, what) in LEAKAGE.items():

        def of(row: Mapping[str, Any], key: str = key) -> Mapping[str, Any] | None:
            found: Mapping[str, Any] | None = row["leakage"].get(key)
            return found

        yield Column("leakage", title, better, "", what, of)


def _metric_columns(content: Mapping[str, Any], details: bool) -> Iterator[Column]:
    for setup in ("AM", "XM", "SI"):
        for name, metric in content["metrics"].items():
            shown = name not in DETAILS and setup in OF_SETUP.get(name, ("AM", "XM"))
            if not (shown or details):
                continue

            def of(row: Mapping[str, Any], setup: str = setup, name: str = name) -> Mapping[str, Any] | None:
                reference = row["reference"]
                run = f"{setup}-{reference}" if reference else setup
                table = {**row["cells"].get(run, {}), **row["distances"].get(run, {})}
                found: Mapping[str, Any] | None = table.get(name)
                return found

            yield Column(setup, metric["title"], metric["better"], metric["unit"], metric["what"], of)


def name_of(row: Mapping[str, Any]) -> str:
    """What a row is called."""
    told = row["reference"] and row["system"] not in ANCHORS
    return f"{row['system']} ({row['reference']})" if told else str(row["system"])


def ordered(content: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The rows, the anchors last."""
    return sorted(content["rows"], key=lambda row: row["system"] in ANCHORS)


def number(value: Any) -> str:
    """A number of the content as people read it; a dash where there is none."""
    if value is None:
        return "–"
    if isinstance(value, str):
        return "∞" if value == "inf" else "−∞"
    digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 100 else 2 if abs(value) >= 10 else 3
    text = f"{value:.{digits}f}"
    return text.replace("-", "−") if float(text) else text.lstrip("-")


def spread(found: Mapping[str, Any]) -> str:
    """The interval of an estimate; empty where it has none."""
    if found.get("low") is None or found.get("high") is None:
        return ""
    return f"[{number(found['low'])}, {number(found['high'])}]"


def _heads(made: Sequence[Column], arrows: Mapping[str, str]) -> list[str]:
    return [f"{c.title} {arrows[c.better]}" + (f" ({c.group})" if c.group != "leakage" else "") for c in made]


def markdown(content: Mapping[str, Any]) -> str:
    """The small table as Markdown."""
    made = columns(content)
    lines = [
        "| " + " | ".join(["system", "clips", *_heads(made, ARROWS)]) + " |",
        "|" + "---|" * (len(made) + 2),
    ]
    for row in ordered(content):
        cells = [_plain(column.of(row)) for column in made]
        lines.append("| " + " | ".join([_bars(name_of(row)), str(row["clips"]), *cells]) + " |")
    return "\n".join(lines) + "\n"


def _bars(text: str) -> str:
    return text.replace("|", "\\|")


def _plain(found: Mapping[str, Any] | None) -> str:
    return "–" if found is None else f"{number(found['value'])} {spread(found)}".rstrip()


def latex(content: Mapping[str, Any]) -> str:
    """The small table as LaTeX, for booktabs; intervals beneath in small print."""
    made = columns(content)
    heads = " & ".join(_tex(head) for head in _heads(made, dict.fromkeys(ARROWS, "@")))
    for column in made:
        heads = heads.replace("@", LATEX_ARROWS[column.better], 1)
    lines = [
        "% keysync evaluate: means over clips; 95 % intervals in brackets.",
        r"\begin{tabular}{l" + "r" * (len(made) + 1) + "}",
        r"\toprule",
        rf"System & Clips & {heads} \\",
        r"\midrule",
    ]
    previous = False
    for row in ordered(content):
        anchor = row["system"] in ANCHORS
        lines += [r"\midrule"] if anchor and not previous else []
        previous = anchor
        cells = [_tex_cell(column.of(row)) for column in made]
        lines.append(" & ".join([_tex(name_of(row)), str(row["clips"]), *cells]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _tex_cell(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "--"
    interval = spread(found)
    text = number(found["value"]) + (rf" {{\tiny {interval}}}" if interval else "")
    return text.replace("−", "$-$").replace("∞", r"$\infty$").replace("–", "--")


_TEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "²": "$^2$"}
_TEX |= {character: f"\\{character}" for character in "&%$#_{}"}


def _tex(text: str) -> str:
    return "".join(_TEX.get(character, character) for character in text)


def as_csv(content: Mapping[str, Any]) -> str:
    """Every number: a line a system, reference, setup and metric."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["system", "reference", "cell", "metric", "better", "unit", "value", "low", "high", "clips"]
    )
    for row in ordered(content):
        head = [_cell(row["system"]), row["reference"]]
        for key, found in row["leakage"].items():
            if isinstance(found, Mapping):
                writer.writerow([*head, "leakage", key, LEAKAGE[key][1], "", *_numbers(found)])
        for cell, metrics in (*row["cells"].items(), *row["distances"].items()):
            for name, found in metrics.items():
                metric = content["metrics"][name]
                writer.writerow([*head, cell, name, metric["better"], metric["unit"], *_numbers(found)])
    return text.getvalue()


def _cell(text: str) -> str:
    """Spreadsheets take text that begins so for a formula."""
    return f"'{text}" if text[:1] in "=+-@" else text


def _numbers(found: Mapping[str, Any]) -> list[Any]:
    return ["" if found.get(key) is None else found[key] for key in ("value", "low", "high", "clips")]
