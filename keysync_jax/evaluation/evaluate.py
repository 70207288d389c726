"""Judging systems on a list of clips: the job behind `keysync evaluate`.

Everything that takes long is kept: dubs, landmarks, scores. The same call goes on where it was, and where
nothing changed it writes the same bytes.
"""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import keysync_jax
from keysync_jax.errors import UserError, machine_fault
from keysync_jax.evaluation.anchors import ANCHORS, FROZEN, REAL, frozen
from keysync_jax.evaluation.cliplist import COLUMNS, ListedClip, draw_partners, read_clips
from keysync_jax.evaluation.inputs import Inputs
from keysync_jax.evaluation.protocol import PROTOCOLS, Cell, references_of
from keysync_jax.evaluation.runs import Run, RunSettings, ready_made, run
from keysync_jax.evaluation.scoring import Scored, Scorer
from keysync_jax.evaluation.statistics import DRAWS, LEVEL, Resampling
from keysync_jax.evaluation.summary import (
    KNOWN,
    THRESHOLDS,
    Judged,
    comparisons,
    distances,
    row,
    sync_measures,
)
from keysync_jax.evaluation.systems import System
from keysync_jax.evaluation.world import WORLD_METRICS
from keysync_jax.files import locked, make_folder, settle, sha256_once, sweep, write_text
from keysync_jax.media.audio import frames_of
from keysync_jax.media.detectors import DETECTORS, detector_identity, make_detector
from keysync_jax.media.landmarks import detect_all
from keysync_jax.media.video import read_frames
from keysync_jax.metrics.registry import METRICS, Bench, provenance
from keysync_jax.pipeline.environment import environment
from keysync_jax.pipeline.phases import Phases

FORMAT = "keysync-evaluation-1"
MARK, PAIRS = "evaluation.json", "pairs.csv"
INPUTS, RUNS, SCORES = "inputs", "runs", "scores"


@dataclass(frozen=True)
class EvaluateSettings:
    """How to judge.

    Attributes:
      protocol: one of `PROTOCOLS`.
      seed: of the partners and of the intervals.
      weights: folder of the metrics' weights.
      metrics: names of the registry; all of them where empty.
      landmarks: detector of the landmarks of real videos, or "none".
      landmark_model: the detector's model file.
      allow_download: let the detector fetch it.
      runs: how commands are run.
    """

    protocol: str = "cross"
    seed: int = 0
    weights: Path | None = None
    metrics: tuple[str, ...] = ()
    landmarks: str = "mediapipe"
    landmark_model: Path | None = None
    allow_download: bool = False
    runs: RunSettings = field(default_factory=RunSettings)

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise UserError(f"the protocol is one of {', '.join(PROTOCOLS)}, not {self.protocol}")
        if self.seed < 0:
            raise UserError(f"the seed is 0 or more, not {self.seed}")
        if self.landmarks not in (*DETECTORS, "none"):
            raise UserError(f"landmarks are found by {', '.join(DETECTORS)} or none, not by {self.landmarks}")
        if unknown := [name for name in self.metrics if name not in METRICS]:
            raise UserError(f"there is no metric {unknown[0]}; it is any of {', '.join(METRICS)}")
        if self.weights is not None and not self.weights.is_dir():
            raise UserError(f"{self.weights}: is no folder of weights")


@dataclass(frozen=True)
class Evaluation:
    """What was found: the report's content, and the videos that it shows.

    Attributes:
      content: of JSON's types.
      videos: (system, cell, clip) -> the dub.
    """

    content: dict[str, Any]
    videos: Mapping[tuple[str, str, str], Path]
    inputs: Inputs


class _Faces:
    """Landmarks of real videos, by a detector that is made when it is needed first."""

    def __init__(self, settings: EvaluateSettings) -> None:
        self._settings = settings
        self.problem: str | None = "no detector was asked for" if settings.landmarks == "none" else None

    @property
    def identity(self) -> Any:
        settings = self._settings
        if settings.landmarks == "none":
            return None
        return detector_identity(settings.landmarks, settings.landmark_model)

    def __call__(self, video: Path) -> np.ndarray | None:
        if self.problem is not None:
            return None
        settings = self._settings
        try:
            made = make_detector(settings.landmarks, settings.landmark_model, settings.allow_download)
        except UserError as error:
            self.problem = str(error)
            return None
        with closing(made) as detector:
            return detect_all(read_frames(video), detector)


