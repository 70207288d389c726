"""Timestamps that jump: they count as one frame's time, and the sound stays in step."""

import logging
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.frame import VideoFrame

from keysync_jax.media.audio import RATE, read_audio
from keysync_jax.media.playback import pingpong_frames, read_range
from keysync_jax.media.soundtrack import read_soundtrack
from keysync_jax.media.timeline import Clock, Jump, source_index
from keysync_jax.media.video import count_frames, read_frames, scan_timeline
from tests.media.test_video import number_of, numbered, steady, write_clip

HOURS = 36_000
"""Seconds of a jump by ten hours."""

MILLISECOND = Fraction(1, 1000)
"""A time base in which MP4 can hold such a jump."""

FRAMES, JUMP_AT = 50, 20
FLASHES = np.isin(np.arange(FRAMES), [5, 18, 20, 23, 31, 44])


def jumping(seconds: int, count: int = FRAMES, at: int = JUMP_AT) -> list[Fraction]:
    """Frame times at 25 fps that jump before frame `at`."""
    return [time + (seconds if i >= at else 0) for i, time in enumerate(steady(count, 25))]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("at", [1, JUMP_AT, FRAMES - 1])
def test_a_jump_by_ten_hours_adds_no_frame(
    tmp_path: Path, suffix: str, at: int, caplog: pytest.LogCaptureFixture
) -> None:
    clip = write_clip(tmp_path / f"clip{suffix}", jumping(HOURS, at=at), rate=Fraction(25), base=MILLISECOND)
    timeline = scan_timeline(clip)
    np.testing.assert_array_equal(timeline.index, np.arange(FRAMES))
    (jump,) = timeline.jumps
    assert jump.after - jump.before == HOURS
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    moment = f"0:00:0{at / 25:.3f} to 10:00:0{at / 25:.3f}"
    assert warning == f"{clip}: the timestamps of its picture jump from {moment}; no time passes there"
    assert [number_of(frame) for frame in read_frames(clip)] == list(range(FRAMES))


