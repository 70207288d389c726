"""The part of `prepare` that runs in worker processes: from a video to face crops, landmarks and sound.

No JAX here: a worker decodes and looks for faces, the parent owns the device.
"""

import errno
import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import TypeVar

import av
import cv2
import numpy as np

from keysync_jax.data.arrayrecord import RecordReader, RecordWriter
from keysync_jax.data.records import decode_frame
from keysync_jax.data.sources import Clip, FileState, stat_all, states_of
from keysync_jax.errors import UserError, machine_fault
from keysync_jax.files import sha256_of
from keysync_jax.media.audio import RATE, frames_of
from keysync_jax.media.crop import crop_frame, crop_track, landmarks_in_crop
from keysync_jax.media.detectors import make_detector
from keysync_jax.media.landmarks import Detector, bridge, detect_all, load_landmarks
from keysync_jax.media.soundtrack import read_soundtrack
from keysync_jax.media.timeline import FPS, Timeline
from keysync_jax.media.video import probe_video, read_frames, scan_timeline
from keysync_jax.processes import CrashedError, Workers

log = logging.getLogger(__name__)

# Quick; the crops are deleted within minutes.
_PNG_OPTIONS = (cv2.IMWRITE_PNG_COMPRESSION, 1)

CLIPS_AHEAD = 2
"""Clips that each worker may be ahead of the parent; their crops wait on disk."""

_PROBED_BYTES = 2**28
"""Memory that is asked for to see whether there is any; far more than the picture of a sound clip."""

Cut = TypeVar("Cut")


class DetectorError(UserError):
    """The landmark detector cannot be made, which is no clip's fault."""


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
      files: that the clip was made from, the video first.
    """

    landmarks: np.ndarray
    present: np.ndarray
    wave: np.ndarray
    files: tuple[FileState, ...]


def cut_faces(task: Task) -> Faces | str:
    """Faces of a clip, its crops written to `task.crops`; or why the clip cannot be used.

    Raises:
      DetectorError, OSError: as `attempt`.
    """
    return attempt(lambda: _cut(task), task.clip)


def attempt(cut: Callable[[], Cut], clip: Clip) -> Cut | str:
    """What `cut` makes of a clip, or why the clip cannot be used.

    Raises:
      OSError: the machine is to blame and not the clip. It survives pickling.
      DetectorError: so is the detector.
    """
    try:
        return cut()
    except Exception as error:
        reason = reason_of(error, clip)
        if not _from_ffmpeg(error):
            return reason
    # FFmpeg may take a disk that fails for the end of the file. Damage is there the second time, too.
    try:
        return cut()
    except Exception as error:
        return reason_of(error, clip)


def reason_of(error: Exception, clip: Clip) -> str:
    """Why a clip is skipped. What is not the clip's fault is raised, as `attempt` says."""
    fault = machine_fault(error) or _fault_with(clip)
    if fault is not None:
        raise OSError(fault.errno, fault.strerror, fault.filename or str(clip.path)) from error
    if isinstance(error, DetectorError):
        raise error
    if isinstance(error, UserError):
        return str(error)
    log.warning("%s: unexpected error", clip.path, exc_info=error)
    return f"{clip.path}: unexpected {type(error).__name__}: {error}"


def _fault_with(clip: Clip) -> OSError | None:
    """What the machine cannot do, asked itself: whether a clip's files can be read and there is memory.

    Errors of FFmpeg do not tell, since it says the same of damaged files.
    """
    try:
        for path in clip.inputs:
            if path.exists():
                sha256_of(path)
            elif not _holds_something(path.parent):
                return OSError(errno.ENOENT, "is gone with all of its folder; is its disk there?", str(path))
        np.empty(_PROBED_BYTES, np.uint8)
    except (UserError, OSError, MemoryError) as error:
        return machine_fault(error)
    return None


def _holds_something(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _from_ffmpeg(error: BaseException | None) -> bool:
    """Whether FFmpeg raised an exception, or the one that it was raised from."""
    return isinstance(error, av.error.FFmpegError) or (error is not None and _from_ffmpeg(error.__cause__))


def _cut(task: Task) -> Faces:
    clip = task.clip
    before = stat_all(clip)
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
    return Faces(cropped, present, wave[: frames * RATE // FPS], states_of(clip, before))


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
    with closing(_make_detector(task)) as detector:
        return detect_all(read_frames(clip.path), detector, aspect=aspect)


def _make_detector(task: Task) -> Detector:
    try:
        return make_detector(task.detector, task.detector_model)
    except Exception as error:
        raise DetectorError(str(error)) from error


def read_crops(path: Path) -> Iterator[np.ndarray]:
    """The crops that a worker wrote, uint8 RGB `[S, S, 3]` each."""
    reader = RecordReader(path)
    for number in range(len(reader)):
        yield decode_frame(np.frombuffer(reader.read([number])[0], np.uint8))


def cut_all(tasks: Sequence[Task], workers: int) -> Generator[tuple[Task, Faces | str]]:
    """Runs `cut_faces` on every task, in order; in this process for 0 workers.

    A clip that crashes its worker process twice is reported like any other bad clip.

    Raises:
      DetectorError, OSError: as `attempt`; a worker was killed, or could not start.
    """
    if workers == 0:
        for task in tasks:
            yield task, cut_faces(task)
        return
    with Workers(cut_faces, workers) as pool:
        for task, future in pool.in_order(tasks, workers * CLIPS_AHEAD):
            yield task, _result(task, future, pool)


def _result(
    task: Task, future: "Future[Faces | str]", pool: Workers[Task, Faces | str], again: bool = False
) -> Faces | str:
    try:
        return future.result()
    except CrashedError as error:
        if again:
            return f"{task.clip.path}: reading it {error}"
        ((_, second),) = pool.in_order([task], 1)
        return _result(task, second, pool, again=True)
    except OSError as error:
        raise OSError(error.errno, error.strerror, error.filename or str(task.clip.path)) from error
