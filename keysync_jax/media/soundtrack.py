"""The sound of a video, in step with its frames."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from keysync_jax.media.audio import RATE, read_audio
from keysync_jax.media.timeline import Timeline
from keysync_jax.media.video import open_video


def read_soundtrack(path: Path, timeline: Timeline) -> np.ndarray:
    """A video's own sound from its first frame on: float32 mono `[samples]` in [-1, 1] at 16 kHz.

    Frame k of `video.read_frames` goes with the sound from k / 25 s on. Where the timestamps of the picture
    jump the sound jumps with it: what it has in between belongs to no frame and is left out.
    Raises UserError as `video.probe_video` and `audio.read_audio` do.

    timeline: of the same file (`video.scan_timeline`).
    """
    wave = read_audio(path, picture=timeline.jumps)
    with open_video(path) as (container, stream):
        picture, file = stream.start_time, container.start_time
        late = Fraction(0)
        if picture is not None and file is not None and stream.time_base is not None:
            late = picture * stream.time_base - Fraction(file, av.time_base)
    return wave[max(0, round(late * RATE)) :]
