"""Clips to play: what all systems made of one run in one video, with the voice that they were given."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np

from keysync_jax.evaluation.evaluate import Evaluation
from keysync_jax.evaluation.inputs import Prepared
from keysync_jax.evaluation.protocol import Setup
from keysync_jax.files import fingerprint, make_folder, sha256_once
from keysync_jax.media.crop import crop_frame, crop_track
from keysync_jax.media.video import read_frames
from keysync_jax.media.writer import VideoWriter

SIDE, QUALITY = 160, 26
"""Of a face, pixels; CRF."""

MOST_BYTES = 10 * 10**6
"""Of all clips in the page; the others are files beside it."""


@dataclass(frozen=True)
class SideBySide:
    """One run of one clip.

    Attributes:
      systems: from left to right.
      file: the video.
      shown: whether the page holds it.
    """

    clip: str
    cell: str
    systems: tuple[str, ...]
    file: Path
    shown: bool


def side_by_side(evaluation: Evaluation, folder: Path, number: int) -> list[SideBySide]:
    """The videos of the first clips that have dubs; those of the same dubs that are there are taken.

    Args:
      folder: is made where there is anything to write.
      number: of clips.
    """
    found: list[SideBySide] = []
    space = MOST_BYTES
    for clip, cell, dubs in _runs(evaluation, number):
        make_folder(folder)
        setup: Setup = next(s for s in get_args(Setup) if cell.startswith(s))
        voice = evaluation.inputs.voiced(clip, setup).audio
        shown = fingerprint([SIDE, QUALITY, [sha256_once(one) for one in (voice, *dubs.values())]])
        file = folder / f"{clip}.{cell}.{shown[:8]}.mp4"
        if not file.is_file():
            _write(file, evaluation.inputs[clip], voice, list(dubs.values()))
        space -= file.stat().st_size
        found.append(SideBySide(clip, cell, tuple(dubs), file, space >= 0))
    return found


def _runs(evaluation: Evaluation, number: int) -> Iterator[tuple[str, str, dict[str, Path]]]:
    """(clip, run, system -> its video) of the first clips that have any."""
    runs: dict[str, dict[str, dict[str, Path]]] = {}
    for (system, cell, clip), video in evaluation.videos.items():
        runs.setdefault(clip, {}).setdefault(cell, {})[system] = video
    dubbed = [clip for clip in evaluation.content["clips"] if clip in runs]
    for clip in dubbed[:number]:
        for cell, dubs in runs[clip].items():
            yield clip, cell, dubs


def _write(file: Path, prepared: Prepared, voice: Path, videos: list[Path]) -> None:
    width, height = prepared.size
    boxes = np.tile([0, 0, width, height], (prepared.frames, 1))
    if prepared.landmarks is not None:
        boxes = crop_track(prepared.landmarks, np.ones(prepared.frames, bool), height, width)
    with VideoWriter(file, SIDE * len(videos), SIDE, voice, quality=QUALITY) as writer:
        readers = [read_frames(video) for video in videos]
        for box, *frames in zip(boxes, *readers, strict=False):
            writer.write(np.hstack([crop_frame(frame, box, SIDE) for frame in frames]))
