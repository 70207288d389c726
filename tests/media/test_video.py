"""Reading, to-and-fro play and writing of video, on small clips whose frames carry their number."""

import itertools
import logging
import os
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.frame import VideoFrame

from keysync_jax.errors import UserError
from keysync_jax.media import playback
from keysync_jax.media.audio import read_audio
from keysync_jax.media.playback import pingpong_frames, played_frames, read_range
from keysync_jax.media.timeline import Longer, nearest_items, source_index
from keysync_jax.media.video import ROUNDING, Colour, count_frames, probe_video, read_frames, scan_timeline
from keysync_jax.media.writer import VideoWriter, check_writable

HEIGHT, WIDTH, BITS = 48, 64, 8


def numbered(number: int) -> np.ndarray:
    """A frame whose left half shows `number` in stripes, one a bit, and whose right half is noise."""
    frame = np.random.default_rng(number).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    bits = np.array([(number >> bit) & 1 for bit in range(BITS)], np.uint8)
    frame[:, : WIDTH // 2] = np.repeat(bits * 200 + 20, HEIGHT // BITS)[:, None, None]
    return frame


def number_of(frame: np.ndarray) -> int:
    stripes = frame[:, : WIDTH // 2].reshape(BITS, HEIGHT // BITS, -1).mean(axis=(1, 2))
    return int(((stripes > 128) << np.arange(BITS)).sum())


def write_clip(
    path: Path,
    times: Sequence[Fraction],
    *,
    frames: Iterable[np.ndarray] | None = None,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    gop: int = 12,
    options: dict[str, str] | None = None,
    container_format: str | None = None,
    rotation: tuple[float, bool, bool] | None = None,
    base: Fraction = Fraction(1, 90_000),
    rate: Fraction | None = None,
) -> Path:
    """Encode frames (numbered ones by default) with exactly these presentation times."""
    if rate is None:
        rate = Fraction(len(times) - 1, 1) / (times[-1] - times[0]) if len(times) > 1 else Fraction(25)
    pictures = list(frames if frames is not None else map(numbered, range(len(times))))
    with av.open(str(path), "w", format=container_format) as container:
        stream = container.add_stream(codec, rate=rate.limit_denominator(1001), options=options or {})
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt, stream.gop_size = pix_fmt, gop
        stream.codec_context.time_base = base
        if rotation is not None:
            stream.set_display_rotation(rotation[0], hflip=rotation[1], vflip=rotation[2])
        for time, picture in zip(times, pictures, strict=True):
            frame = VideoFrame.from_ndarray(picture, "rgb24")
            if "10" in pix_fmt:
                # Without these flags swscale's conversion to ten bits differs from one call to the next.
                frame = frame.reformat(format=pix_fmt, interpolation=ROUNDING)
            frame.pts, frame.time_base = round(time / base), base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def steady(count: int, rate: Fraction | int, start: Fraction | int = 0) -> list[Fraction]:
    return [Fraction(start) + Fraction(i) / rate for i in range(count)]


def nearest(times: Sequence[Fraction], end: Fraction) -> list[int]:
    """The rule by brute force: the nearest source frame of each output time, the earlier one on a tie."""
    total = max(int((end - times[0]) * 25 + Fraction(1, 2)), 1)
    wanted = [times[0] + Fraction(k, 25) for k in range(total)]
    return [min(range(len(times)), key=lambda i: abs(times[i] - t)) for t in wanted]


def write_sound(path: Path, seconds: float, rate: int, channels: int = 1) -> np.ndarray:
    samples = np.random.default_rng(5).normal(0, 0.1, (channels, round(seconds * rate)))
    smooth = np.stack([np.convolve(channel, np.hanning(24) / 12, "same") for channel in samples])
    pcm = (np.clip(smooth, -1, 1) * 32767).astype(np.int16)
    with av.open(str(path), "w") as container:
        layout = "mono" if channels == 1 else "stereo"
        stream = container.add_stream("pcm_s16le", rate=rate, layout=layout)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(pcm.T.reshape(1, -1)), "s16", layout)
        frame.sample_rate = rate
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return pcm


def test_a_25_fps_clip_passes_frame_by_frame(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4", steady(30, 25))
    with av.open(str(clip)) as container:
        stored = [frame.pts for frame in container.decode(video=0)]
    timeline = scan_timeline(clip)
    assert list(timeline.pts) == stored
    np.testing.assert_array_equal(timeline.index, np.arange(30))
    assert [number_of(frame) for frame in read_frames(clip)] == list(range(30))
    assert count_frames(clip) == timeline.source_frames == 30


RATES = [Fraction(24), Fraction(30_000, 1001), Fraction(30), Fraction(60), Fraction(25, 2)]


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_other_rates_give_the_nearest_frames(tmp_path: Path, rate: Fraction, suffix: str) -> None:
    times = steady(50, rate)
    clip = write_clip(tmp_path / f"clip{suffix}", times)
    if suffix == ".mkv":  # Matroska keeps milliseconds.
        times = [Fraction(round(time * 1000), 1000) for time in times]
    expected = nearest(times, times[-1] + 1 / rate)
    assert [number_of(frame) for frame in read_frames(clip)] == expected
    assert len(expected) == round(50 / rate * 25)
    np.testing.assert_array_equal(scan_timeline(clip).index, expected)


def test_variable_rate_with_a_late_start(tmp_path: Path) -> None:
    steps = np.random.default_rng(0).integers(10, 150, 40)
    times = [Fraction(3) + Fraction(int(t), 1000) for t in np.cumsum(steps)]
    clip = write_clip(tmp_path / "clip.mkv", times)
    with av.open(str(clip)) as container:
        *_, last = container.decode(video=0)
    end = times[-1] + (last.duration or 0) * last.time_base
    numbers = [number_of(frame) for frame in read_frames(clip)]
    expected = nearest(times, end)
    assert numbers[: len(expected) - 2] == expected[: len(expected) - 2]
    assert abs(len(numbers) - len(expected)) <= 2
    assert numbers[-1] == 39


def test_a_stream_without_timestamps_is_taken_at_its_nominal_rate(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.h264", steady(20, 25), container_format="h264")
    assert [number_of(frame) for frame in read_frames(clip)] == list(range(20))
    assert count_frames(clip) == 20


def test_passes_are_identical_and_repeated_frames_are_one_array(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4", steady(12, 12))
    first, second = list(read_frames(clip)), list(read_frames(clip))
    assert len(first) == 25
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)
    assert len({id(frame) for frame in first}) == 12
    with pytest.raises(ValueError, match="read-only"):
        first[0][:] = 0


def test_the_last_item_lasts_for_its_duration() -> None:
    items = [(Fraction(0), Fraction(1, 25), "a"), (Fraction(1, 25), Fraction(1, 5), "b")]
    assert "".join(nearest_items(items)) == "abbbbb"
    assert list(nearest_items([])) == []
    assert list(nearest_items([(Fraction(7), Fraction(0), "only")])) == ["only"]


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
@pytest.mark.parametrize("mirrors", [(False, False), (True, False), (False, True)])
def test_display_matrix_of_phones(tmp_path: Path, degrees: int, mirrors: tuple[bool, bool]) -> None:
    stored = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    stored[: HEIGHT // 2, : WIDTH // 2] = 255
    stored[: HEIGHT // 2, WIDTH // 2 :] = 128
    clip = write_clip(
        tmp_path / "clip.mp4",
        steady(3, 25),
        frames=[stored] * 3,
        options={"crf": "1"},
        rotation=(degrees, *mirrors),
    )
    shown = np.rot90(stored, degrees // 90)
    shown = shown[:, ::-1] if mirrors[0] else shown
    shown = shown[::-1] if mirrors[1] else shown
    frame = next(read_frames(clip))
    assert frame.shape == shown.shape
    assert np.abs(frame.astype(int) - shown).max() < 12
    info = probe_video(clip)
    assert (info.height, info.width) == shown.shape[:2]


def test_ten_bit_and_odd_sizes(tmp_path: Path) -> None:
    picture = np.zeros((37, 51, 3), np.uint8)
    picture[:, :17], picture[:, 17:34], picture[:, 34:] = (200, 30, 60), (20, 180, 90), (70, 60, 220)
    clip = write_clip(
        tmp_path / "clip.mkv", steady(4, 25), frames=[picture] * 4, codec="ffv1", pix_fmt="yuv444p10le"
    )
    frames = list(read_frames(clip))
    assert len(frames) == 4
    assert np.abs(frames[0].astype(int) - picture).max() <= 2


def test_probe(tmp_path: Path) -> None:
    info = probe_video(write_clip(tmp_path / "clip.mp4", steady(30, 30)))
    assert (info.width, info.height, info.fps, info.has_audio) == (WIDTH, HEIGHT, 30, False)
    assert info.duration == pytest.approx(1.0, abs=0.05)
    assert info.colour == Colour(6, 6, 6)  # Untagged and small.
    assert info.aspect == 1


def test_unreadable_input(tmp_path: Path) -> None:
    text = tmp_path / "text.mp4"
    text.write_text("not a video" * 100)
    sound = tmp_path / "sound.wav"
    write_sound(sound, 0.5, 16_000)
    whole = write_clip(tmp_path / "whole.mp4", steady(30, 25)).read_bytes()
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole[: len(whole) // 2])
    empty = tmp_path / "empty.mp4"
    start = whole.index(b"mdat") + 4
    stop = whole.index(b"moov", start) - 4
    empty.write_bytes(whole[:start] + bytes(stop - start) + whole[stop:])
    cases = {
        tmp_path / "nothing.mp4": "cannot read the video",
        tmp_path: "cannot read the video",
        text: "cannot read the video",
        cut: "cannot read the video",
        sound: "has no video stream",
        empty: "not one frame",
    }
    for path, message in cases.items():
        for read in (probe_video, count_frames, lambda p: next(read_frames(p))):
            with pytest.raises(UserError, match=message) as raised:
                read(path)
            assert str(path) in str(raised.value)


def test_a_truncated_stream_is_read_to_its_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = write_clip(tmp_path / "whole.mkv", steady(40, 25), gop=5).read_bytes()
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(whole[: len(whole) * 2 // 3])
    with caplog.at_level(logging.WARNING):
        numbers = [number_of(frame) for frame in read_frames(cut)]
    assert 15 < len(numbers) < 40
    assert numbers == list(range(len(numbers)))
    assert count_frames(cut) == len(numbers)


def test_source_index_follows_what_a_longer_voice_does() -> None:
    assert [source_index(i, 4) for i in range(10)] == [0, 1, 2, 3, 2, 1, 0, 1, 2, 3]
    assert [source_index(i, 1) for i in range(3)] == [0, 0, 0]
    assert [source_index(i, 2) for i in range(5)] == [0, 1, 0, 1, 0]
    assert [source_index(i, 3, "loop") for i in range(7)] == [0, 1, 2, 0, 1, 2, 0]
    for held in ("freeze", "stop"):
        assert [source_index(i, 3, held) for i in range(5)] == [0, 1, 2, 2, 2]
    with pytest.raises(ValueError, match="0 frames"):
        source_index(0, 0)


CLIPS = {
    "cfr.mp4": (steady(30, 25), {}),
    "b_frames.mp4": (steady(30, 25), {"options": {"bf": "3", "x264-params": "open-gop=1"}}),
    "one_key_frame.mkv": (steady(30, 30), {"gop": 300}),
    "transport.ts": (steady(26, 24, start=2), {"options": {"bf": "2"}}),
    "open_gop.mkv": (steady(30, 25), {"codec": "libx265", "options": {"x265-params": "log-level=none"}}),
    "broken_starts.ts": (steady(40, 25), {"codec": "mpeg4", "gop": 10, "base": Fraction(1, 25)}),
    "no_times.h264": (steady(20, 25), {"container_format": "h264"}),
    "variable.mkv": ([Fraction(i * i + 40 * i, 1500) for i in range(25)], {}),
    "still.mp4": (steady(1, 25), {}),
    "pair.mp4": (steady(2, 25), {}),
}


@pytest.mark.parametrize("name", CLIPS)
def test_to_and_fro_equals_indexing(tmp_path: Path, name: str) -> None:
    times, how = CLIPS[name]
    clip = write_clip(tmp_path / name, times, **how)
    forward = list(read_frames(clip))
    count = 2 * len(forward) + 13
    played = list(pingpong_frames(clip, count, buffer_bytes=7 * forward[0].nbytes))
    assert len(played) == count
    for i, frame in enumerate(played):
        np.testing.assert_array_equal(frame, forward[source_index(i, len(forward))], err_msg=f"{name} {i}")


@pytest.mark.parametrize("longer", ["to-and-fro", "loop", "freeze", "stop"])
def test_playing_on_equals_indexing(tmp_path: Path, longer: Longer) -> None:
    clip = write_clip(tmp_path / "clip.mkv", steady(7, 25))
    forward = list(read_frames(clip))
    played = list(played_frames(clip, 17, longer))
    assert len(played) == 17
    for i, frame in enumerate(played):
        np.testing.assert_array_equal(frame, forward[source_index(i, 7, longer)], err_msg=str(i))


def test_backward_play_seeks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = write_clip(tmp_path / "clip.mp4", steady(48, 25), gop=6)
    decoded = 0

    def counting(*streams: object) -> Iterable[VideoFrame]:
        nonlocal decoded
        for frame in original(*streams):
            decoded += 1
            yield frame

    original = playback.decode_frames
    monkeypatch.setattr(playback, "decode_frames", counting)
    frames = read_range(clip, scan_timeline(clip), 38, 41)
    assert [number_of(frame) for frame in frames] == [38, 39, 40]
    assert decoded < 12


def colours() -> np.ndarray:
    """An 8 x 8 block for each of many colours."""
    values = np.stack(np.meshgrid(*[np.arange(40, 221, 30)] * 3), axis=-1).reshape(-1, 3)
    picture = np.repeat(np.repeat(values[: 18 * 18].reshape(18, 18, 3), 8, axis=0), 8, axis=1)
    return np.ascontiguousarray(picture.astype(np.uint8))


@pytest.mark.parametrize("colour", [Colour(), Colour(6, 6, 6), Colour(9, 9, 18)])
def test_written_colours_match_their_tags(tmp_path: Path, colour: Colour) -> None:
    picture, path = colours(), tmp_path / "out.mp4"
    height, width = picture.shape[:2]
    with VideoWriter(path, width, height, quality=1, colour=colour) as writer:
        for _ in range(3):
            writer.write(picture)
    info = probe_video(path)
    assert info.colour == colour
    difference = (next(read_frames(path)).astype(int) - picture)[4::8, 4::8]
    assert np.abs(difference.mean(axis=(0, 1))).max() < 0.5
    assert np.abs(difference).max() <= 4
    with av.open(str(path)) as container:
        luma = next(container.decode(video=0)).to_ndarray()[:height, :width]
    red, blue = {1: (0.2126, 0.0722), 6: (0.299, 0.114), 9: (0.2627, 0.0593)}[colour.matrix]
    expected = 16 + 219 / 255 * picture @ np.array([red, 1 - red - blue, blue])
    assert np.abs(luma - expected).mean() < 1


def test_full_range_input(tmp_path: Path) -> None:
    ramp = np.repeat(np.tile(np.arange(0, 256, 4, dtype=np.uint8), (48, 1))[..., None], 3, axis=2)
    clip = write_clip(
        tmp_path / "clip.mkv", steady(2, 25), frames=[ramp] * 2, codec="mjpeg", pix_fmt="yuvj420p"
    )
    assert np.abs(next(read_frames(clip)).astype(int) - ramp).mean() < 6


def test_an_untagged_hd_clip_is_bt709(tmp_path: Path) -> None:
    picture = np.full((720, 1280, 3), (180, 60, 90), np.uint8)
    clip = write_clip(tmp_path / "clip.mp4", steady(2, 25), frames=[picture] * 2, options={"crf": "1"})
    with av.open(str(clip)) as container:
        luma = next(container.decode(video=0)).to_ndarray()[360, 640].astype(int)
    assert probe_video(clip).colour == Colour(1, 1, 1)
    grey = next(read_frames(clip))[360, 640] @ np.array([0.2126, 0.7152, 0.0722])
    assert 16 + 219 / 255 * grey == pytest.approx(luma, abs=1)


@pytest.mark.parametrize(("rate", "channels"), [(16_000, 1), (22_050, 2), (44_100, 2), (48_000, 1)])
def test_the_voice_is_complete_at_its_own_rate(tmp_path: Path, rate: int, channels: int) -> None:
    sound, path = tmp_path / "voice.wav", tmp_path / "out.mp4"
    write_sound(sound, 2.385, rate, channels)
    with VideoWriter(path, WIDTH, HEIGHT, sound) as writer:
        for i in range(60):
            writer.write(numbered(i))
    with av.open(str(path)) as container:
        audio, video = container.streams.audio[0], container.streams.video[0]
        assert (audio.rate, audio.channels) == (rate, channels)
        assert audio.start_time == video.start_time == 0
        assert float(video.duration * video.time_base) == pytest.approx(2.4, abs=1e-6)
    assert count_frames(path) == 60
    written, given = read_audio(path), read_audio(sound)
    assert len(written) == len(given)
    alike = [np.corrcoef(written[99:-99], np.roll(given, shift)[99:-99])[0, 1] for shift in (-1, 0, 1)]
    assert alike[1] > 0.95
    assert alike[1] == max(alike)


def test_sound_and_picture_lie_side_by_side_in_the_file(tmp_path: Path) -> None:
    sound, path = tmp_path / "voice.wav", tmp_path / "out.mp4"
    write_sound(sound, 15.0, 16_000)
    with VideoWriter(path, WIDTH, HEIGHT, sound, preset="ultrafast") as writer:
        for i in range(375):
            writer.write(numbered(i % 256))
    with av.open(str(path)) as container:
        packets = [(p.pos, float(p.dts * p.time_base), p.stream.type) for p in container.demux() if p.size]
    latest = {"audio": 0.0, "video": 0.0}
    for _, time, kind in sorted(packets):
        latest[kind] = time
        assert abs(latest["audio"] - latest["video"]) < 1
    content = path.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")


def test_a_voice_longer_or_shorter_than_the_picture(tmp_path: Path) -> None:
    sound, path = tmp_path / "voice.wav", tmp_path / "out.mov"
    write_sound(sound, 1.0, 16_000)
    for frames in (5, 50):
        with VideoWriter(path, WIDTH, HEIGHT, sound) as writer:
            for i in range(frames):
                writer.write(numbered(i))
        assert count_frames(path) == frames
        assert len(read_audio(path)) == 16_000


def test_odd_sizes_keep_every_pixel(tmp_path: Path) -> None:
    picture = np.tile(np.linspace(40, 210, 51).astype(np.uint8)[None, :, None], (37, 1, 3))
    with VideoWriter(tmp_path / "out.mp4", 51, 37, quality=1) as writer:
        writer.write(picture)
    frame = next(read_frames(tmp_path / "out.mp4"))
    assert frame.shape == (38, 52, 3)
    assert np.abs(frame[:37, :51].astype(int) - picture).max() <= 6


def test_pixel_shape_is_kept(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "out.mp4", WIDTH, HEIGHT, aspect=Fraction(4, 3)) as writer:
        writer.write(numbered(0))
    assert probe_video(tmp_path / "out.mp4").aspect == Fraction(4, 3)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_after_an_error(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "out.mp4"
    path.write_bytes(b"the older file")
    with pytest.raises(error), VideoWriter(path, WIDTH, HEIGHT) as writer:  # noqa: PT012
        for i in range(80):  # More than the encoder holds back, so that the temporary file exists.
            writer.write(numbered(i))
        assert len(list(tmp_path.iterdir())) == 2
        raise error
    assert path.read_bytes() == b"the older file"
    assert list(tmp_path.iterdir()) == [path]


def test_a_voice_without_sound_leaves_nothing(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4", steady(3, 25))
    with pytest.raises(UserError, match="no audio stream"):
        VideoWriter(tmp_path / "out.mp4", WIDTH, HEIGHT, clip)
    assert list(tmp_path.iterdir()) == [clip]


def test_wrong_frames_are_refused(tmp_path: Path) -> None:
    writer = VideoWriter(tmp_path / "out.mp4", WIDTH, HEIGHT)
    with pytest.raises(ValueError, match="no frame"), writer:
        pass
    with (
        pytest.raises(ValueError, match="expected a uint8 frame"),
        VideoWriter(tmp_path / "out.mp4", WIDTH, HEIGHT) as writer,
    ):
        writer.write(np.zeros((HEIGHT, WIDTH, 3), np.float32))
    assert list(tmp_path.iterdir()) == []


def test_check_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_writable(tmp_path / "out.mp4")
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "file").touch()
    cases = {
        tmp_path / "out.avi": "must end in",
        tmp_path / "out": "must end in",
        tmp_path / "folder.mp4": "is a folder",
        tmp_path / "missing" / "out.mp4": "does not exist",
        tmp_path / "file" / "out.mp4": "does not exist",
    }
    before = sorted(tmp_path.iterdir())
    for path, message in cases.items():
        with pytest.raises(UserError, match=message):
            check_writable(path)
        with pytest.raises(UserError, match=message):
            VideoWriter(path, WIDTH, HEIGHT)
    assert sorted(tmp_path.iterdir()) == before

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, os.strerror(13))

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        with pytest.raises(UserError, match="Permission denied"):
            check_writable(tmp_path / "out.mp4")


def test_missing_encoder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_x264(name: str, mode: str) -> object:
        if name == "libx264":
            raise av.codec.codec.UnknownCodecError(name)
        return original(name, mode)

    original = av.Codec
    monkeypatch.setattr(av, "Codec", without_x264)
    with pytest.raises(UserError, match="no libx264 encoder"):
        check_writable(tmp_path / "out.mp4")


def test_the_real_clip(real: Path) -> None:
    clip = real / "demo1_video.mp4"
    info = probe_video(clip)
    assert (info.width, info.height, info.fps, info.has_audio) == (1080, 1920, 25, True)
    assert info.colour == Colour(1, 1, 1)
    with av.open(str(clip)) as container:
        stored = [
            frame.to_ndarray(format="rgb24") for frame in itertools.islice(container.decode(video=0), 3)
        ]
    for frame, reference in zip(read_frames(clip), stored, strict=False):
        assert frame.flags.c_contiguous
        assert np.abs(frame.astype(int) - reference).mean() < 2


def test_threads_encode_whole_frames_side_by_side(tmp_path: Path) -> None:
    """A frame that threads share is cut into slices, which cost bits, and ends when its slowest one does."""
    path = tmp_path / "video.mp4"
    with VideoWriter(path, 320, 240, threads=4) as writer:
        for i in range(6):
            writer.write(np.full((240, 320, 3), 40 * i, np.uint8))
    slices = []
    with av.open(str(path)) as container:
        for packet in container.demux(video=0):
            data, kinds = bytes(packet), []
            while data:
                size = int.from_bytes(data[:4], "big")
                kinds.append(data[4] & 31)
                data = data[4 + size :]
            slices.append(sum(kind in (1, 5) for kind in kinds))  # coded slices, of a picture or a key frame
    assert slices[:6] == [1] * 6