def test_a_gap_of_less_than_ten_seconds_is_shown(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mkv", jumping(9), rate=Fraction(25))
    timeline = scan_timeline(clip)
    assert len(timeline) == FRAMES + 9 * 25
    assert timeline.jumps == ()


def test_to_and_fro_over_a_jump_equals_indexing(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4", jumping(HOURS), rate=Fraction(25), base=MILLISECOND)
    played = pingpong_frames(clip, 2 * FRAMES, buffer_bytes=7 * 48 * 64 * 3)
    assert [number_of(frame) for frame in played] == [source_index(i, FRAMES) for i in range(2 * FRAMES)]


def test_a_last_frame_that_lasts_for_hours(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain, long = write_clip(tmp_path / "plain.mp4", steady(10, 25), base=MILLISECOND), tmp_path / "long.mp4"
    with av.open(str(plain)) as read, av.open(str(long), "w") as write:
        stream = write.add_stream_from_template(read.streams.video[0])
        packets = [packet for packet in read.demux() if packet.dts is not None]
        packets[-1].duration = HOURS * packets[-1].time_base.denominator
        for packet in packets:
            packet.stream = stream
            write.mux(packet)
    with av.open(str(long)) as container:
        *_, last = container.decode(video=0)
    assert last.duration * last.time_base == HOURS
    assert count_frames(long) == 10
    assert "jump from 0:00:00.400 to 10:00:00.360" in caplog.text


def joined(folder: Path, write: Callable[[Path], Path]) -> Path:
    """Two transport streams one behind the other, so that the clock of the second starts anew."""
    part = write(folder / "part.ts")
    whole = folder / "whole.ts"
    whole.write_bytes(2 * part.read_bytes())
    return whole


def test_a_clock_that_starts_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """At another rate than the header's average, which would stretch it if it counted frames."""
    uneven = [Fraction(i, 50) for i in range(60)] + [Fraction(6, 5) + Fraction(i, 10) for i in range(14)]
    clip = joined(tmp_path, lambda path: write_clip(path, uneven, codec="mpeg4", base=Fraction(1, 50)))
    timeline = scan_timeline(clip)
    numbers = [number_of(frame) for frame in read_frames(clip)]
    assert timeline.source_frames == 2 * len(uneven)
    half = len(scan_timeline(tmp_path / "part.ts"))
    assert abs(len(timeline) - 2 * half) <= 2
    assert abs(numbers.index(0, 10) - half) <= 2
    assert not timeline.is_ordered
    assert caplog.text.count("to 0:00:00.000; no time passes there") == 1
    played = list(pingpong_frames(clip, 2 * len(timeline) - 1, buffer_bytes=40 * 48 * 64 * 3))
    assert [number_of(frame) for frame in played] == numbers + numbers[-2::-1]


def test_frames_with_the_same_timestamp_are_not_mistaken(tmp_path: Path) -> None:
    """Sought by its timestamp, a frame of the second part would be one of the first."""
    halves = [
        write_clip(
            tmp_path / f"{first}.ts",
            steady(60, 25),
            frames=[numbered(first + i) for i in range(60)],
            codec="mpeg4",
            base=Fraction(1, 25),
        )
        for first in (0, 60)
    ]
    whole = tmp_path / "whole.ts"
    whole.write_bytes(b"".join(half.read_bytes() for half in halves))
    timeline = scan_timeline(whole)
    for start in range(0, 119, 7):
        stop = min(start + 7, 120)
        found = [number_of(frame) for frame in read_range(whole, timeline, start, stop)]
        assert found == list(range(start, stop))


def test_small_disorder_is_no_jump() -> None:
    clock = Clock(Fraction(1, 25))
    stamps = [
        Fraction(0),
        Fraction(1, 25),
        Fraction(1, 25),
        None,
        Fraction(9, 50),
        Fraction(4, 25),
        Fraction(1),
    ]
    expected = [Fraction(n, 50) for n in (0, 2, 4, 6, 9, 11, 50)]
    assert [clock.time(stamp) for stamp in stamps] == expected
    assert clock.jumps == []


def test_jumps_in_exact_fractions() -> None:
    step = Fraction(1001, 30_000)
    clock = Clock(Fraction(HOURS))  # an average rate that the jumps are part of
    stamps = [0 * step, step, 2 * step + HOURS, 3 * step + HOURS, step, 2 * step]
    assert [clock.time(stamp) for stamp in stamps] == [i * step for i in range(6)]
    assert clock.jumps == [Jump(2 * step, 2 * step + HOURS), Jump(4 * step + HOURS, step)]


def write_flashes(
    path: Path,
    picture: Callable[[Fraction], Fraction] = Fraction,
    sound: Callable[[Fraction], Fraction] = Fraction,
    between: int = 0,
    codecs: tuple[str, str] = ("ffv1", "pcm_s16le"),
) -> Path:
    """White frames at `FLASHES`, each with a tone of the same 40 ms; times as the two functions give them.

    between: blocks of tone between the sound of frame `JUMP_AT` and the one before, which go with no frame.
    """
    base, block = Fraction(1, 90_000), RATE // 25
    tone = (8000 * np.sin(np.arange(block) / 4)).astype(np.int16)[None]
    with av.open(str(path), "w") as container:
        video = container.add_stream(codecs[0], rate=25)
        video.width, video.height, video.pix_fmt, video.time_base = 64, 48, "yuv420p", base
        audio = container.add_stream(codecs[1], rate=RATE, layout="mono")
        packets = []
        loud = [*FLASHES[:JUMP_AT], *[True] * between, *FLASHES[JUMP_AT:]]
        for i, on in enumerate(loud):
            frame = av.AudioFrame.from_ndarray(tone * on, "s16", "mono")
            frame.sample_rate, frame.time_base = RATE, Fraction(1, RATE)
            frame.pts = round(sound(Fraction(i, 25)) * RATE)
            packets += audio.encode(frame)
        packets += audio.encode(None)
        for i, on in enumerate(FLASHES):
            shown = VideoFrame.from_ndarray(np.full((48, 64, 3), 235 if on else 20, np.uint8), "rgb24")
            shown.pts, shown.time_base = round(picture(Fraction(i, 25)) / base), base
            packets += video.encode(shown)
        packets += video.encode(None)
        container.mux(sorted(packets, key=lambda packet: (packet.dts or 0) * packet.time_base))
    return path


def after_jump(seconds: int) -> Callable[[Fraction], Fraction]:
    return lambda time: time + (seconds if time >= Fraction(JUMP_AT, 25) else 0)


def flashes_and_tones(path: Path) -> tuple[np.ndarray, np.ndarray]:
    shown = np.array([frame.mean() > 128 for frame in read_frames(path)])
    wave = read_soundtrack(path, scan_timeline(path))
    blocks = wave[: len(wave) // 640 * 640].reshape(-1, 640)
    return shown, np.abs(blocks).mean(axis=1) > 0.07


@pytest.mark.parametrize("seconds", [0, 5, 60, 900, HOURS])
def test_sound_that_jumps_with_the_picture(tmp_path: Path, seconds: int) -> None:
    """Up to the limit both are shown and heard; beyond it, and beyond the sound's own, neither is."""
    path = write_flashes(tmp_path / "clip.mkv", after_jump(seconds), after_jump(seconds))
    shown, heard = flashes_and_tones(path)
    assert len(shown) == len(heard) == FRAMES + (seconds * 25 if seconds <= 10 else 0)
    rest = FRAMES - JUMP_AT
    for stretch in (slice(JUMP_AT), slice(-rest, None)):
        np.testing.assert_array_equal(shown[stretch], FLASHES[stretch])
        np.testing.assert_array_equal(heard[stretch], FLASHES[stretch])


@pytest.mark.parametrize("seconds", [12, 60])
def test_sound_that_goes_on_while_the_picture_jumps(tmp_path: Path, seconds: int) -> None:
    path = write_flashes(tmp_path / "clip.mkv", after_jump(seconds), between=seconds * 25)
    shown, heard = flashes_and_tones(path)
    np.testing.assert_array_equal(shown, FLASHES)
    np.testing.assert_array_equal(shown, heard)


def test_sound_whose_own_clock_goes_on(tmp_path: Path) -> None:
    """Only the picture's clock was set anew."""
    path = write_flashes(tmp_path / "clip.mkv", after_jump(HOURS))
    shown, heard = flashes_and_tones(path)
    np.testing.assert_array_equal(shown, FLASHES)
    np.testing.assert_array_equal(heard[:JUMP_AT], FLASHES[:JUMP_AT])


def test_sound_and_picture_start_anew_together(tmp_path: Path) -> None:
    clip = joined(tmp_path, lambda path: write_flashes(path, codecs=("mpeg4", "mp2")))
    shown, heard = flashes_and_tones(clip)
    assert len(shown) == 2 * FRAMES
    for at in np.flatnonzero(shown):
        assert heard[max(at - 1, 0) : at + 2].any(), at
    for at in np.flatnonzero(heard[: len(shown)]):
        assert shown[max(at - 1, 0) : at + 2].any(), at


def test_a_sound_that_jumps_alone_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_flashes(tmp_path / "clip.mkv", sound=after_jump(HOURS))
    assert len(read_audio(path)) == FRAMES * 640
    assert "the timestamps of its sound jump from 0:00:00.800 to 10:00:00.800" in caplog.text
