"""Interlaced video: whole pictures of the first field's time, the same in every pass."""

from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import islice, pairwise
from pathlib import Path

import av
import numpy as np
import pytest
from av.filter import Graph
from av.video.frame import VideoFrame

from keysync_jax.media.deinterlace import deinterlaced
from keysync_jax.media.playback import pingpong_frames, read_range
from keysync_jax.media.timeline import source_index
from keysync_jax.media.video import Colour, Geometry, probe_video, read_frames, scan_timeline

HEIGHT, WIDTH, FRAMES = 144, 176, 24
RATE = 25


def scene(time: float) -> np.ndarray:
    """A striped disc that crosses a slope of grey, RGB `[H, W, 3]`, at any time in seconds."""
    y, x = np.mgrid[:HEIGHT, :WIDTH].astype(float)
    from_centre = np.hypot(x - 50 - 60 * time, y - 72)
    disc = 1 / (1 + np.exp(from_centre - 40))
    grey = 60 + 0.3 * y + disc * (70 + 40 * np.sin((x - 60 * time) / 4))
    return np.repeat(grey[..., None], 3, axis=2)


def woven(number: int, top_first: bool) -> np.ndarray:
    """Two fields, half a frame apart, in one picture."""
    early, late = scene(number / RATE), scene(number / RATE + 1 / (2 * RATE))
    first = 0 if top_first else 1
    picture = late.copy()
    picture[first::2] = early[first::2]
    return picture


def marked(frames: Iterable[VideoFrame], mode: str) -> Iterator[VideoFrame]:
    """Frames that say which field is first; PyAV's own cannot."""
    graph: Graph | None = None
    for frame in frames:
        if graph is None:
            graph = Graph()
            how = (frame.width, frame.height, frame.format.name, None, frame.time_base)
            graph.link_nodes(
                graph.add_buffer(None, *how), graph.add("setfield", mode=mode), graph.add("buffersink")
            )
            graph.configure()
        graph.push(frame)
        yield graph.vpull()


def write(
    path: Path,
    modes: Sequence[str],
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    options: dict[str, str] | None = None,
    rotation: float | None = None,
    gop: int = 6,
    speed: int = 1,
) -> Path:
    """A clip whose frame i is interlaced ("tff", "bff") or not ("prog"), at speed x 25 frames a second."""
    usual = {"libx264": {"crf": "1", "flags": "+ildct"}, "mpeg2video": {"flags": "+ilme+ildct"}}
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=RATE * speed, options=options or usual.get(codec, {}))
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = WIDTH, HEIGHT, pix_fmt, gop
        stream.bit_rate = 20_000_000
        if rotation is not None:
            stream.set_display_rotation(rotation)

        def pictures() -> Iterator[VideoFrame]:
            for i, mode in enumerate(modes):
                picture = scene(i / RATE) if mode == "prog" else woven(i, mode == "tff")
                frame = VideoFrame.from_ndarray(np.rint(picture).astype(np.uint8), "rgb24")
                frame = frame.reformat(format=pix_fmt, dst_colorspace=6, dst_color_range=1)
                frame.pts, frame.time_base = i, Fraction(1, RATE * speed)
                yield frame

        sources = [next(marked([frame], mode)) for frame, mode in zip(pictures(), modes, strict=True)]
        for frame in sources:
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def errors(frames: Iterable[np.ndarray]) -> np.ndarray:
    """Root mean square difference from the scene at each frame's time, grey levels."""
    shown = [scene(i / RATE) for i in range(FRAMES)]
    return np.array([np.sqrt(((a - b) ** 2).mean()) for a, b in zip(frames, shown, strict=True)])


