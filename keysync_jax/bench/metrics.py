"""What the metrics cost: seconds per second of video, and memory, each measure in a process of its own.

Every clip stands as a dub of itself: its own frames are output, source, truth and speaker. What a metric
costs does not depend on what it finds.
"""

import math
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from keysync_jax.bench.measure import Timing
from keysync_jax.bench.report import against
from keysync_jax.convert.scorers import NETWORK, ScorerKind, scorer_shapes
from keysync_jax.errors import UserError
from keysync_jax.evaluation.cliplist import ListedClip, read_clips
from keysync_jax.files import temporary_folder
from keysync_jax.media.audio import RATE, read_audio
from keysync_jax.media.crop import crop_track
from keysync_jax.media.landmarks import load_landmarks
from keysync_jax.media.timeline import FPS
from keysync_jax.media.video import count_frames, probe_video, read_frames
from keysync_jax.metrics.catalogue import MEASURES, METRICS, WEIGHTS
from keysync_jax.metrics.meter import Moment, Subject, Unavailable
from keysync_jax.metrics.registry import Bench, unavailable
from keysync_jax.pipeline.phases import peak_bytes
from keysync_jax.processes import CrashedError, Workers
from keysync_jax.synthetic.write import SynthSettings, synth
from keysync_jax.tensorfile import write_tensors

SEED = 4242
"""World of the clips where none are given."""

NOTHING = "reading the frames"
"""The row of no metric: what every other one has in it too."""

_RANDOM: dict[str, ScorerKind] = {"syncnet": "syncnet", "light_asd": "light-asd", "lip_reader": "lip-reader"}
"""Networks of ours that random weights can stand for, by their name in `WEIGHTS`."""


@dataclass(frozen=True)
class Judging:
    """One row of the table: a measure, which may give several metrics at once.

    Attributes:
      name: the first of its metrics.
      note: all that its time depends on beside the machine; other notes are not compared.
      metrics: that it gives.
      timing: wall seconds per second of video, of a clip; the first clip, which compiles, is not in it.
      cpu: CPU seconds per second of video, the median of the same clips.
      first_seconds: of the first clip, with opening and compiling.
      host_bytes: peak of the process after the first clip, the tenth and the last.
      fault: why there are no figures.
      random: whether random weights stood for the network's.
    """

    name: str
    note: str
    metrics: tuple[str, ...] = ()
    timing: Timing | None = None
    cpu: float = 0.0
    first_seconds: float = 0.0
    host_bytes: tuple[int, ...] = ()
    fault: str = ""
    random: bool = False


@dataclass(frozen=True)
class _Task:
    measure: str
    clip: ListedClip
    weights: Path


@dataclass(frozen=True)
class _Cost:
    """Of one clip: seconds of video, of the wall and of the CPU, and the peak of the process after it."""

    video: float
    wall: float
    cpu: float
    peak: int


def measure_metrics(
    names: Sequence[str], clips: Sequence[ListedClip], weights: Path | None
) -> Iterator[Judging]:
    """Measures what computes some metrics, over the same clips; a row for each, that of no metric last.

    A row comes as soon as it is measured.

    Args:
      names: of metrics; the time of a measure is the same whichever of its metrics are named.
      clips: with landmarks and a voice each.
      weights: folder of the weights. For a network of ours without a file there random ones stand.

    Raises:
      UserError: there is no such metric, or a clip cannot be read.
    """
    if wrong := [name for name in names if name not in METRICS]:
        raise UserError(f"there is no metric named {wrong[0]}; docs/metrics.md lists them")
    if bare := [clip.name for clip in clips if clip.landmarks is None]:
        raise UserError(
            f"{bare[0]}: has no landmarks beside it; metrics are measured on clips that have them"
        )
    asked = list(dict.fromkeys(METRICS[name].measure for name in names))
    with temporary_folder("keysync-bench-metrics") as folder:
        random = _fill(folder, weights, {name for measure in asked for name in MEASURES[measure].weights})
        for name in [*asked, ""]:
            yield _measured(name, clips, folder, random, weights)


def synthetic_clips(count: int, seconds: float, folder: Path) -> list[ListedClip]:
    """Clips of the synthetic world, 256 x 256, drawn into a folder; those that are there stay."""
    synth(folder, SynthSettings(count, seconds, SEED), show_progress=True)
    return read_clips(folder)[:count]


def _fill(folder: Path, weights: Path | None, names: Collection[str]) -> frozenset[str]:
    """Links files of weights into a folder, random ones for those of ours that lack; the latter's names."""
    random = set()
    for name in names:
        needed = WEIGHTS[name]
        given = None if weights is None else weights / needed.file
        if given is not None and given.exists():
            (folder / needed.file).symlink_to(given.absolute())
        elif name in _RANDOM:
            _, wanted = scorer_shapes(_RANDOM[name])
            rng = np.random.default_rng(0)
            tensors = {path: _drawn(rng, path, shape) for path, shape in wanted.items()}
            write_tensors(folder / needed.file, tensors, {NETWORK: _RANDOM[name]})
            random.add(name)
    return frozenset(random)


def _drawn(rng: np.random.Generator, path: str, shape: tuple[int, ...]) -> np.ndarray:
    """Kernels of variance 1 / fan-in, scales and variances of 1: numbers stay of an ordinary size."""
    if len(shape) < 2:
        return np.full(shape, 0.0 if path.rpartition(".")[2] in ("bias", "mean") else 1.0, np.float32)
    fan_in = math.prod(shape[:-1])
    return rng.standard_normal(shape, np.float32) / np.float32(math.sqrt(fan_in))


