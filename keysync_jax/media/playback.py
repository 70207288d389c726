"""Playing a video under a voice that is longer than it, in bounded memory."""

from collections.abc import Iterator
from fractions import Fraction
from itertools import chain, dropwhile, islice, repeat
from pathlib import Path

import numpy as np

from keysync_jax.media.deinterlace import deinterlaced
from keysync_jax.media.timeline import FPS, Longer, Timeline
from keysync_jax.media.video import Geometry, decode_frames, open_video, read_frames, scan_timeline

REVERSE_BUFFER_BYTES = 256 * 2**20


def played_frames(
    path: Path,
    count: int,
    longer: Longer = "to-and-fro",
    fps: int | Fraction = FPS,
    timeline: Timeline | None = None,
) -> Iterator[np.ndarray]:
    """Yield `count` frames of `read_frames`, frame i being number `timeline.source_index(i, n, longer)`.

    As `pingpong_frames`, which plays to and fro.
    """
    if longer == "to-and-fro":
        return pingpong_frames(path, count, fps, timeline)
    if longer == "loop":
        return islice(chain.from_iterable(read_frames(path, fps) for _ in repeat(None)), count)
    return islice(_held(path, fps), count)


def _held(path: Path, fps: int | Fraction) -> Iterator[np.ndarray]:
    """All frames, and the last one for ever."""
    frame = np.empty(0, np.uint8)
    for frame in read_frames(path, fps):
        yield frame
    yield from repeat(frame)


def pingpong_frames(
    path: Path,
    count: int,
    fps: int | Fraction = FPS,
    timeline: Timeline | None = None,
    buffer_bytes: int = REVERSE_BUFFER_BYTES,
) -> Iterator[np.ndarray]:
    """Yield `count` frames of `read_frames`, frame i being number `timeline.source_index(i, n)`.

    uint8 RGB `[H, W, 3]`, read-only. Forward legs stream. A backward leg is cut into chunks that fill
    `buffer_bytes`; each is sought, decoded and reversed, which costs one stretch between key frames a chunk
    more than forward play. `timeline` spares the scan that backward legs need. Raises UserError as
    `video.probe_video` does.
    """
    return islice(_to_and_fro(path, fps, timeline, buffer_bytes), count)


def _to_and_fro(
    path: Path, fps: int | Fraction, timeline: Timeline | None, buffer_bytes: int
) -> Iterator[np.ndarray]:
    frame = np.empty(0, np.uint8)
    for frame in read_frames(path, fps):
        yield frame
    timeline = timeline or scan_timeline(path, fps)
    if len(timeline) == 1:
        yield from repeat(frame)
    chunk = max(buffer_bytes // frame.nbytes, 1)
    while True:
        for stop in range(len(timeline) - 1, 1, -chunk):
            yield from reversed(read_range(path, timeline, max(stop - chunk, 1), stop))
        yield from read_frames(path, fps)


def read_range(path: Path, timeline: Timeline, start: int, stop: int) -> list[np.ndarray]:
    """Frames `start` to `stop` (exclusive) of `video.read_frames`, by seeking; a list of uint8 `[H, W, 3]`.

    Decoding starts at the key frame before the range. Where a file's index leads behind it, so that a frame
    of the range is missing, or where timestamps come twice, decoding starts at the beginning of the file: the
    frames are always exact.
    """
    numbers = timeline.index[start:stop].tolist()
    # Deinterlacing looks at the frames beside each.
    margin = 1 if timeline.interlaced else 0
    first, last = max(numbers[0] - margin, 0), numbers[-1] + margin
    found = _decode_from_key_frame(path, timeline.pts[first : last + 1]) if timeline.is_ordered else {}
    kept = {first + offset: frame for offset, frame in found.items()}
    if not kept.keys() >= set(numbers):
        kept = _decode_from_start(path, set(numbers))
    return [kept[number] for number in numbers]


def _decode_from_key_frame(path: Path, pts: tuple[int | None, ...]) -> dict[int, np.ndarray]:
    """Frames by their place in `pts` (a run of consecutive source frames); incomplete where seeking fails."""
    places = {value: place for place, value in enumerate(pts)}
    if None in places or len(places) != len(pts):
        return {}
    found: dict[int, np.ndarray] = {}
    with open_video(path) as (container, stream):
        geometry = Geometry.of(next(decode_frames(container, stream)))
        container.seek(pts[0] or 0, stream=stream, backward=True)
        # Frames shown before the first key frame may lean on pictures that were never decoded.
        sound = dropwhile(lambda frame: not frame.key_frame, decode_frames(container, stream))
        for frame in deinterlaced(sound):
            if frame.pts in places:
                found[places[frame.pts]] = _frozen(geometry.upright(frame))
            if frame.pts is not None and frame.pts >= (pts[-1] or 0):
                break
    return found


def _decode_from_start(path: Path, numbers: set[int]) -> dict[int, np.ndarray]:
    with open_video(path) as (container, stream):
        frames = deinterlaced(decode_frames(container, stream))
        first = next(frames)
        geometry = Geometry.of(first)
        kept = {0: _frozen(geometry.upright(first))} if 0 in numbers else {}
        for number, frame in enumerate(islice(frames, max(numbers)), start=1):
            if number in numbers:
                kept[number] = _frozen(geometry.upright(frame))
    return kept


def _frozen(frame: np.ndarray) -> np.ndarray:
    frame.flags.writeable = False
    return frame