def as_stored(path: Path) -> list[np.ndarray]:
    """The frames as a reader sees them that does not deinterlace."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
        return [Geometry.of(frames[0]).upright(frame) for frame in frames]


def combing(frame: np.ndarray) -> float:
    """How much a row differs from those above and below it: teeth at moving edges, grey levels."""
    rows = frame[..., 0].astype(float)
    return float(np.abs(rows[1:-1] - (rows[:-2] + rows[2:]) / 2).mean())


@pytest.mark.parametrize(
    ("codec", "suffix", "mode"),
    [
        ("libx264", ".mp4", "tff"),
        ("libx264", ".mkv", "bff"),
        ("mpeg2video", ".mpg", "tff"),
        ("mpeg2video", ".ts", "bff"),
    ],
)
def test_interlaced_frames_become_whole_pictures(tmp_path: Path, codec: str, suffix: str, mode: str) -> None:
    clip = write(tmp_path / f"clip{suffix}", [mode] * FRAMES, codec)
    stored, made = as_stored(clip), list(read_frames(clip))
    assert len(made) == len(stored) == FRAMES
    assert errors(stored).mean() > 3
    assert errors(made).mean() < 1.2
    teeth = np.mean([combing(frame) for frame in stored])
    assert np.mean([combing(frame) for frame in made]) < 0.5 * teeth
    assert np.mean([combing(scene(0)), combing(scene(0.5))]) < 0.5 * teeth


def test_times_and_numbers_are_the_sources(tmp_path: Path) -> None:
    clip = write(tmp_path / "clip.mp4", ["tff"] * FRAMES)
    timeline = scan_timeline(clip)
    assert timeline.interlaced
    np.testing.assert_array_equal(timeline.index, np.arange(FRAMES))
    with av.open(str(clip)) as container:
        frames = list(container.decode(video=0))
    made = list(deinterlaced(iter(frames)))
    assert [(f.pts, f.time_base, f.duration) for f in made] == [
        (f.pts, f.time_base, f.duration) for f in frames
    ]
    assert not any(frame.interlaced_frame for frame in made)


@pytest.mark.parametrize("codec", ["libx264", "mpeg2video", "ffv1"])
def test_progressive_frames_are_not_touched(tmp_path: Path, codec: str) -> None:
    clip = write(tmp_path / "clip.mkv", ["prog"] * FRAMES, codec, options={"bf": "0"})
    assert not scan_timeline(clip).interlaced
    for made, stored in zip(read_frames(clip), as_stored(clip), strict=True):
        np.testing.assert_array_equal(made, stored)
    with av.open(str(clip)) as container:
        frames = list(container.decode(video=0))
    assert all(one is other for one, other in zip(deinterlaced(iter(frames)), frames, strict=True))


MIXED = (["prog"] * 4 + ["tff"] * 7 + ["prog"] + ["tff"] + ["prog"] * 3 + ["tff"] * 8)[:FRAMES]


def test_frames_that_say_so_alone_are_changed(tmp_path: Path) -> None:
    clip = write(tmp_path / "clip.mkv", MIXED, "ffv1")
    stored, made = as_stored(clip), list(read_frames(clip))
    changed = [bool((a != b).any()) for a, b in zip(made, stored, strict=True)]
    assert changed == [mode != "prog" for mode in MIXED]
    assert errors(made).max() < 1.6


@pytest.mark.parametrize("modes", [["tff"] * FRAMES, MIXED], ids=["all", "some"])
@pytest.mark.parametrize("codec", ["libx264", "ffv1"])
def test_every_pass_gives_the_same_pictures(tmp_path: Path, codec: str, modes: list[str]) -> None:
    clip = write(tmp_path / "clip.mkv", modes, codec)
    forward, timeline = list(read_frames(clip)), scan_timeline(clip)
    for start, stop in [(0, 3), (1, 2), (5, 9), (6, 8), (11, 13), (12, 13), (16, 18), (20, 24), (23, 24)]:
        for frame, expected in zip(read_range(clip, timeline, start, stop), forward[start:stop], strict=True):
            np.testing.assert_array_equal(frame, expected, err_msg=f"{start} to {stop}")
    played = pingpong_frames(clip, 2 * FRAMES + 5, buffer_bytes=5 * forward[0].nbytes)
    for i, frame in enumerate(played):
        np.testing.assert_array_equal(frame, forward[source_index(i, FRAMES)], err_msg=str(i))


def test_backward_play_of_interlaced_video_seeks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from keysync_jax.media import playback

    clip = write(tmp_path / "clip.mp4", ["tff"] * FRAMES)
    counted = 0

    def counting(*streams: object) -> Iterator[VideoFrame]:
        nonlocal counted
        for frame in original(*streams):
            counted += 1
            yield frame

    original = playback.decode_frames
    monkeypatch.setattr(playback, "decode_frames", counting)
    read_range(clip, scan_timeline(clip), 14, 16)
    assert 0 < counted < 12


def test_at_twice_the_rate_the_shown_frames_are_whole(tmp_path: Path) -> None:
    """Frames that are left out still are their neighbours'."""
    clip = write(tmp_path / "clip.mkv", ["tff"] * FRAMES, "ffv1", speed=2)
    with av.open(str(clip)) as container:
        frames = list(container.decode(video=0))
    every = [Geometry.of(frames[0]).upright(frame) for frame in deinterlaced(iter(frames))]
    for made, expected in zip(read_frames(clip), every[::2], strict=True):
        np.testing.assert_array_equal(made, expected)


