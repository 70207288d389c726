"""What a dub is made from: the video and the voice, and where the face is in every frame that is used."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from keysync_jax.config import ModelConfig
from keysync_jax.media.audio import RATE, frames_of, read_audio
from keysync_jax.media.crop import crop_track, landmarks_in_crop
from keysync_jax.media.masks import SIZE as MASK_SIZE
from keysync_jax.media.masks import exclude, make_mask, to_latent
from keysync_jax.media.occlusion import Occluder, occluded_cells
from keysync_jax.media.timeline import FPS, Longer, Timeline, source_index
from keysync_jax.media.video import VideoInfo, probe_video, scan_timeline
from keysync_jax.pipeline.phases import Phases
from keysync_jax.pipeline.windows import Plan, make_plan, padded_length


@dataclass(frozen=True)
class Source:
    """The video and the voice, probed.

    Attributes:
      frames: frames of the dub, as many as the voice needs.
      timeline: the video's frames at 25 a second, all of them or at least those that the plan shows.
      wave: the voice, 16 kHz mono; all of it that is heard.
      longer: what the video does where the voice is longer.
    """

    video: Path
    voice: Path
    info: VideoInfo
    timeline: Timeline
    wave: np.ndarray
    longer: Longer = "to-and-fro"

    @property
    def frames(self) -> int:
        return frames_of(len(self.wave))

    @cached_property
    def plan(self) -> Plan:
        """The plan of the length that covers every frame; frames beyond the dub's are dropped."""
        return make_plan(padded_length(self.frames))

    @cached_property
    def shown(self) -> np.ndarray:
        """Frame of the video that each of the plan's frames shows."""
        count, n = self.plan.windows[-1][1] + 1, len(self.timeline)
        return np.array([source_index(i, n, self.longer) for i in range(count)])

    @property
    def used(self) -> int:
        """Frames of the video that the plan shows, from its beginning."""
        return int(self.shown.max()) + 1


@dataclass(frozen=True)
class Geometry:
    """Where the face is in each used frame of the video.

    Attributes:
      boxes: of the crop, `[N, 4]`.
      present: whether there is a face to dub, `[N]`.
      masks: at the latent resolution, `[N, s, s]` uint8.
    """

    boxes: np.ndarray
    present: np.ndarray
    masks: np.ndarray


def probe_source(video: Path, voice: Path, whole: bool = True, longer: Longer = "to-and-fro") -> Source:
    """Describes the two files, the whole video's timeline or what the voice needs of it.

    Args:
      longer: what the video does where the voice is longer; where it stops, the voice is cut to it.

    Raises:
      UserError: one of them cannot be used.
    """
    info = probe_video(video)
    wave = read_audio(voice)
    planned = make_plan(padded_length(frames_of(len(wave)))).windows[-1][1] + 1
    timeline = scan_timeline(video, most=None if whole else planned)
    if longer == "stop":
        wave = wave[: len(timeline) * RATE // FPS]
    return Source(video, voice, info, timeline, wave, longer)


def face_geometry(
    source: Source,
    config: ModelConfig,
    landmarks: np.ndarray,
    present: np.ndarray,
    occluder: Occluder | None,
    phases: Phases,
) -> Geometry:
    """Crop and mask of every used frame."""
    info = source.info
    boxes = crop_track(landmarks, present, info.height, info.width, info.aspect)
    cropped = landmarks_in_crop(landmarks, boxes, MASK_SIZE)
    size = config.keyframe.latent_size
    # One by one: the full-size masks of a long clip together would take gigabytes.
    masks = [to_latent(make_mask(points[None], config.mask), size)[0] for points in cropped]
    if occluder is not None:
        with phases.phase("occluder", source.used, "frames") as advance:
            for i, (box, frame) in enumerate(zip(boxes, occluder, strict=False)):
                masks[i] = exclude(masks[i], occluded_cells(frame, box, size))
                advance(1)
    return Geometry(boxes, present, np.stack(masks))
