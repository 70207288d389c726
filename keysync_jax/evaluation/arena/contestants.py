"""The videos of an arena: of a folder of systems, or what an evaluation has dubbed; all encoded alike."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from keysync_jax.errors import UserError
from keysync_jax.evaluation.arena.votes import BROKEN
from keysync_jax.files import fingerprint, make_folder, sha256_once, sweep
from keysync_jax.media.video import probe_video, read_frames
from keysync_jax.media.writer import SUFFIXES, VideoWriter

LISTED = "videos.json"
"""Where an evaluation says which videos it has."""

SHOWN = ".arena"
"""Folder of the videos as they are shown."""

VIDEOS = (*SUFFIXES, ".webm")

QUALITY = 12

LONGEST = 250
"""Frames of a planted video: it is held in memory, to be played backwards."""

Contestants = Mapping[str, Mapping[str, Path]]
"""System -> clip -> video as it is shown."""


@dataclass(frozen=True)
class Found:
    """A dub and, where it is another file, the voice that it is heard with."""

    video: Path
    voice: Path | None = None


def find_contestants(folder: Path) -> dict[str, dict[str, Found]]:
    """The dubs `SYSTEM/CLIP.mp4` in a folder, or those of an evaluation.

    Raises:
      UserError: there are not two systems with a clip in common.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: is no folder")
    listed = folder / LISTED
    found = _of_evaluation(listed) if listed.is_file() else dict(_of_folder(folder))
    if BROKEN in found:
        raise UserError(f"{folder}: no system can be called {BROKEN}")
    counts = Counter(clip for clips in found.values() for clip in clips)
    if max(counts.values(), default=0) < 2:
        raise UserError(f"{folder}: has no two folders of systems with a video of the same name in both")
    return found


def _of_folder(folder: Path) -> Iterator[tuple[str, dict[str, Found]]]:
    for system in sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != "."):
        videos = sorted(p for p in system.iterdir() if p.suffix.lower() in VIDEOS and p.name[0] != ".")
        if videos:
            yield system.name, {video.stem: Found(video) for video in videos}


def _of_evaluation(listed: Path) -> dict[str, dict[str, Found]]:
    try:
        systems = json.loads(listed.read_bytes())
        return {
            name: {clip: Found(Path(one["video"]), Path(one["voice"])) for clip, one in clips.items()}
            for name, clips in systems.items()
        }
    except (ValueError, AttributeError, KeyError, TypeError):
        raise UserError(f"{listed}: is damaged; run keysync evaluate again") from None


def shown_alike(
    found: Mapping[str, Mapping[str, Found]], folder: Path, show_progress: bool = False
) -> Contestants:
    """The dubs encoded alike, once: no codec tells a system, and every browser plays them.

    Raises:
      UserError: one cannot be read.
    """
    place = folder / SHOWN
    make_folder(place)
    sweep(place)
    count = sum(len(clips) for clips in found.values())
    with tqdm(total=count, desc="videos", unit=" video", disable=not show_progress) as bar:
        shown: dict[str, dict[str, Path]] = {}
        for system, clips in found.items():
            shown[system] = {}
            for clip, one in clips.items():
                shown[system][clip] = _shown(one, place)
                bar.update()
    return shown


def _shown(one: Found, folder: Path) -> Path:
    hashes = [sha256_once(path) for path in (one.video, one.voice) if path is not None]
    path = folder / f"{fingerprint(hashes)[:16]}.mp4"
    if not path.is_file():
        info = probe_video(one.video)
        voice = one.voice or (one.video if info.has_audio else None)
        look = VideoWriter(
            path, info.width, info.height, voice, quality=QUALITY, colour=info.colour, aspect=info.aspect
        )
        with look as writer:
            for frame in read_frames(one.video):
                writer.write(np.asarray(frame))
    return path


def broken_video(video: Path) -> Path:
    """A shown video played backwards under its own voice, made once: the worse side of a planted pair."""
    path = video.with_name(f"{video.stem}-planted.mp4")
    if not path.is_file():
        info = probe_video(video)
        frames = [frame for frame, _ in zip(read_frames(video), range(LONGEST), strict=False)]
        voice = video if info.has_audio else None
        with VideoWriter(path, info.width, info.height, voice, quality=QUALITY, colour=info.colour) as writer:
            for frame in reversed(frames):
                writer.write(np.asarray(frame))
    return path
