"""What the systems are given: videos at 25 fps, voices of the right length, a picture as the reference.

All of it lies in a folder and is made once.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import cv2
import numpy as np

from keysync_jax.errors import UserError
from keysync_jax.evaluation.cliplist import ListedClip
from keysync_jax.evaluation.protocol import Setup
from keysync_jax.files import make_folder, replacing, sha256_once
from keysync_jax.media.audio import RATE, frames_of, read_audio
from keysync_jax.media.landmarks import bridge, load_landmarks, save_landmarks
from keysync_jax.media.timeline import FPS
from keysync_jax.media.video import probe_video, read_frames, scan_timeline
from keysync_jax.media.writer import VideoWriter
from keysync_jax.synthetic.world import write_wave

SAMPLES = RATE // FPS
"""Of a frame."""

NEAR_LOSSLESS = 8
"""Quality of a video that had to be brought to 25 fps."""

Detect = Callable[[Path], np.ndarray | None]
"""A video to its landmarks `[T, 68, 2]`; None where no detector is at hand."""


@dataclass(frozen=True)
class Voiced:
    """A clip with the voice that a setup gives it.

    Attributes:
      audio: what the system is given, 16 kHz mono, `frames` long.
      scored: clip whose voice scores the result: the driving one's, in silence its own.
    """

    audio: Path
    frames: int
    scored: str


class Inputs:
    """The prepared files of a list's clips."""

    def __init__(
        self, folder: Path, clips: Sequence[ListedClip], partners: Mapping[str, str], detect: Detect
    ) -> None:
        make_folder(folder)
        self.folder, self.clips, self.partners = folder, {clip.name: clip for clip in clips}, dict(partners)
        self._prepared = {clip.name: Prepared(folder, clip, detect) for clip in clips}

    def __getitem__(self, name: str) -> "Prepared":
        return self._prepared[name]

    def voiced(self, name: str, setup: Setup) -> Voiced:
        """The voice of a clip in a setup, cut to the shorter of video and voice."""
        own = self[name]
        source = self[self.partners[name]] if setup == "XM" else own
        frames = min(own.frames, frames_of(len(source.wave)))
        digest = sha256_once(source.clip.voice)[:8]
        kind = "silence" if setup == "SI" else digest
        audio = self.folder / f"{name}.{kind}.{frames}.wav"
        if not audio.is_file():
            wave = _fitted(source.wave, frames)
            write_wave(audio, np.zeros_like(wave) if setup == "SI" else wave)
        return Voiced(audio, frames, source.clip.name)


def _fitted(wave: np.ndarray, frames: int) -> np.ndarray:
    """The samples of so many frames, silence where a voice ends within the last one."""
    cut = wave[: frames * SAMPLES]
    return np.pad(cut, (0, frames * SAMPLES - len(cut)))


class Prepared:
    """One clip; everything is found out when it is asked for."""

    def __init__(self, folder: Path, clip: ListedClip, detect: Detect) -> None:
        self.folder, self.clip, self._detect = folder, clip, detect

    @cached_property
    def video(self) -> Path:
        """The clip's own file where it has 25 frames a second; else a copy that does."""
        timeline, info = scan_timeline(self.clip.video), probe_video(self.clip.video)
        if info.fps == FPS and np.array_equal(timeline.index, np.arange(timeline.source_frames)):
            return self.clip.video
        copy = self.folder / f"{self.clip.name}.{sha256_once(self.clip.video)[:8]}.25.mp4"
        if not copy.is_file():
            with VideoWriter(
                copy,
                info.width,
                info.height,
                quality=NEAR_LOSSLESS,
                colour=info.colour,
                aspect=info.aspect,
                threads=1,
            ) as writer:
                for frame in read_frames(self.clip.video):
                    writer.write(frame)
        return copy

    @cached_property
    def size(self) -> tuple[int, int]:
        """Width and height of the frames."""
        info = probe_video(self.video)
        return info.width, info.height

    @cached_property
    def frames(self) -> int:
        return len(scan_timeline(self.video))

    @cached_property
    def wave(self) -> np.ndarray:
        """The clip's own voice, float32 mono at 16 kHz."""
        return read_audio(self.clip.voice)

    @cached_property
    def truth(self) -> Mapping[str, np.ndarray] | None:
        """What the synthetic world knows of the clip; None for a real one.

        Raises:
          UserError: the file is damaged, or has not as many frames as the video.
        """
        if self.clip.truth is None:
            return None
        try:
            with np.load(self.clip.truth, allow_pickle=False) as arrays:
                truth = {name: arrays[name] for name in ("opening", "gap", "mar", "landmarks")}
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise UserError(f"{self.clip.truth}: is no truth of a synthetic clip ({error})") from None
        if len(truth["opening"]) != self.frames:
            raise UserError(f"{self.clip.truth}: knows {len(truth['opening'])} frames of {self.frames}")
        return truth

    @cached_property
    def landmarks(self) -> np.ndarray | None:
        """Where the face is, `[T, 68, 2]` without gaps: the list's, else found; None without a detector."""
        if self.clip.landmarks is None:
            found = self.detected
        else:
            timeline = scan_timeline(self.clip.video)
            found = load_landmarks(self.clip.landmarks, len(timeline), timeline)
        return None if found is None or np.isnan(found).any(axis=(1, 2)).all() else bridge(found)[0]

    @cached_property
    def detected(self) -> np.ndarray | None:
        """Landmarks as the detector finds them, which outputs are compared with; NaN without a face."""
        kept = self.folder / f"{self.clip.name}.{sha256_once(self.clip.video)[:8]}.landmarks.npy"
        if kept.is_file():
            return load_landmarks(kept, self.frames)
        found = self._detect(self.video)
        if found is not None:
            save_landmarks(kept, found)
        return found

    def picture(self) -> Path:
        """The alternative reference frame as a PNG file.

        Raises:
          UserError: the video has no such frame.
        """
        number = self.clip.alternative
        if number >= self.frames:
            raise UserError(
                f"{self.clip.name}: frame {number} is its alternative reference, of {self.frames}"
            )
        path = self.folder / f"{self.clip.name}.{sha256_once(self.clip.video)[:8]}.{number}.png"
        if not path.is_file():
            for i, frame in enumerate(read_frames(self.video)):
                if i == number:
                    with replacing(path) as partial:
                        cv2.imwrite(str(partial), frame[..., ::-1])
                    break
        return path
