"""The report as one HTML file that fetches nothing: charts are SVG, stills are in it, its policy says so."""

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from keysync_jax.evaluation.protocol import REFERENCES, SETUPS
from keysync_jax.evaluation.report.clips import SideBySide
from keysync_jax.evaluation.report.figures import (
    clips_to_play,
    leakage_plane,
    mouths,
    stills_table,
    thresholds,
)
from keysync_jax.evaluation.report.markup import cells, escape, folded, note, section, table, texts
from keysync_jax.evaluation.report.results import cell, results, results_table
from keysync_jax.evaluation.report.stills import Still
from keysync_jax.evaluation.report.tables import columns, number

MANY = 30
"""Comparisons that are shown before the rest is folded away."""

ABOUT_PAIRS = (
    "First less second, on the clips that both have. p: the systems exchanged within clips; Holm: "
    "adjusted for all tests of this table; visible: the smallest difference that so many clips show in "
    "80 % of cases."
)


def page(content: Mapping[str, Any], stills: Sequence[Still], clips: Sequence[SideBySide] = ()) -> str:
    """The whole page.

    Args:
      content: as `evaluate.Evaluation` has it.
      stills, clips: what to look at.
    """
    style, script = (
        resources.files(__package__).joinpath(name).read_text() for name in ("page.css", "page.js")
    )
    policy = (
        f"default-src 'none'; img-src data:; media-src data:; style-src '{_hash(style)}'; "
        f"script-src '{_hash(script)}'; base-uri 'none'; form-action 'none'"
    )
    data = json.dumps(content, sort_keys=True).replace("<", "\\u003c")
    sections = [
        section("Results", *results(content)),
        section("The leakage plane", leakage_plane(content)),
        section("LipLeak_lite against its threshold", thresholds(content)),
        section("The mouth over time", mouths(content)),
        section("Stills", stills_table(stills)),
        section("Clips", clips_to_play(clips)),
        section("Pairs of systems", *_comparisons(content)),
        section("Failures", *_failures(content)),
        section("Details", *_details(content)),
    ]
    return "\n".join([
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>keysync evaluate: {escape(content['protocol'])}</title>",
        f"<style>{style}</style></head><body>",
        _header(content),
        "<main>",
        *filter(None, sections),
        "</main>",
        f"<footer>keysync_jax {escape(content['versions']['keysync_jax'])}. The numbers are in this page as "
        "JSON, and beside it as JSON, CSV, LaTeX and Markdown.</footer>",
        f'<script type="application/json" id="content">{data}</script>',
        f"<script>{script}</script>",
        "</body></html>",
        "",
    ])  # fmt: skip


