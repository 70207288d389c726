"""Latents of the source's frames, which are made while its landmarks are found where that can be.

So the video is read once for both. Where a crop lies depends on the faces up to its frame; only where a frame
has no face it depends on the next one too.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from keysync_jax.config import Dtype
from keysync_jax.media.crop import crop_boxes, crop_frame
from keysync_jax.media.landmarks import Detector, bridge_each, detect_each
from keysync_jax.media.video import read_frames
from keysync_jax.model import Model
from keysync_jax.pipeline.devices import Devices
from keysync_jax.pipeline.flow import Clock, ahead
from keysync_jax.pipeline.latents import encode_frames
from keysync_jax.pipeline.phases import Advance
from keysync_jax.pipeline.programs import Compiling
from keysync_jax.pipeline.source import Source
from keysync_jax.pipeline.workspace import ResumableArray, Workspace

AHEAD = 8
"""Frames that are read before they are asked for."""

HELD_BYTES = 256 * 2**20
"""Of frames that are held until it is known where their crop is."""


@dataclass
class Encoder:
    """Encodes the crop of every used frame, in order, and keeps what is done.

    Attributes:
      per_call: frames of a call that each device takes.
    """

    source: Source
    model: Model
    dtype: Dtype
    per_call: int
    devices: Devices
    work: Workspace
    compiling: Compiling

    @property
    def latents(self) -> ResumableArray:
        """Scaled latents `[used, s, s, C]`."""
        size, channels = self.model.config.keyframe.latent_size, self.model.config.vae.latent_channels
        return self.work.array("latents", (self.source.used, size, size, channels))

    @property
    def done(self) -> int:
        """Frames that are encoded."""
        return self.work.done("latents")

    def encode(self, crops: Iterable[np.ndarray], device: Clock) -> Iterator[int]:
        """Encodes crops from that of frame `done` on; yields how many each call has encoded."""
        latents: ResumableArray | None = None
        vae = self.model.load("vae", self.dtype)
        self.compiling.wait("encode")
        for group in encode_frames(vae, crops, self.per_call, self.devices, device):
            # Not made before: where there is no face nothing is kept.
            latents = self.latents if latents is None else latents
            latents.append(group)
            yield len(group)


def detect_and_encode(
    source: Source, detector: Detector, encoder: Encoder, advance: Advance, device: Clock, decoder: Clock
) -> np.ndarray:
    """Landmarks of every used frame, as `detect_all` gives them; meanwhile the frames are encoded.

    A gap between faces of more frames than `HELD_BYTES` ends the encoding, the rest of which is left to do.
    """
    info, rows = source.info, list[np.ndarray]()
    read = decoder.timed(islice(read_frames(source.video), source.used))
    held = max(HELD_BYTES // (3 * info.height * info.width), 1)
    size = encoder.model.config.crop_size

    def crops(frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        waiting: deque[np.ndarray] = deque()

        def found() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for frame, row in detect_each(frames, detector, info.aspect):
                rows.append(row)
                advance(1)
                yield frame, row

        def faces() -> Iterator[tuple[np.ndarray, bool]]:
            for frame, landmarks, present in bridge_each(found(), held):
                waiting.append(frame)
                yield landmarks, present

        for box in crop_boxes(faces(), info.height, info.width, info.aspect):
            yield crop_frame(waiting.popleft(), box, size)

    with ahead(read, AHEAD) as frames:
        for _ in encoder.encode(islice(crops(frames), encoder.done, None), device):
            pass
    return np.stack(rows)