def evaluate(
    pairs: Path,
    systems: Sequence[System],
    output: Path,
    settings: EvaluateSettings | None = None,
    show_progress: bool = False,
) -> Evaluation:
    """Dubs the clips of a list with every system, scores the dubs and summarises.

    Args:
      pairs: the list, or a folder of clips (`cliplist`).
      output: folder, new or of an earlier evaluation; dubs and scores that are there are taken.

    Raises:
      UserError: the list, a system or the folder cannot be used.
    """
    settings = settings or EvaluateSettings()
    listed = read_clips(pairs)
    reserved = [system.name for system in systems if system.name in ANCHORS]
    if reserved:
        raise UserError(f"a system cannot be called {reserved[0]}: every report has an anchor of that name")
    settle(output / MARK, {"format": FORMAT}, "evaluation", "another version")
    with locked(output / ".lock", f"{output}: another evaluation is at work there"):
        return _Job(listed, systems, output, settings, Phases(show=show_progress)).done()


class _Job:
    """One evaluation, after its inputs were read."""

    def __init__(
        self,
        listed: Sequence[ListedClip],
        systems: Sequence[System],
        output: Path,
        settings: EvaluateSettings,
        phases: Phases,
    ) -> None:
        self.systems, self.output, self.settings, self.phases = systems, output, settings, phases
        self.cells = PROTOCOLS[settings.protocol]
        self.faces = _Faces(settings)
        self.left_out: dict[str, str] = {}
        self.clips, self.inputs = self._prepared(listed)
        self.failures: list[dict[str, str]] = []
        self.videos: dict[tuple[str, str, str], Path] = {}
        self.seconds: dict[str, float] = {}

    def _prepared(self, listed: Sequence[ListedClip]) -> tuple[list[ListedClip], Inputs]:
        """The clips that can be used, and what systems are given of them."""
        folder = self.output / INPUTS
        make_folder(folder)
        sweep(folder)
        every = Inputs(folder, listed, {}, self.faces)
        with self.phases.phase("clips", len(listed), "clips") as advance:
            for clip in listed:
                why = _unusable(every, clip)
                if why is not None:
                    self.left_out[clip.name] = why
                advance(1)
        clips = [clip for clip in listed if clip.name not in self.left_out]
        for clip in clips:
            if clip.partner in self.left_out:
                raise UserError(f"{clip.partner}, the partner of {clip.name}, {self.left_out[clip.partner]}")
        if not clips:
            raise UserError(f"no clip of the list can be used: {next(iter(self.left_out.values()))}")
        foreign = any(cell.setup == "XM" for cell in self.cells)
        every.partners = draw_partners(clips, self.settings.seed) if foreign else {}
        write_text(self.output / PAIRS, _as_csv(clips, every.partners))
        return clips, every

    def done(self) -> Evaluation:
        runs = {system.name: self._runs(system) for system in self.systems}
        for anchor in ANCHORS:
            runs[anchor] = self._anchor(anchor)
        scorer = Scorer(
            self.output / SCORES,
            Bench(self.settings.metrics or METRICS, self.settings.weights),
            self.faces,
            self.faces.identity,
            self.settings.weights,
        )
        judged = [self._judged(name, found, scorer) for name, found in runs.items()]
        return Evaluation(self._content(judged, scorer), self.videos, self.inputs)

    def _runs(self, system: System) -> dict[Cell, dict[str, Run]]:
        """The dubs of a system, cell by cell, those that failed too."""
        folder = self.output / RUNS
        make_folder(folder)
        cells = [cell for cell in self.cells if system.runs(cell)]
        found: dict[Cell, dict[str, Run]] = {cell: {} for cell in cells}
        with self.phases.phase(system.name, len(cells) * len(self.clips), "dubs") as advance:
            for clip in self.clips:
                for cell in cells:
                    found[cell][clip.name] = self._run(system, cell, clip.name, folder)
                    advance(1)
        made = [r for cell in found.values() for r in cell.values() if r.video and r.seconds is not None]
        if made:
            self.seconds[system.name] = sum(r.seconds or 0 for r in made) * 25 / sum(r.frames for r in made)
        return found

    def _run(self, system: System, cell: Cell, clip: str, folder: Path) -> Run:
        settings = self.settings.runs
        if system.folder is not None:
            return ready_made(system, cell, clip, self.inputs, len(self.cells), settings.slack)
        return run(system, cell, clip, self.inputs, folder, settings)

    def _anchor(self, name: str) -> dict[Cell, dict[str, Run]]:
        """The real video, or its frozen mouth, in every cell."""
        found: dict[Cell, dict[str, Run]] = {cell: {} for cell in self.cells}
        with self.phases.phase(name, len(self.clips), "clips") as advance:
            for clip in self.clips:
                prepared = self.inputs[clip.name]
                video = prepared.video if name == REAL else frozen(prepared)
                why = None if video else f"its face is not known ({self.faces.problem or 'none was found'})"
                for cell in self.cells:
                    found[cell][clip.name] = Run(video, why, prepared.frames)
                advance(1)
        return found

    def _judged(self, name: str, runs: Mapping[Cell, Mapping[str, Run]], scorer: Scorer) -> Judged:
        """Scores a system's dubs; a clip that failed in one cell leaves all of them."""
        complete = []
        for clip in self.clips:
            failed = {cell: found[clip.name] for cell, found in runs.items() if not found[clip.name].video}
            for cell, one in failed.items():
                self.failures.append(
                    {"system": name, "cell": cell.name, "clip": clip.name, "why": str(one.failure)}
                )
            if not failed:
                complete.append(clip.name)
        scores: dict[Cell, dict[str, Scored]] = {cell: {} for cell in runs}
        with self.phases.phase("scores", len(complete) * len(runs), "dubs") as advance:
            for clip_name in complete:
                for cell, found in runs.items():
                    scores[cell][clip_name] = scorer.score(found[clip_name], cell, clip_name, self.inputs)
                    self.videos[name, cell.name, clip_name] = _video(found[clip_name])
                    advance(1)
        return Judged(name, scores, tuple(complete))

    def _content(self, judged: Sequence[Judged], scorer: Scorer) -> dict[str, Any]:
        names = [clip.name for clip in self.clips]
        resampling = Resampling([clip.speaker for clip in self.clips], seed=self.settings.seed)
        voices = {n: t["opening"] for n in names if (t := self.inputs[n].truth) is not None}
        sync, rows = sync_measures(judged), []
        real = next(one for one in judged if one.system == REAL)
        for one in judged:
            references = references_of(self.settings.protocol)
            # What is never dubbed has no reference; once is enough.
            for reference in references[:1] if one.system in ANCHORS else references:
                if one.clips and any(cell.reference == reference for cell in one.scores):
                    part = resampling.of([names.index(clip) for clip in one.clips])
                    # A mouth at rest has no speech of its own to compare its silence with.
                    other = real if one.system == FROZEN else None
                    made = row(one, reference, part, voices, self.inputs.partners, sync, other)
                    if one is not real:
                        made["distances"] = distances(one, real, reference, self.settings.seed)
                    rows.append(made)
        tables = [table for r in rows for table in (*r["cells"].values(), *r["distances"].values())]
        used = [name for name in KNOWN if any(name in table for table in tables)]
        tested = [one for one in judged if one.system not in ANCHORS]
        return {
            "format": FORMAT,
            "protocol": self.settings.protocol,
            "settings": self._told_settings(),
            "versions": {"keysync_jax": keysync_jax.__version__, **environment("evaluation", "metrics")},
            "clips": {clip.name: self._told_clip(clip) for clip in self.clips},
            "left_out": self.left_out,
            "metrics": {name: self._told_metric(name) for name in used},
            "not_available": _missing(judged, scorer.bench, used),
            "sync": list(sync),
            "systems": [self._told_system(system) for system in self.systems],
            "rows": rows,
            "thresholds": list(THRESHOLDS) if any(r["open"] for r in rows) else [],
            "comparisons": comparisons(tested, self.cells, names, resampling),
            "failures": self.failures,
            "mar": _series(judged, names),
        }

    def _told_settings(self) -> dict[str, Any]:
        settings = self.settings
        return {
            "seed": settings.seed,
            "draws": DRAWS,
            "level": LEVEL,
            "slack": settings.runs.slack,
            "landmarks": self.faces.problem or self.faces.identity,
        }

    def _told_clip(self, clip: ListedClip) -> dict[str, Any]:
        prepared = self.inputs[clip.name]
        return {
            "speaker": clip.speaker,
            "partner": self.inputs.partners.get(clip.name),
            "alternative": clip.alternative,
            "frames": min(prepared.frames, frames_of(len(prepared.wave))),
            "video": sha256_once(clip.video),
            "voice": sha256_once(clip.voice),
        }

    def _told_metric(self, name: str) -> dict[str, Any]:
        metric = KNOWN[name]
        told = {"title": metric.title, "unit": metric.unit, "better": metric.better, "what": metric.what}
        how = {"computed by": "the synthetic world's mouth reader"}
        if name in METRICS:
            how = provenance(name, self.settings.weights)
        return {**told, "provenance": how}

    def _told_system(self, system: System) -> dict[str, Any]:
        seconds = self.seconds.get(system.name)
        return {
            "name": system.name,
            "command": " ".join(system.command) or None,
            "folder": None if system.folder is None else system.folder.name,
            "references": list(system.references),
            "sheet": dict(system.sheet),
            "seconds_per_second": None if seconds is None else float(f"{seconds:.3g}"),
        }


