"""The part of `prepare` that runs in worker processes: from a video to face crops, landmarks and sound.

No JAX here: a worker decodes and looks for faces, the parent owns the device.
"""

import errno
import logging
import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import TypeVar

import av
import numpy as np

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

CLIPS_AHEAD = 2
"""Clips that each worker may be ahead of the parent; their crops wait in memory, or on disk."""

SHARED_BYTES = 2**31
"""Memory that the crops of all clips together may take which wait for the parent."""

_PROBED_BYTES = 2**28
"""Memory that is asked for to see whether there is any; far more than the picture of a sound clip."""

Cut = TypeVar("Cut")


class DetectorError(UserError):
    """The landmark detector cannot be made, which is no clip's fault."""


@dataclass(frozen=True)
class Task:
    """One clip for a worker.

    Attributes:
      crops: file that the crops are written to, their bytes one after another.
      memory: another such file, in memory, that is taken instead where `memory_bytes` are enough.
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
    memory: Path | None = None
    memory_bytes: int = 0


@dataclass(frozen=True)
class Faces:
    """What a worker found in a clip, its crops apart.

    Attributes:
      crops: the file where they are.
      landmarks: in crop pixels, float32 `[T, 68, 2]`.
      present: whether each frame has a face, bool `[T]`.
      wave: sound of these frames, float32 mono at 16 kHz.
      files: that the clip was made from, the video first.
    """

    landmarks: np.ndarray
    present: np.ndarray
    wave: np.ndarray
    files: tuple[FileState, ...]
    crops: Path


def cut_faces(task: Task) -> Faces | str:
    """Faces of a clip, its crops written to a file; or why the clip cannot be used.

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
    crops = task.crops
    if task.memory is not None and frames * _crop_bytes(task.size) <= task.memory_bytes:
        crops = task.memory
    with crops.open("wb") as file:
        for frame, box in zip(islice(read_frames(clip.path), frames), boxes, strict=True):
            file.write(np.ascontiguousarray(crop_frame(frame, box, task.size)).data)
    cropped = landmarks_in_crop(landmarks, boxes, task.size)
    return Faces(cropped, present, wave[: frames * RATE // FPS], states_of(clip, before), crops)


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


def read_crops(faces: Faces, size: int) -> Iterator[np.ndarray]:
    """The crops that a worker wrote, uint8 RGB `[size, size, 3]` each.

    Raises:
      OSError: they are not there any more.
    """
    with faces.crops.open("rb") as file:
        for _ in faces.present:
            data = file.read(_crop_bytes(size))
            if len(data) != _crop_bytes(size):
                raise OSError(errno.EIO, "has lost crops that were written", str(faces.crops))
            yield np.frombuffer(data, np.uint8).reshape(size, size, 3)


def _crop_bytes(size: int) -> int:
    return 3 * size * size


@contextmanager
def in_memory(task: Task, bytes_each: int) -> Iterator[Task]:
    """The task with a file in memory for its crops, which ends with the block or with this process.

    Where the system has no such files the task stays as it is, and its crops go to disk. Its worker reaches
    the file through this process's descriptor, so nothing of it is left behind however either of them ends.
    """
    if not hasattr(os, "memfd_create"):
        yield task
        return
    held = os.memfd_create("crops")
    try:
        yield replace(task, memory=Path(f"/proc/{os.getpid()}/fd/{held}"), memory_bytes=bytes_each)
    finally:
        os.close(held)


def cut_all(tasks: Sequence[Task], workers: int) -> Generator[tuple[Task, Faces | str]]:
    """Runs `cut_faces` on every task, in order; in this process for 0 workers.

    A clip that crashes its worker process twice is reported like any other bad clip.

    The crops of a clip are there until the next one is asked for.

    Raises:
      DetectorError, OSError: as `attempt`; a worker was killed, or could not start.
    """
    ahead = max(workers * CLIPS_AHEAD, 1)
    with ExitStack() as stack:
        files = deque[ExitStack]()

        def prepared() -> Iterator[Task]:
            for task in tasks:
                files.append(stack.enter_context(ExitStack()))
                yield files[-1].enter_context(in_memory(task, SHARED_BYTES // (ahead + 1)))

        def done(task: Task, found: Faces | str) -> Iterator[tuple[Task, Faces | str]]:
            try:
                yield task, found
            finally:
                files.popleft().close()
                task.crops.unlink(missing_ok=True)

        if workers == 0:
            for task in prepared():
                yield from done(task, cut_faces(task))
            return
        pool = stack.enter_context(Workers(cut_faces, workers))
        for task, future in pool.in_order(prepared(), ahead):
            yield from done(task, _result(task, future, pool))


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
