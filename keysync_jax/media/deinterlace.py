"""Deinterlacing: a frame whose two fields were taken one after the other becomes the picture of the first.

By FFmpeg's bwdif (the BBC's interpolation with yadif's checks). A picture depends on its frame and the two
beside it alone, so a pass that begins in the middle of a file gives the same pictures.
"""

from collections import deque
from collections.abc import Iterable, Iterator

import av
from av.filter import Graph
from av.video.frame import VideoFrame

SMALLEST = 4
"""Side of the smallest picture that the filter takes."""


def deinterlaced(frames: Iterable[VideoFrame]) -> Iterator[VideoFrame]:
    """The same frames with the same times, those that say that they are interlaced made whole pictures.

    All others pass as they are. Holds three frames at a time.
    """
    before: VideoFrame | None = None
    running: _Deinterlacer | None = None
    for frame in frames:
        if before is not None and _kind(before) != _kind(frame):
            yield from running.push(None) if running else ()
            before = running = None
        interlaced = frame.interlaced_frame and min(frame.width, frame.height) >= SMALLEST
        if running is None and interlaced:
            running = _Deinterlacer(frame)
            if before is not None:
                running.push(before, wanted=False)
        yield from running.push(frame) if running else ()
        if not interlaced:
            running = None
            yield frame
        before = frame
    yield from running.push(None) if running else ()


def _kind(frame: VideoFrame) -> dict[str, str]:
    """What a filter must know of the frames that it is given."""
    return {
        "video_size": f"{frame.width}x{frame.height}",
        "pix_fmt": frame.format.name,
        # Undeclared, a format that the filter lacks would be converted to another range.
        "colorspace": str(int(frame.colorspace)),
        "range": str(int(frame.color_range)),
    }


class _Deinterlacer:
    """The filter for a run of interlaced frames and those beside it; it gives each when it has the next."""

    def __init__(self, like: VideoFrame) -> None:
        self._graph = Graph()
        self._graph.link_nodes(
            self._graph.add("buffer", **_kind(like), time_base="1/1000"),
            self._graph.add("bwdif", mode="send_frame", parity="auto", deint="interlaced"),
            self._graph.add("buffersink"),
        ).configure()
        self._waiting: deque[tuple[VideoFrame, bool]] = deque()

    def push(self, frame: VideoFrame | None, wanted: bool = True) -> list[VideoFrame]:
        """Take the next frame, or None at the end; give the picture of the one before, if that was wanted."""
        self._graph.push(frame)
        try:
            picture = self._graph.vpull()
        except (av.error.BlockingIOError, av.error.EOFError):
            picture = None
        pictures = []
        if picture is not None:
            source, was_wanted = self._waiting.popleft()
            picture.pts, picture.duration = source.pts, source.duration
            if source.time_base is not None:
                picture.time_base = source.time_base
            pictures = [picture] if was_wanted else []
        if frame is not None:
            self._waiting.append((frame, wanted))
        return pictures