def _measured(
    measure: str, clips: Sequence[ListedClip], folder: Path, random: frozenset[str], weights: Path | None
) -> Judging:
    """A row.

    Args:
      folder: of the weights, with what stands for those that lack.
      weights: the user's folder, for the sentence on what lacks.
    """
    metrics = _names(measure)
    name = metrics[0] if metrics else NOTHING
    video = probe_video(clips[0].video)
    note = f"{len(clips)} clips, {video.width} x {video.height}"
    if metrics and unavailable(name, folder) is not None:
        return Judging(name, note, metrics, fault=str(unavailable(name, weights)))
    found: list[_Cost] = []
    with ExitStack() as stack:
        workers = stack.enter_context(Workers(_cost, 1))
        for clip in stack.enter_context(tqdm(clips, desc=name, unit=" clip", leave=False)):
            try:
                cost = workers.submit(_Task(measure, clip, folder)).result()
            except CrashedError as error:
                return Judging(name, note, metrics, fault=str(error))
            if isinstance(cost, Unavailable):
                return Judging(name, note, metrics, fault=str(cost))
            found.append(cost)
    later = found[1:] or found
    return Judging(
        name,
        note,
        metrics,
        Timing.of([cost.wall / cost.video for cost in later]),
        float(np.median([cost.cpu / cost.video for cost in later])),
        found[0].wall,
        tuple(found[i].peak for i in sorted({0, min(9, len(found) - 1), len(found) - 1})),
        random=bool(measure and random & set(MEASURES[measure].weights)),
    )


def _names(measure: str) -> tuple[str, ...]:
    """What a measure gives: metrics of clips before those of sets, which are made of its series."""
    made = [metric for metric in METRICS.values() if metric.measure == measure]
    return tuple(metric.name for metric in sorted(made, key=lambda metric: bool(metric.runs)))


def _cost(task: _Task) -> _Cost | Unavailable:
    """Reads a clip with a measure open, in the process that is the measure's own."""
    wall, cpu = time.perf_counter(), time.process_time()
    bench = _opened(task.measure, task.weights)
    if bench is not None and bench.missing:
        return next(iter(bench.missing.values()))
    subject = _subject(task.clip)
    reading = None if bench is None else bench.start(subject)
    boxes = subject.boxes
    assert boxes is not None  # `_subject` makes them.
    for frame, box in islice(zip(read_frames(task.clip.video), boxes, strict=False), subject.frames):
        if reading is not None:
            reading.update(Moment(frame, frame, frame, _mask(frame, box), frame))
    if reading is not None:
        record = reading.result()
        if not (record.values or record.series):
            return next(iter(record.missing.values()))
    seconds = (time.perf_counter() - wall, time.process_time() - cpu)
    return _Cost(subject.frames / FPS, *seconds, peak_bytes())


@lru_cache(maxsize=1)
def _opened(measure: str, weights: Path) -> Bench | None:
    """The measure of this process; None for the one that only reads."""
    return Bench(_names(measure)[:1], weights) if measure else None


def _subject(clip: ListedClip) -> Subject:
    assert clip.landmarks is not None  # `measure_metrics` says so.
    video, frames = probe_video(clip.video), count_frames(clip.video)
    points = load_landmarks(clip.landmarks, frames)
    return Subject(
        frames=frames,
        streams=frozenset({"source", "truth", "mask", "speaker"}),
        voice=read_audio(clip.voice)[: frames * RATE // FPS],
        landmarks=points,
        truth_landmarks=points,
        source_landmarks=points,
        speaker_landmarks=points,
        boxes=crop_track(points, np.ones(frames, bool), video.height, video.width),
    )


def _mask(frame: np.ndarray, box: np.ndarray) -> np.ndarray:
    """The lower half of the face's square: as much of it as a system repaints."""
    mask = np.zeros(frame.shape[:2], bool)
    mask[(box[1] + box[3]) // 2 : box[3], box[0] : box[2]] = True
    return mask


def head_line(before: dict[str, float] | None = None) -> str:
    """What is above the rows.

    Args:
      before: median seconds of an earlier report by the row's name.
    """
    line = f"{'':<20}{'s/s':>9}{'spread':>17}{'CPU s/s':>9}{'first s':>9}{'MiB':>18}"
    return line + ("" if before is None else f"{'before s':>10}{'ratio':>7}")


def row_line(row: Judging, before: dict[str, float] | None = None) -> str:
    """A row of the table."""
    if row.timing is None:
        return f"{row.name:<20}{row.fault}"
    t, peaks = row.timing, ", ".join(f"{peak / 2**20:.0f}" for peak in row.host_bytes)
    line = f"{row.name:<20}{t.median:>9.3f}{f'{t.lowest:.3f}-{t.highest:.3f}':>17}"
    line += f"{row.cpu:>9.3f}{row.first_seconds:>9.1f}{peaks:>18}"
    return line + ("" if before is None else against(before.get(row.name), t.median))


def foot_lines(rows: Sequence[Judging]) -> str:
    """What is below the rows: the clips, what else a measure gives, and where random weights stood."""
    lines = [f"{rows[0].note}; s per s of video; MiB after the first, the tenth, the last clip"]
    lines += [f"{row.name}: also {', '.join(row.metrics[1:])}" for row in rows if row.metrics[1:]]
    stand_ins = ", ".join(row.name for row in rows if row.random)
    return "\n".join([*lines, *([f"random weights: {stand_ins}"] if stand_ins else [])])
