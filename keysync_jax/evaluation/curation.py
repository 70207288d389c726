"""Which clips are worth training on: scores of each, then thresholds (appendix A of the KeySync paper).

The job behind `keysync prepare --curate`. A clip's scores are a file of their own, so a run goes on where it
was, and other thresholds need no new pass.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np

from keysync_jax.config import from_dict, to_dict
from keysync_jax.data.faces import DetectorError, attempt
from keysync_jax.data.parts import key_of
from keysync_jax.data.sources import Clip, FileState, changed_file, find_clips, is_reference_layout, stat_all
from keysync_jax.data.sources import states_of as file_states
from keysync_jax.errors import UserError
from keysync_jax.files import make_folder, write_json, write_text
from keysync_jax.media.audio import frames_of
from keysync_jax.media.detectors import make_detector
from keysync_jax.media.face_track import face_boxes
from keysync_jax.media.landmarks import detect_all, load_landmarks
from keysync_jax.media.scenes import SceneCuts
from keysync_jax.media.soundtrack import read_soundtrack
from keysync_jax.media.timeline import Timeline
from keysync_jax.media.video import probe_video, read_frames, scan_timeline
from keysync_jax.metrics.meter import Moment, Subject
from keysync_jax.metrics.registry import Bench, provenance
from keysync_jax.pipeline.phases import Phases

REPORT, KEPT = "curation.json", "kept.txt"

BINS = 10


@dataclass(frozen=True)
class CurationSettings:
    """What a clip must have.

    Attributes:
      by: which of `CRITERIA` count.
      most_cuts: scene cuts.
      least_face: mean of the larger side of the face's box, pixels; what SyncNet's own pipeline asks for.
      least_quality: HyperIQA; the paper's.
      least_speaking: Light-ASD's mean probability; the paper's number, of a score that it does not name.
      most_offset: frames of 40 ms between picture and voice, and
      least_confidence: LSE-C that an offset needs; LatentSync's, the paper states none.
      weights: folder of the metrics' weights.
      landmarks, landmark_model, allow_download: as `PrepareSettings` has them.
    """

    by: tuple[str, ...] = ("cuts", "face", "quality", "speaking", "sync")
    most_cuts: float = 0
    least_face: float = 100.0
    least_quality: float = 0.4
    least_speaking: float = 0.75
    most_offset: float = 6.0
    least_confidence: float = 3.0
    weights: Path | None = None
    landmarks: str = "mediapipe"
    landmark_model: Path | None = None
    allow_download: bool = False

    def __post_init__(self) -> None:
        unknown = [name for name in self.by if name not in CRITERIA]
        if unknown or not self.by:
            said = unknown[0] if unknown else "nothing"
            raise UserError(f"clips are curated by any of {', '.join(CRITERIA)}, not {said}")


@dataclass(frozen=True)
class Scores:
    """What was measured of a clip.

    Attributes:
      values: score -> number: "cuts", "face" and names of metrics.
      missing: metric -> why it has no number.
      files: that were measured, as they were.
      measured_by: what computed them.
      fault: why the clip cannot be used at all; empty where it can.
    """

    values: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    files: tuple[FileState, ...] = ()
    measured_by: dict[str, str] = field(default_factory=dict)
    fault: str = ""


Limit = tuple[str, Callable[[float, CurationSettings], bool], str]
"""A score, whether it will do, and the field of the settings that has the threshold."""

CRITERIA: Mapping[str, tuple[tuple[str, ...], tuple[Limit, ...]]] = {
    "cuts": ((), (("cuts", lambda x, s: x <= s.most_cuts, "most_cuts"),)),
    "face": ((), (("face", lambda x, s: x >= s.least_face, "least_face"),)),
    "quality": (("hyperiqa",), (("hyperiqa", lambda x, s: x >= s.least_quality, "least_quality"),)),
    "speaking": (
        ("active_speaker",),
        (("active_speaker", lambda x, s: x >= s.least_speaking, "least_speaking"),),
    ),
    "sync": (
        ("lse_c", "av_offset"),
        (
            ("lse_c", lambda x, s: x >= s.least_confidence, "least_confidence"),
            ("av_offset", lambda x, s: abs(x) <= s.most_offset, "most_offset"),
        ),
    ),
}
"""Criterion -> the metrics that it needs, and its limits in the order in which they are looked at."""


@dataclass(frozen=True)
class Curation:
    """What was decided.

    Attributes:
      kept: videos to go on with.
      dropped: (source, reason) of the others.
      histograms: score -> the edges of ten bins, and the clips in each.
    """

    kept: tuple[Path, ...]
    dropped: tuple[tuple[str, str], ...]
    histograms: Mapping[str, tuple[tuple[float, ...], tuple[int, ...]]]

    def table(self) -> str:
        """The numbers, a histogram of each score, and each clip that was dropped with its reason."""
        lines = [f"curated    {len(self.kept)} kept, {len(self.dropped)} dropped"]
        for name, (edges, counts) in self.histograms.items():
            lines.append(f"{name:<15} {edges[0]:8.3g} |{' '.join(map(str, counts))}| {edges[-1]:.3g}")
        return "\n".join(lines + [f"dropped    {source}: {reason}" for source, reason in self.dropped])


def curate(
    source: str | Path | Sequence[Path],
    folder: str | Path,
    settings: CurationSettings | None = None,
    show_progress: bool = False,
) -> Curation:
    """Scores the clips of a source and says which to keep.

    Args:
      source: as `prepare` takes it, of videos.
      folder: of the scores, a file a clip, and of `curation.json` and `kept.txt`, a list for `prepare`. Clips
        that were scored by the same networks, and did not change, are not read again.

    Raises:
      UserError: a metric cannot be computed, the source has no videos, or not one clip is kept.
      OSError: the machine cannot read a clip, or write.
    """
    source = Path(source) if isinstance(source, str) else source
    folder, settings = Path(folder), settings or CurationSettings()
    if is_reference_layout(source):
        raise UserError(f"{source}: holds latents; clips are curated from their videos")
    clips = find_clips(source)
    bench = _bench(settings)
    measured_by = _measured_by(settings)
    make_folder(folder)
    scores = []
    with Phases(show=show_progress).phase("curating", len(clips), "clips") as advance:
        for clip in clips:
            scores.append(_scored(clip, folder, bench, measured_by, settings))
            advance(1)
    decided = decide(clips, scores, settings)
    thresholds = {name: value for name, value in vars(settings).items() if not isinstance(value, Path)}
    kept = [str(path) for path in decided.kept]
    said = {"dropped": decided.dropped, "histograms": decided.histograms}
    write_json(folder / REPORT, {"settings": thresholds, "kept": kept, **said})
    write_text(folder / KEPT, "".join(f"{path.absolute()}\n" for path in decided.kept))
    if not decided.kept:
        raise UserError(f"none of the {len(clips)} clips is kept; the first: {decided.dropped[0][1]}")
    return decided


def decide(clips: Sequence[Clip], scores: Sequence[Scores], settings: CurationSettings) -> Curation:
    """What the thresholds make of the scores."""
    reasons = [reason_to_drop(found, settings) for found in scores]
    kept = [clip.path for clip, reason in zip(clips, reasons, strict=True) if reason is None]
    dropped = [(clip.source, reason) for clip, reason in zip(clips, reasons, strict=True) if reason]
    histograms = {}
    for name in dict.fromkeys(limit[0] for by in settings.by for limit in CRITERIA[by][1]):
        values = [found.values[name] for found in scores if name in found.values]
        if values:
            counts, edges = np.histogram(values, BINS)
            histograms[name] = (tuple(map(float, edges)), tuple(map(int, counts)))
    return Curation(tuple(kept), tuple(dropped), histograms)


def reason_to_drop(scores: Scores, settings: CurationSettings) -> str | None:
    """The first criterion that a clip does not meet, in words; None for a clip to keep."""
    if scores.fault:
        return scores.fault
    for by in settings.by:
        for name, suffices, threshold in CRITERIA[by][1]:
            if name not in scores.values:
                return f"{by}: {name} is {scores.missing[name]}"
            if not suffices(scores.values[name], settings):
                limit = getattr(settings, threshold)
                return f"{by}: {name} is {scores.values[name]:.3g} ({threshold.replace('_', ' ')} {limit:g})"
    return None


def _bench(settings: CurationSettings) -> Bench:
    """The measures of the criteria, all of which must be there."""
    wanted = {metric: by for by in settings.by for metric in CRITERIA[by][0]}
    bench = Bench(wanted, settings.weights)
    for metric, by in wanted.items():
        if metric in bench.missing:
            raise UserError(f"{by}: {metric} is {bench.missing[metric]}; or curate without {by}")
    return bench


def _measured_by(settings: CurationSettings) -> dict[str, str]:
    """Metric -> what computes it; scores of something else are measured anew."""
    metrics = [metric for by in settings.by for metric in CRITERIA[by][0]]
    found = {metric: json.dumps(provenance(metric, settings.weights), sort_keys=True) for metric in metrics}
    return {**found, "landmarks": settings.landmarks}


def _scored(
    clip: Clip, folder: Path, bench: Bench, measured_by: Mapping[str, str], settings: CurationSettings
) -> Scores:
    """The stored scores of a clip, or those that are measured and stored now."""
    path = folder / f"{key_of(clip.name)}.json"
    stored = _stored(path)
    same = stored is not None and measured_by.items() <= stored.measured_by.items()
    if stored is not None and same and changed_file(clip, stored.files) is None:
        return stored
    found = attempt(lambda: _measure(clip, bench, measured_by, settings), clip)
    if isinstance(found, str):
        return Scores(fault=found)
    write_json(path, {"source": clip.source, **to_dict(found)})
    return found


def _stored(path: Path) -> Scores | None:
    try:
        content = json.loads(path.read_bytes())
        content.pop("source")
        return from_dict(Scores, content, path.name)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, AttributeError, UserError):
        return None  # It is measured again.


def _measure(clip: Clip, bench: Bench, measured_by: Mapping[str, str], settings: CurationSettings) -> Scores:
    before = stat_all(clip)
    timeline = scan_timeline(clip.path)
    voice = read_soundtrack(clip.path, timeline)
    landmarks = _landmarks(clip, timeline, settings)
    frames = min(len(landmarks), frames_of(len(voice)))
    landmarks, cuts = landmarks[:frames], SceneCuts()
    reading = bench.start(Subject(frames, voice=voice, landmarks=landmarks))
    for frame in islice(read_frames(clip.path), frames):
        cuts.update(frame)
        reading.update(Moment(frame))
    record = reading.result()
    values = {**record.values, "cuts": float(cuts.count), "face": face_size(landmarks)}
    missing = {name: str(absent) for name, absent in record.missing.items()}
    return Scores(values, missing, file_states(clip, before), dict(measured_by))


def _landmarks(clip: Clip, timeline: Timeline, settings: CurationSettings) -> np.ndarray:
    if clip.landmarks is not None:
        return load_landmarks(clip.landmarks, len(timeline), timeline)
    try:
        detector = make_detector(settings.landmarks, settings.landmark_model, settings.allow_download)
    except Exception as error:
        raise DetectorError(str(error)) from error
    with closing(detector):
        return detect_all(read_frames(clip.path), detector, aspect=probe_video(clip.path).aspect)


def face_size(landmarks: np.ndarray) -> float:
    """Mean of the larger side of the face's box, pixels; 0 where no frame has a face."""
    seen = np.isfinite(landmarks).all(axis=(1, 2))
    if not seen.any():
        return 0.0
    boxes = face_boxes(landmarks[seen])
    return float((boxes[:, 2:] - boxes[:, :2]).max(axis=1).mean())
