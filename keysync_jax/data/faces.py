"""The part of `prepare` that runs in worker processes: from a video to face crops, landmarks and sound.

No JAX here: a worker decodes and looks for faces, the parent owns the device.
"""

import errno
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np

from keysync_jax.data.arrayrecord import RecordReader, RecordWriter
from keysync_jax.data.records import decode_frame
from keysync_jax.data.sources import Clip
from keysync_jax.errors import UserError
from keysync_jax.files import sha256_of
from keysync_jax.media.audio import RATE, frames_of
from keysync_jax.media.crop import crop_frame, crop_track, landmarks_in_crop
from keysync_jax.media.detectors import make_detector
from keysync_jax.media.landmarks import bridge, detect_all, load_landmarks
from keysync_jax.media.soundtrack import read_soundtrack
from keysync_jax.media.timeline import FPS, Timeline
from keysync_jax.media.video import probe_video, read_frames, scan_timeline

log = logging.getLogger(__name__)

# Quick; the crops are deleted within minutes.
_PNG_OPTIONS = (cv2.IMWRITE_PNG_COMPRESSION, 1)

CLIPS_AHEAD = 2
"""Clips that each worker may be ahead of the parent; their crops wait on disk."""


@dataclass(frozen=True)
class Task:
    """One clip for a worker.

    Attributes:
      crops: file that the crops are written to, one lossless PNG a record.
      size: side of the crop.
      shortest: fewest frames of a clip.
      detector, detector_model: of clips that have no landmarks of their own.
    """

    clip: Clip
    crops: Path
    size: int
    shortest: int
    detector: str
    detector_model: Path | None


@dataclass(frozen=True)
class Faces:
    """What a worker found in a clip, its crops apart.

    Attributes:
      landmarks: in crop pixels, float32 `[T, 68, 2]`.
      present: whether each frame has a face, bool `[T]`.
      wave: sound of these frames, float32 mono at 16 kHz.
      sha256: of the video.
    """

    landmarks: np.ndarray
    present: np.ndarray
    wave: np.ndarray
    sha256: str


def cut_faces(task: Task) -> Faces | str:
    """Faces of a clip, its crops written to `task.crops`; or why the clip cannot be used."""
    try:
        return _cut(task)
    except Exception as error:
        return reason_of(error, task.clip)


def reason_of(error: Exception, clip: Clip) -> str:
    """Why a clip is skipped; an error that is not the clip's fault (a full disk) is raised again."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, MemoryError) or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        raise error
    log.warning("%s: unexpected error", clip.path, exc_info=error)
    return f"{clip.path}: unexpected {type(error).__name__}: {error}"


def _cut(task: Task) -> Faces:
    clip = task.clip
    info = probe_video(clip.path)
    timeline = scan_timeline(clip.path)
    wave = _sound(clip.path, timeline)
    found = _landmarks(task, timeline, info.aspect)
    frames = min(len(found), frames_of(len(wave)))
    if frames < task.shortest:
        raise UserError(f"{clip.path}: has {frames} frames with sound, a sample needs {task.shortest}")
    landmarks, present = bridge(found[:frames])
    boxes = crop_track(landmarks, present, info.height, info.width, info.aspect)
    with RecordWriter(task.crops) as writer:
        for frame, box in zip(islice(read_frames(clip.path), frames), boxes, strict=True):
            crop = crop_frame(frame, box, task.size)
            done, png = cv2.imencode(".png", crop[..., ::-1], _PNG_OPTIONS)
            if not done:
                raise ValueError("a crop cannot be compressed")
            writer.write(png.tobytes())
    cropped = landmarks_in_crop(landmarks, boxes, task.size)
    return Faces(cropped, present, wave[: frames * RATE // FPS], sha256_of(clip.path))


def _sound(path: Path, timeline: Timeline) -> np.ndarray:
    """The clip's sound from its first frame on: float32 mono `[samples]` at 16 kHz."""
    wave = read_soundtrack(path, timeline)
    if not wave.any():
        raise UserError(f"{path}: its sound is silent throughout")
    return wave


def _landmarks(task: Task, timeline: Timeline, aspect: Fraction) -> np.ndarray:
    """Landmarks of every frame in its own pixels, NaN without a face: `[T, 68, 2]`."""
    clip = task.clip
    if clip.landmarks is not None:
        return load_landmarks(clip.landmarks, len(timeline), timeline)
    # A detector follows one face, so each clip gets its own.
    with closing(make_detector(task.detector, task.detector_model)) as detector:
        return detect_all(read_frames(clip.path), detector, aspect=aspect)


def read_crops(path: Path) -> Iterator[np.ndarray]:
    """The crops that a worker wrote, uint8 RGB `[S, S, 3]` each."""
    reader = RecordReader(path)
    for number in range(len(reader)):
        yield decode_frame(np.frombuffer(reader.read([number])[0], np.uint8))


def cut_all(tasks: Sequence[Task], workers: int) -> Iterator[tuple[Task, Faces | str]]:
    """Runs `cut_faces` on every task, in order; in this process for 0 workers.

    A clip that takes its worker process down (a decoder that crashes, memory) is reported like any other
    bad clip.
    """
    if workers == 0:
        for task in tasks:
            yield task, cut_faces(task)
        return
    waiting = deque(tasks)
    while waiting:
        try:
            yield from _through_pool(waiting, workers)
        except BrokenProcessPool:
            # Whichever clip did it is among the first ones: they go again, each with a process of its own.
            for task in [waiting.popleft() for _ in range(min(len(waiting), workers * CLIPS_AHEAD))]:
                yield task, _cut_alone(task)


def _through_pool(waiting: deque[Task], workers: int) -> Iterator[tuple[Task, Faces | str]]:
    """Takes a task off `waiting` when its result is there."""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        running: deque[Future[Faces | str]] = deque()
        try:
            while waiting:
                for task in islice(waiting, len(running), workers * CLIPS_AHEAD):
                    running.append(pool.submit(cut_faces, task))
                result = running[0].result()
                running.popleft()
                yield waiting.popleft(), result
        finally:
            pool.shutdown(cancel_futures=True)


def _cut_alone(task: Task) -> Faces | str:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(cut_faces, task).result()
        except BrokenProcessPool:
            return f"{task.clip.path}: reading it ended its process (out of memory, or a crash in a decoder)"