def _video(found: Run) -> Path:
    assert found.video is not None
    return found.video


def _unusable(inputs: Inputs, clip: ListedClip) -> str | None:
    """Why a clip cannot be used; None where it can."""
    prepared = inputs[clip.name]
    try:
        frames, samples = prepared.frames, len(prepared.wave)
        _ = prepared.size, prepared.truth, prepared.landmarks
    except UserError as error:
        if machine_fault(error) is not None:
            raise
        return str(error)
    if min(frames, frames_of(samples)) < 2:
        return f"{clip.video}: has less than two frames with a voice"
    if clip.alternative >= frames:
        return f"{clip.video}: has no frame {clip.alternative} to be its alternative reference"
    return None


def _as_csv(clips: Iterable[ListedClip], partners: Mapping[str, str]) -> str:
    """The list that was used, with its drawn partners; paths as they are."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for clip in clips:
        partner = partners.get(clip.name) or clip.partner
        files = [clip.landmarks, clip.truth]
        places = ["" if path is None else path.resolve() for path in files]
        told = [clip.video.resolve(), clip.voice.resolve(), clip.speaker, partner or "", clip.alternative]
        writer.writerow([*told, *places])
    return text.getvalue()


def _missing(judged: Sequence[Judged], bench: Bench, used: Sequence[str]) -> dict[str, str]:
    """Metric -> why no dub has it."""
    missing = {name: why.reason for name, why in bench.missing.items()}
    for one in judged:
        for scores in one.scores.values():
            for scored in scores.values():
                missing |= {name: why for name, why in scored.missing.items() if name not in missing}
    return {name: why for name, why in missing.items() if name not in used and name not in WORLD_METRICS}


def _series(judged: Sequence[Judged], names: Sequence[str]) -> dict[str, Any]:
    """MAR over time of the first clip that every system has: system -> cell -> numbers."""
    shown = next((n for n in names if all(n in one.clips for one in judged if one.clips)), None)
    found: dict[str, Any] = {}
    for one in judged:
        for cell, scores in one.scores.items():
            if shown is not None and shown in scores and "mar" in scores[shown].series:
                mar = [None if np.isnan(x) else float(f"{x:.4g}") for x in scores[shown].series["mar"]]
                found.setdefault(one.system, {})[cell.name] = mar
    return {"clip": shown, "systems": found} if found else {}
