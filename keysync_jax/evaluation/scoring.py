"""Scoring one dub: all metrics that its clip allows, in one pass over its frames, kept on disk."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import numpy as np

from keysync_jax.evaluation.inputs import Inputs, Prepared
from keysync_jax.evaluation.protocol import Cell
from keysync_jax.evaluation.runs import Run
from keysync_jax.evaluation.world import WorldMeter
from keysync_jax.files import fingerprint, replacing, sha256_once, write_json
from keysync_jax.media.crop import crop_track
from keysync_jax.media.landmarks import save_landmarks
from keysync_jax.media.video import read_frames
from keysync_jax.metrics.meter import Moment, Need, Record, Subject
from keysync_jax.metrics.mouth import MouthReader
from keysync_jax.metrics.registry import METRICS, Bench, provenance
from keysync_jax.pipeline.environment import environment

DIGITS = 9
"""Significant digits that are kept of a number."""

BRIDGE = 28
"""Landmark at the upper edge of what systems repaint."""


@dataclass(frozen=True)
class Scored:
    """What is kept of a dub; JSON can hold it.

    Attributes:
      values: metric -> number, which may be infinite.
      missing: metric -> why it has none.
      series: name -> numbers over time.
      features: `.npz` file of what distances of sets are made from, arrays `[N, D]` by name; None: nothing.
    """

    values: Mapping[str, float] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)
    series: Mapping[str, Sequence[float]] = field(default_factory=dict)
    features: Path | None = None

    def record(self) -> Record:
        """As the registry's distances of sets take it; the features are read."""
        if self.features is None:
            return Record(self.values)
        with np.load(self.features, allow_pickle=False) as arrays:
            return Record(self.values, {}, dict(arrays))


class Scorer:
    """The metrics, opened once for all clips, and where scores are kept.

    Args:
      folder: of scores.
      detect: finds landmarks in real videos; None where it cannot.
      detector: what they depend on, of JSON's types.
      weights: folder of the weights, for what scores depend on.
    """

    def __init__(
        self,
        folder: Path,
        bench: Bench,
        detect: Callable[[Path], np.ndarray | None],
        detector: Any,
        weights: Path | None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.bench, self._detect = folder, bench, detect
        self._reader: MouthReader | None = None
        self._needs: set[Need] = {need for name in bench.metrics for need in METRICS[name].needs}
        self._fixed = {
            "code": environment("metrics", "evaluation.scoring", "evaluation.world", "synthetic"),
            "metrics": {name: provenance(name, weights) for name in bench.metrics},
            "detector": detector,
        }

    def score(self, run: Run, cell: Cell, name: str, inputs: Inputs) -> Scored:
        """The scores of a dub: taken where they are there, else computed."""
        assert run.video is not None
        voiced, clip = inputs.voiced(name, cell.setup), inputs[name]
        depends = {
            "dub": sha256_once(run.video),
            "clips": [_digests(inputs[n]) for n in (name, voiced.scored)],
            "frames": min(run.frames, voiced.frames),
            "setup": cell.setup,
            **self._fixed,
        }
        path = self.folder / f"{fingerprint(depends)[:16]}.json"
        features = path.with_suffix(".npz")
        if path.is_file():
            kept = Scored(**_infinite(json.loads(path.read_bytes())))
            return replace(kept, features=features) if features.is_file() else kept
        scored, arrays = self._scored(run.video, cell, clip, inputs[voiced.scored], depends["frames"])
        if arrays:
            with replacing(features) as partial, partial.open("wb") as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]
        # Last, because with it the scores are complete.
        write_json(path, _finite(scored))
        return replace(scored, features=features) if arrays else scored

    def _scored(
        self, video: Path, cell: Cell, clip: Prepared, driving: Prepared, frames: int
    ) -> tuple[Scored, dict[str, np.ndarray]]:
        """The scores of a dub, and its features by name."""
        subject = self._subject(video, cell, clip, driving, frames)
        reading, world = self.bench.start(subject), self._world(clip, driving, frames)
        for moment in islice(_moments(video, subject, clip, driving), frames):
            reading.update(moment)
            if world is not None:
                world.update(moment)
        record = reading.result()
        values, series = dict(record.values), dict(record.series)
        missing = {metric: absent.reason for metric, absent in record.missing.items()}
        if world is not None:
            for key, found in world.result().items():
                if isinstance(found, np.ndarray):
                    series[key] = found
                elif isinstance(found, float):
                    values[key] = found
        scored = Scored(
            {name: _rounded(value) for name, value in values.items()},
            {name: why for name, why in missing.items() if name not in values},
            {name: [_rounded(float(x)) for x in found] for name, found in series.items() if found.ndim == 1},
        )
        return scored, {name: found for name, found in series.items() if found.ndim > 1}

    def _subject(self, video: Path, cell: Cell, clip: Prepared, driving: Prepared, frames: int) -> Subject:
        """What is known of the clip before its frames are read."""
        known, streams = clip.landmarks, {"source"}
        boxes = None
        if known is not None:
            width, height = clip.size
            streams.add("mask")
            boxes = crop_track(known, np.ones(len(known), bool), height, width)[:frames]
        if cell.setup == "AM":
            streams.add("truth")
        # Silence has no speaker who would show the right mouth.
        speaker = driving.landmarks if "speaker" in self._needs and cell.setup != "SI" else None
        if speaker is not None:
            streams.add("speaker")
        found = None if clip.truth is not None else self._landmarks(video, frames)
        compared = clip.detected if found is not None and cell.setup == "AM" else None
        return Subject(
            frames=frames,
            streams=frozenset(streams),  # type: ignore[arg-type]
            voice=driving.wave[: frames * 640] if len(driving.wave) else None,
            landmarks=found,
            truth_landmarks=None if compared is None else compared[:frames],
            source_landmarks=None if known is None else known[:frames],
            speaker_landmarks=None if speaker is None else speaker[:frames],
            boxes=boxes,
        )

    def _landmarks(self, video: Path, frames: int) -> np.ndarray | None:
        """Landmarks of a dub, kept by its hash."""
        kept = self.folder / f"{fingerprint([sha256_once(video), self._fixed['detector']])[:16]}.npy"
        if kept.is_file():
            return np.asarray(np.load(kept))[:frames]
        found = self._detect(video)
        if found is not None:
            save_landmarks(kept, found)
        return None if found is None else found[:frames]

    def _world(self, clip: Prepared, driving: Prepared, frames: int) -> WorldMeter | None:
        """The reader of the synthetic world, for a clip of it."""
        if clip.truth is None or driving.truth is None:
            return None
        self._reader = self._reader or MouthReader.load()
        return WorldMeter(self._reader, clip.truth, driving.truth, frames)


