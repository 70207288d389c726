"""Writing the report: the page, and the same numbers as JSON, CSV, LaTeX and Markdown."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from keysync_jax.evaluation.anchors import ANCHORS
from keysync_jax.evaluation.evaluate import Evaluation
from keysync_jax.evaluation.protocol import Setup
from keysync_jax.evaluation.report.clips import side_by_side
from keysync_jax.evaluation.report.page import page
from keysync_jax.evaluation.report.stills import stills
from keysync_jax.evaluation.report.tables import as_csv, latex, markdown
from keysync_jax.files import write_json, write_text

PAGE, JSON, CSV, LATEX, MARKDOWN = "report.html", "report.json", "metrics.csv", "table.tex", "table.md"

CLIPS = "side_by_side"

VIDEOS = "videos.json"
"""Where the dubs lie that people compare, for `keysync arena`."""


@dataclass(frozen=True)
class Written:
    """The page's file, and the table as text for a terminal."""

    page: Path
    text: str


def write_report(evaluation: Evaluation, folder: Path, clips: int = 0) -> Written:
    """Writes the files; what is there of an earlier report is replaced.

    Args:
      clips: how many clips can be played, all systems side by side; their videos lie in `side_by_side`.
    """
    content = evaluation.content
    text = markdown(content)
    write_json(folder / JSON, content)
    write_text(folder / CSV, as_csv(content))
    write_text(folder / LATEX, latex(content))
    write_text(folder / MARKDOWN, text)
    write_json(folder / VIDEOS, _videos(evaluation))
    played = side_by_side(evaluation, folder / CLIPS, clips)
    write_text(folder / PAGE, page(content, stills(evaluation), played))
    failed = len(content["failures"])
    lost = len(content["left_out"])
    notes = [f"{failed} dubs failed"] * bool(failed) + [f"{lost} clips could not be used"] * bool(lost)
    return Written(folder / PAGE, "\n".join([text, *notes]))


def _videos(evaluation: Evaluation) -> Mapping[str, Mapping[str, Mapping[str, str]]]:
    """System -> clip -> its dub with a foreign voice, else with its own, and the voice."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    setups: tuple[Setup, ...] = ("AM", "XM")
    for setup in setups:
        for (system, cell, clip), video in evaluation.videos.items():
            if cell.startswith(setup) and system not in ANCHORS:
                voice = evaluation.inputs.voiced(clip, setup).audio
                found.setdefault(system, {})[clip] = {
                    "video": str(video.resolve()),
                    "voice": str(voice.resolve()),
                }
    return found
