"""The videos of an arena: a folder of systems, or what an evaluation has dubbed with foreign voices."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from keysync_jax.errors import UserError
from keysync_jax.evaluation.arena.votes import BROKEN
from keysync_jax.files import make_folder
from keysync_jax.media.video import probe_video, read_frames
from keysync_jax.media.writer import SUFFIXES, VideoWriter

VIDEOS = (*SUFFIXES, ".webm")
LONGEST = 250
"""Frames of a planted video: it is held in memory, to be played backwards."""

Contestants = Mapping[str, Mapping[str, Path]]
"""System -> clip -> video."""


def find_contestants(folder: Path) -> dict[str, dict[str, Path]]:
    """The videos `SYSTEM/CLIP.mp4` in a folder, or of an evaluation's report.

    Raises:
      UserError: there are not two systems with a clip in common.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: is no folder")
    listed = folder / "videos.json"
    found = _of_evaluation(folder, listed) if listed.is_file() else dict(_of_folder(folder))
    if BROKEN in found:
        raise UserError(f"{folder}: no system can be called {BROKEN}")
    counts: dict[str, int] = {}
    for clips in found.values():
        for clip in clips:
            counts[clip] = counts.get(clip, 0) + 1
    if max(counts.values(), default=0) < 2:
        raise UserError(f"{folder}: has no two folders of systems with a video of the same name in both")
    return found


def _of_folder(folder: Path) -> Iterator[tuple[str, dict[str, Path]]]:
    for system in sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != "."):
        videos = sorted(p for p in system.iterdir() if p.suffix.lower() in VIDEOS and p.name[0] != ".")
        if videos:
            yield system.name, {video.stem: video for video in videos}


def _of_evaluation(folder: Path, listed: Path) -> dict[str, dict[str, Path]]:
    try:
        systems = json.loads(listed.read_bytes())
        return {
            name: {clip: folder / path for clip, path in clips.items()} for name, clips in systems.items()
        }
    except (ValueError, AttributeError, TypeError):
        raise UserError(f"{listed}: is damaged; run keysync evaluate again") from None


def broken_video(video: Path, folder: Path, name: str) -> Path:
    """A video played backwards under its own voice, made once: the worse side of a planted pair."""
    path = folder / f"{name}.mp4"
    if not path.is_file():
        make_folder(folder)
        info = probe_video(video)
        frames = [frame for frame, _ in zip(read_frames(video), range(LONGEST), strict=False)]
        with VideoWriter(
            path,
            info.width,
            info.height,
            video if info.has_audio else None,
            colour=info.colour,
            aspect=info.aspect,
        ) as writer:
            for frame in reversed(frames):
                writer.write(np.asarray(frame))
    return path