@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv422p", "yuv422p10le", "nv12", "yuyv422", "rgb24"])
def test_kept_rows_keep_their_colours(pix_fmt: str) -> None:
    """Whatever the format, the first field's rows come through as they are, and so do the tags."""

    def frames() -> Iterator[VideoFrame]:
        for i in range(4):
            grey = woven(i, True) * np.array([1.0, 0.8, 0.6])
            frame = VideoFrame.from_ndarray(np.rint(grey).astype(np.uint8), "rgb24")
            if pix_fmt != "rgb24":
                frame = frame.reformat(format=pix_fmt, dst_colorspace=1, dst_color_range=2)
                frame.colorspace, frame.color_range = 1, 2
            frame.color_primaries, frame.color_trc = 9, 16
            frame.pts, frame.time_base = i, Fraction(1, 25)
            yield frame

    sources = list(marked(frames(), "tff"))
    made = list(deinterlaced(iter(sources)))
    geometry = Geometry(WIDTH, HEIGHT, 0, False)
    for source, picture in zip(sources, made, strict=True):
        one, other = geometry.upright(source).astype(int), geometry.upright(picture).astype(int)
        # Rows of colour are shared between the fields in 4:2:0.
        assert np.abs(one - other)[::2].max() <= (6 if pix_fmt in ("yuv420p", "nv12") else 0)
        assert (int(picture.color_primaries), int(picture.color_trc)) == (9, 16)
        assert np.abs(one - other)[1::2].max() > 20


def test_a_turned_clip_stays_turned(tmp_path: Path) -> None:
    clip = write(tmp_path / "clip.mp4", ["tff"] * 8, rotation=90)
    assert probe_video(clip).rotation == 90
    assert probe_video(clip).colour == Colour(6, 6, 6)
    made = list(read_frames(clip))
    assert made[0].shape == (WIDTH, HEIGHT, 3)
    for frame, i in zip(made, range(8), strict=True):
        assert np.sqrt(((np.rot90(frame, -1) - scene(i / RATE)) ** 2).mean()) < 1.6


def test_pictures_too_small_for_the_filter_pass() -> None:
    frame = VideoFrame.from_ndarray(np.zeros((2, 2, 3), np.uint8), "rgb24").reformat(format="yuv420p")
    frame.pts, frame.time_base = 0, Fraction(1, 25)
    (made,) = deinterlaced(marked([frame], "tff"))
    assert made.interlaced_frame


def test_a_change_of_size_ends_a_run(tmp_path: Path) -> None:
    def sized(factor: int) -> Iterator[VideoFrame]:
        for i in range(3):
            frame = VideoFrame.from_ndarray(np.rint(woven(i, True)).astype(np.uint8), "rgb24")
            frame = frame.reformat(width=WIDTH // factor, height=HEIGHT // factor, format="yuv420p")
            frame.pts, frame.time_base = i, Fraction(1, 25)
            yield frame

    sources = [*marked(sized(1), "tff"), *marked(sized(2), "tff")]
    made = list(deinterlaced(iter(sources)))
    assert [frame.width for frame in made] == [frame.width for frame in sources]
    alone = [*deinterlaced(iter(sources[:3])), *deinterlaced(iter(sources[3:]))]
    for one, other in zip(made, alone, strict=True):
        np.testing.assert_array_equal(one.to_ndarray(), other.to_ndarray())
    assert sum(1 for one, other in pairwise(islice(made, 3)) if one is other) == 0