def _hash(text: str) -> str:
    """What a content security policy knows an inline text by."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _header(content: Mapping[str, Any]) -> str:
    clips = content["clips"].values()
    facts = {
        "systems": len(content["systems"]),
        "clips": len(clips),
        "speakers": len({clip["speaker"] for clip in clips}),
        "of video": f"{sum(clip['frames'] for clip in clips) / 25:.0f} s",
        "dubs failed": len(content["failures"]),
        "clips left out": len(content["left_out"]),
    }
    items = "".join(f"<li><b>{value}</b><span>{what}</span></li>" for what, value in facts.items())
    runs = [run for row in content["rows"] for run in row["cells"]]
    voices = [f"{s} {words}" for s, words in SETUPS.items() if any(run.startswith(s) for run in runs)]
    references = [
        f"{r} {words}" for r, words in REFERENCES.items() if r and any(run.endswith(r) for run in runs)
    ]
    about = "".join(
        f"<p class=quiet>{escape('; '.join(words))}.</p>" for words in (voices, references) if words
    )
    title = f"Evaluation: {escape(content['protocol'])}"
    return f"<header><h1>{title}</h1>{about}<ul class=facts>{items}</ul></header>"


def _comparisons(content: Mapping[str, Any]) -> list[str]:
    found = sorted(content["comparisons"], key=lambda one: (one["holm"], one["permutation"]))
    if not found:
        return []
    heads = cells("th", ["first"]) + cells("th", ["second", "metric"], "text")
    heads += cells("th", ["difference", "p", "p, Holm", "p, Wilcoxon", "visible"])
    rows = [_comparison(one, content["metrics"][one["metric"]]["title"]) for one in found]
    parts = [note(ABOUT_PAIRS), table(f"<tr>{heads}</tr>", rows[:MANY], "sortable")]
    if rows[MANY:]:
        rest = table(f"<tr>{heads}</tr>", rows[MANY:], "sortable")
        parts.append(f"<details><summary>{len(rows) - MANY} more</summary>{rest}</details>")
    return parts


def _comparison(one: Mapping[str, Any], metric: str) -> str:
    names = f"<th>{escape(one['first'])}</th>"
    names += cells("td", [one["second"], f"{metric} ({one['cell']})"], "text")
    tests = "".join(_p(one[key]) for key in ("permutation", "holm", "wilcoxon"))
    return f"<tr>{names}{cell(one)}{tests}<td>{number(one['visible'])}</td></tr>"


def _p(value: float | None) -> str:
    if value is None:
        return '<td data-value="">–</td>'
    return f'<td data-value="{value}">{"&lt; .001" if value < 0.001 else f"{value:.3f}"}</td>'


def _failures(content: Mapping[str, Any]) -> list[str]:
    failures, left_out = content["failures"], content["left_out"]
    if not failures and not left_out:
        return ["<p>None: every system dubbed every clip.</p>"]
    parts = []
    if left_out:
        rows = [texts(name, why) for name, why in left_out.items()]
        parts += ["<h3>Clips that could not be used</h3>", table("", rows)]
    if failures:
        counts = Counter(one["system"] for one in failures)
        told = ", ".join(f"{system}: {count}" for system, count in counts.items())
        heads = f"<tr>{cells('th', ['system'])}{cells('th', ['clip', 'run', 'why'], 'text')}</tr>"
        rows = [texts(one["system"], one["clip"], one["cell"], one["why"]) for one in failures]
        words = f"{told}. A clip that failed in one run leaves all runs of that system."
        parts += ["<h3>Dubs that failed</h3>", note(words), table(heads, rows)]
    return parts


def _details(content: Mapping[str, Any]) -> list[str]:
    made = columns(content, details=True)
    every = f"<details><summary>All metrics</summary>{results_table(content, made)}</details>" if made else ""
    computed = [
        (metric["title"], f"{metric['what']}; {_listed(metric['provenance'])}")
        for metric in content["metrics"].values()
    ]
    settings = {**content["settings"], **content["versions"]}
    return [
        every,
        folded("Not available", list(content["not_available"].items())),
        folded("Systems", [(system["name"], _system(system)) for system in content["systems"]]),
        folded("What computed the metrics", computed),
        folded("Clips, pairs and hashes", [(name, _clip(one)) for name, one in content["clips"].items()]),
        folded("Settings and versions", [(key, json.dumps(value)) for key, value in settings.items()]),
    ]


def _listed(found: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}: {value}" for key, value in found.items())


def _system(system: Mapping[str, Any]) -> str:
    seconds = system["seconds_per_second"]
    words = [system["command"] or f"videos of {system['folder']}", _listed(system["sheet"])]
    words.append(f"{seconds} s a second of video" if seconds else "")
    return "; ".join(filter(None, words))


def _clip(clip: Mapping[str, Any]) -> str:
    hashes = f"video {clip['video'][:16]}, voice {clip['voice'][:16]}"
    partner = f"foreign voice of {clip['partner']}" if clip["partner"] else "no foreign voice"
    return f"speaker {clip['speaker']}; {partner}; {clip['frames']} frames; {hashes}"