def _moments(video: Path, subject: Subject, clip: Prepared, driving: Prepared) -> Iterator[Moment]:
    """The frames of a dub with those that belong to them."""
    speaking: Iterable[np.ndarray | None] = (
        read_frames(driving.video) if "speaker" in subject.streams else repeat(None)
    )
    masks: Iterable[np.ndarray | None] = repeat(None)
    if clip.landmarks is not None and subject.boxes is not None:
        masks = _masks(clip.landmarks, subject.boxes, clip.size)
    each = zip(read_frames(video), read_frames(clip.video), masks, speaking, strict=False)
    for frame, source, mask, speaker in each:
        truth = source if "truth" in subject.streams else None
        yield Moment(frame, source, truth, mask, speaker)


def _masks(landmarks: np.ndarray, boxes: np.ndarray, size: tuple[int, int]) -> Iterator[np.ndarray]:
    """What a system repaints, as the paper's box mask has it, from the nose's bridge down: bool `[H, W]`."""
    width, height = size
    for points, box in zip(landmarks, boxes, strict=False):
        mask = np.zeros((height, width), bool)
        left, right = np.clip([points[:, 0].min(), points[:, 0].max() + 1], 0, width).astype(int)
        mask[max(int(points[BRIDGE, 1]), 0) : int(box[3]), left:right] = True
        yield mask


def _digests(clip: Prepared) -> list[str | None]:
    """What of a clip its scores depend on."""
    files = (clip.clip.video, clip.clip.voice, clip.clip.landmarks, clip.clip.truth)
    return [None if path is None else sha256_once(path) for path in files]


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def _finite(scored: Scored) -> dict[str, Any]:
    """JSON has no infinity."""
    values = {name: x if math.isfinite(x) else str(x) for name, x in scored.values.items()}
    series = {name: [x if math.isfinite(x) else None for x in found] for name, found in scored.series.items()}
    return {"values": values, "missing": dict(scored.missing), "series": series}


def _infinite(kept: dict[str, Any]) -> dict[str, Any]:
    kept["values"] = {name: float(x) for name, x in kept["values"].items()}
    kept["series"] = {
        name: [math.nan if x is None else x for x in found] for name, found in kept["series"].items()
    }
    return kept
