"""Reading video: probing, and streaming upright RGB frames at 25 fps.

Frames are uint8 RGB `[H, W, 3]` in the source's own colour space (an HDR source stays HDR-coded; the writer
repeats its tags). Every pass over a file yields the same frames.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any, Self, cast

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, Interpolation
from av.video.stream import VideoStream

from keysync_jax.errors import UserError
from keysync_jax.media.container import open_container
from keysync_jax.media.deinterlace import deinterlaced
from keysync_jax.media.timeline import FPS, Clock, Timeline, nearest_items, report_jumps

log = logging.getLogger(__name__)

UNSPECIFIED = (0, 2)
MATRICES = {
    1: Colorspace.ITU709,
    4: Colorspace.FCC,
    5: Colorspace.ITU601,
    6: Colorspace.ITU601,
    7: Colorspace.SMPTE240M,
    9: Colorspace.BT2020,
}
ROUNDING = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
"""Without the two flags swscale truncates, and every pass darkens the picture by more than one level."""

WIDEST_PIXEL = 4
"""Width over height of the widest pixels that are believed, and height over width of the highest."""


@dataclass(frozen=True)
class Colour:
    """What the samples mean, as code points of ISO/IEC 23091-2 (the numbers in a video stream's headers)."""

    matrix: int = 1
    primaries: int = 1
    transfer: int = 1


@dataclass(frozen=True)
class VideoInfo:
    """What a file says of its video stream; width and height are those of the upright frames.

    `fps` is the source's average rate; `duration` is in seconds, None where unknown; `rotation` (degrees
    counter-clockwise), then `mirrored` (left-right) are what stands the stored picture upright; `aspect` is
    the width of an upright pixel over its height.
    """

    width: int
    height: int
    fps: Fraction
    has_audio: bool
    duration: float | None
    rotation: int
    mirrored: bool
    colour: Colour
    aspect: Fraction


@dataclass(frozen=True)
class Geometry:
    """What every frame of a stream is brought to: the stored size and orientation of its first frame."""

    width: int
    height: int
    turns: int
    mirrored: bool

    @classmethod
    def of(cls, frame: VideoFrame) -> Self:
        """Read size and display matrix of the stream's first frame; angles are rounded to quarter turns."""
        side_data: Mapping[str, Any] = cast(Any, frame.side_data)
        if "DISPLAYMATRIX" not in side_data:
            return cls(frame.width, frame.height, 0, False)
        # Rows (a b u), (c d v), ..: the stored point (1, 0) is shown at (a, b), y downwards.
        a, b, _, c, d = np.frombuffer(bytes(side_data["DISPLAYMATRIX"]), np.int32)[:5].astype(np.float64)
        mirrored = bool(a * d - b * c < 0)
        clockwise = np.degrees(np.arctan2(b, -a if mirrored else a))
        return cls(frame.width, frame.height, int(np.rint(-clockwise / 90)) % 4, mirrored)

    def upright(self, frame: VideoFrame) -> np.ndarray:
        """Convert a decoded frame to contiguous uint8 RGB `[H, W, 3]`, upright, full range."""
        is_rgb = frame.format.is_rgb
        is_full = is_rgb or frame.color_range == ColorRange.JPEG or frame.format.name.startswith("yuvj")
        rgb = frame.reformat(
            width=self.width,
            height=self.height,
            format="rgb24",
            src_colorspace=None if is_rgb else MATRICES[frame_colour(frame).matrix],
            src_color_range=ColorRange.JPEG if is_full else ColorRange.MPEG,
            dst_color_range=ColorRange.JPEG,
            interpolation=ROUNDING,
        ).to_ndarray()
        turned = np.rot90(rgb, self.turns)
        return np.ascontiguousarray(turned[:, ::-1] if self.mirrored else turned)


def frame_colour(frame: VideoFrame) -> Colour:
    """A frame's colour; untagged, it is BT.709 in HD and BT.601 (SMPTE 170M) below, as players assume."""
    default = 1 if max(frame.width, frame.height) >= 1280 or min(frame.width, frame.height) > 576 else 6
    matrix, primaries, transfer = int(frame.colorspace), int(frame.color_primaries), int(frame.color_trc)
    matrix = 9 if matrix == 10 else matrix
    return Colour(
        matrix=matrix if matrix in MATRICES else default,
        primaries=default if primaries in UNSPECIFIED else primaries,
        transfer=default if transfer in UNSPECIFIED else transfer,
    )


@contextmanager
def open_video(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open a file and its first video stream (cover pictures aside), or raise UserError."""
    with open_container(path, "video") as container:
        cover = Disposition.attached_pic
        streams = [s for s in container.streams.video if s.codec_context and not s.disposition & cover]
        if not streams:
            raise UserError(f"{path} has no video stream; give a file with a picture")
        streams[0].thread_type = "AUTO"
        yield container, streams[0]


def decode_frames(container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
    """Yield the frames in presentation order; packets that cannot be decoded are left out and reported."""
    damaged = 0
    packets = container.demux(stream)
    while True:
        try:
            frames = next(packets).decode()
        except StopIteration:
            break
        except (av.error.InvalidDataError, av.error.PatchWelcomeError):
            damaged += 1
            continue
        yield from frames
    if damaged:
        log.warning("%s: %d damaged video packets are left out", container.name, damaged)


def clock_of(stream: VideoStream) -> Clock:
    """A clock for the frames of a stream from its first one on."""
    return Clock(1 / Fraction(stream.average_rate or stream.guessed_rate or FPS))


def timed(
    frames: Iterator[VideoFrame], clock: Clock
) -> Iterator[tuple[Fraction, Fraction, tuple[int, VideoFrame]]]:
    """Pair frames with (time, duration) in seconds, by the clock, and their number in the file."""
    duration = Fraction(0)
    for number, frame in enumerate(frames):
        base = Fraction(frame.time_base or clock.period)
        time = clock.time(None if frame.pts is None else frame.pts * base)
        duration = frame.duration * base
        yield time, clock.lasting(duration), (number, frame)
    clock.end(duration)


def undecodable(path: Path) -> UserError:
    """The error for a video stream that yields no picture."""
    return UserError(f"{path} has a video stream, but not one frame of it can be decoded")


def probe_video(path: Path) -> VideoInfo:
    """Describe a video by its header and first frame.

    Raises UserError if the file cannot be read, has no video stream, or not one frame can be decoded.
    """
    with open_video(path) as (container, stream):
        frame = next(decode_frames(container, stream), None)
        if frame is None:
            raise undecodable(path)
        geometry = Geometry.of(frame)
        sideways = geometry.turns % 2 == 1
        aspect = _aspect(path, stream)
        return VideoInfo(
            width=frame.height if sideways else frame.width,
            height=frame.width if sideways else frame.height,
            fps=Fraction(stream.average_rate or stream.guessed_rate or FPS),
            has_audio=bool(container.streams.audio),
            duration=container.duration / av.time_base if container.duration else None,
            rotation=90 * geometry.turns,
            mirrored=geometry.mirrored,
            colour=frame_colour(frame),
            aspect=1 / aspect if sideways else aspect,
        )


def _aspect(path: Path, stream: VideoStream) -> Fraction:
    """Width of a stored pixel over its height."""
    aspect = Fraction(stream.sample_aspect_ratio or 1)
    if 1 / WIDEST_PIXEL <= aspect <= WIDEST_PIXEL:
        return aspect
    log.warning("%s: its pixels cannot be %s times as wide as high; they are taken as square", path, aspect)
    return Fraction(1)


def read_frames(path: Path, fps: int | Fraction = FPS) -> Iterator[np.ndarray]:
    """Stream a video's frames at a constant rate, by presentation time.

    Yields uint8 RGB `[H, W, 3]`, upright. Output k is the source frame nearest to k / fps after the first
    frame (`timeline.nearest_items`); a constant 25 fps source passes frame by frame. Arrays are read-only,
    and the same one is yielded again where a source frame is shown again. Holds two frames at a time.
    Raises UserError as `probe_video` does.
    """
    with open_video(path) as (container, stream):
        geometry: Geometry | None = None
        shown, rgb = -1, np.empty(0, np.uint8)
        frames = deinterlaced(decode_frames(container, stream))
        for number, frame in nearest_items(timed(frames, clock_of(stream)), fps):
            geometry = geometry or Geometry.of(frame)
            if number != shown:
                shown, rgb = number, geometry.upright(frame)
                rgb.flags.writeable = False
            yield rgb
        if geometry is None:
            raise undecodable(path)


def scan_timeline(path: Path, fps: int | Fraction = FPS, most: int | None = None) -> Timeline:
    """Which source frame each output frame of `read_frames` is, or each of the first `most`.

    Takes one decoding pass without colour conversion: headers alone do not tell which frames will decode.
    Where the timestamps jump a warning names the place. Raises UserError as `probe_video` does.
    """
    pts: list[int | None] = []
    interlaced = False

    def numbers(frames: Iterator[VideoFrame], clock: Clock) -> Iterator[tuple[Fraction, Fraction, int]]:
        nonlocal interlaced
        for time, duration, (number, frame) in timed(frames, clock):
            pts.append(frame.pts)
            interlaced = interlaced or frame.interlaced_frame
            yield time, duration, number

    with open_video(path) as (container, stream):
        clock = clock_of(stream)
        frames = numbers(decode_frames(container, stream), clock)
        index = np.fromiter(islice(nearest_items(frames, fps), most), np.int64)
        start = Fraction(container.start_time or 0, av.time_base)
    if not pts:
        raise undecodable(path)
    report_jumps(path, "picture", clock.jumps, start)
    return Timeline(index, tuple(pts), tuple(clock.jumps), interlaced)


def count_frames(path: Path, fps: int | Fraction = FPS) -> int:
    """Number of frames that `read_frames` yields, exactly (one decoding pass, see `scan_timeline`)."""
    return len(scan_timeline(path, fps))
