"""Reading a voice: exact samples, alignment, pauses, and the errors a user can cause."""

import wave
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from keysync_jax.errors import UserError
from keysync_jax.media.audio import AudioInfo, frames_of, open_voice, probe_audio, read_audio


def speech_like(samples: int, rate: int, channels: int = 1, seed: int = 0) -> np.ndarray:
    """Band-limited noise in [-0.9, 0.9], float64 `[channels, samples]`, the same curve at every rate."""
    rng = np.random.default_rng(seed)
    time = np.arange(samples) / rate
    tones = [(rng.uniform(80, 3000), rng.uniform(0, 6.28), rng.uniform(0.2, 1)) for _ in range(20 * channels)]
    voices = [
        sum(a * np.sin(6.2832 * f * time + p) for f, p, a in tones[c::channels]) for c in range(channels)
    ]
    return np.stack(voices) * 0.9 / 12


def write_audio(
    path: Path,
    wave_form: np.ndarray,
    rate: int,
    codec: str = "pcm_s16le",
    sample_format: str = "s16",
    layout: str = "mono",
    start: Fraction = Fraction(0),
    gap: tuple[int, Fraction] | None = None,
    with_video: bool = False,
) -> Path:
    """Encode float `[channels, n]`; times begin at `start` and jump by gap[1] s at sample gap[0]."""
    scales = {"s16": 32767, "s32": 2**31 - 1, "fltp": 1, "u8": 127}
    dtypes = {"s16": np.int16, "s32": np.int32, "fltp": np.float32, "u8": np.uint8}
    dtype, scale = dtypes[sample_format], scales[sample_format]
    scaled = wave_form * scale + (128 if dtype == np.uint8 else 0)
    data = (np.rint(scaled) if scale != 1 else scaled).astype(dtype)
    with av.open(str(path), "w") as container:
        video = container.add_stream("mpeg4", rate=25) if with_video else None
        stream = container.add_stream(codec, rate=rate, layout=layout)
        if video is not None:
            video.width = video.height = 32
            video.pix_fmt = "yuv420p"
            for i in range(25):
                picture = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), "rgb24")
                picture.pts, picture.time_base = i, Fraction(1, 25)
                container.mux(video.encode(picture))
            container.mux(video.encode(None))
        block = stream.codec_context.frame_size or 1024
        for first in range(0, data.shape[1], block):
            part = data[:, first : first + block]
            part = part if sample_format.endswith("p") else part.T.reshape(1, -1)
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(part), sample_format, layout)
            late = gap[1] if gap is not None and first >= gap[0] else 0
            frame.sample_rate, frame.time_base = rate, Fraction(1, rate)
            frame.pts = first + round((start + late) * rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def test_a_16_khz_wav_is_read_to_the_bit(tmp_path: Path) -> None:
    path = tmp_path / "voice.wav"
    pcm = (speech_like(12_345, 16_000)[0] * 32767).astype(np.int16)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(pcm.tobytes())
    voice = read_audio(path)
    assert voice.dtype == np.float32
    np.testing.assert_array_equal(voice, pcm / 32768)
    assert probe_audio(path) == AudioInfo(16_000, 1, pytest.approx(12_345 / 16_000, abs=1e-4))


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000, 96_000])
def test_resampling_keeps_time_and_length(tmp_path: Path, rate: int) -> None:
    samples = rate * 3 + 17
    path = write_audio(tmp_path / "voice.wav", speech_like(samples, rate), rate)
    voice = read_audio(path)
    assert len(voice) == round(Fraction(samples * 16_000, rate))
    expected = speech_like(len(voice), 16_000)[0]
    np.testing.assert_allclose(voice[200:-200], expected[200:-200], atol=2e-3)


@pytest.mark.parametrize(
    ("suffix", "codec", "sample_format"),
    [("wav", "pcm_u8", "u8"), ("wav", "pcm_s32le", "s32"), ("flac", "flac", "s16")],
)
def test_sample_formats(tmp_path: Path, suffix: str, codec: str, sample_format: str) -> None:
    given = speech_like(9_000, 16_000)
    path = write_audio(tmp_path / f"voice.{suffix}", given, 16_000, codec, sample_format)
    np.testing.assert_allclose(read_audio(path), given[0], atol=1e-2 if sample_format == "u8" else 1e-4)


def test_channels_are_averaged(tmp_path: Path) -> None:
    stereo = speech_like(9_000, 16_000, channels=2)
    path = write_audio(tmp_path / "voice.wav", stereo, 16_000, layout="stereo")
    np.testing.assert_allclose(read_audio(path), stereo.mean(axis=0), atol=1e-4)
    loud = np.full((2, 4000), 0.999)
    path = write_audio(tmp_path / "loud.wav", loud, 16_000, layout="stereo")
    np.testing.assert_allclose(read_audio(path), 0.999, atol=1e-4)


def test_surround_becomes_stereo(tmp_path: Path) -> None:
    silence = np.zeros((6, 9_000))
    silence[2] = speech_like(9_000, 16_000)[0] / 2  # The centre channel, where dialogue is.
    path = write_audio(tmp_path / "voice.wav", silence, 16_000, layout="5.1")
    with open_voice(path) as voice:
        assert (voice.rate, voice.layout) == (16_000, "stereo")
        blocks = np.concatenate(list(voice.blocks), axis=1)
    assert blocks.shape == (2, 9_000)
    np.testing.assert_allclose(read_audio(path), silence[2] * np.sqrt(0.5), atol=1e-3)


@pytest.mark.parametrize(("suffix", "rate"), [("m4a", 44_100), ("mp4", 16_000), ("m4a", 48_000)])
def test_aac_in_mp4_keeps_start_and_end(tmp_path: Path, suffix: str, rate: int) -> None:
    samples = rate * 2 + 123
    path = write_audio(tmp_path / f"voice.{suffix}", speech_like(samples, rate), rate, "aac", "fltp")
    voice = read_audio(path)
    assert len(voice) == round(Fraction(samples * 16_000, rate))
    expected = speech_like(len(voice), 16_000)[0]
    alike = [np.corrcoef(voice[999:-999], np.roll(expected, s)[999:-999])[0, 1] for s in (-2, -1, 0, 1, 2)]
    assert np.argmax(alike) == 2
    assert alike[2] > 0.98


def test_a_track_that_starts_late_is_led_in_by_silence(tmp_path: Path) -> None:
    given = speech_like(8_000, 16_000)
    path = write_audio(
        tmp_path / "clip.mkv", given, 16_000, start=Fraction(1, 2), with_video=True, codec="pcm_s16le"
    )
    voice = read_audio(path)
    np.testing.assert_array_equal(voice[:8_000], 0)
    np.testing.assert_allclose(voice[8_000:], given[0], atol=1e-4)


def test_a_gap_in_the_timestamps_is_a_pause(tmp_path: Path) -> None:
    given = speech_like(8_192, 16_000)
    path = write_audio(tmp_path / "clip.mkv", given, 16_000, gap=(4_096, Fraction(1, 4)))
    voice = read_audio(path)
    assert len(voice) == 8_192 + 4_000
    np.testing.assert_allclose(voice[:4_096], given[0, :4_096], atol=1e-4)
    np.testing.assert_array_equal(voice[4_096:8_096], 0)
    np.testing.assert_allclose(voice[8_096:], given[0, 4_096:], atol=1e-4)


def test_millisecond_timestamps_are_no_pauses(tmp_path: Path) -> None:
    given = speech_like(44_100, 44_100)
    path = write_audio(tmp_path / "clip.mkv", given, 44_100)
    assert len(read_audio(path)) == 16_000


def test_frames_of_covers_every_sample() -> None:
    assert [frames_of(n) for n in (0, 1, 639, 640, 641, 153_600)] == [0, 1, 1, 1, 2, 240]
    assert frames_of(44_100, rate=44_100) == 25


def test_unreadable_input(tmp_path: Path) -> None:
    text = tmp_path / "text.wav"
    text.write_text("not a sound" * 100)
    silent = tmp_path / "silent.mp4"
    with av.open(str(silent), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), "rgb24")
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    empty = tmp_path / "empty.wav"
    with wave.open(str(empty), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
    cases = {
        tmp_path / "nothing.wav": "cannot read the audio",
        tmp_path: "cannot read the audio",
        text: "cannot read the audio",
        silent: "has no audio stream",
        empty: "not one sample",
    }
    for path, message in cases.items():
        with pytest.raises(UserError, match=message) as raised:
            read_audio(path)
        assert str(path) in str(raised.value)
    with pytest.raises(UserError, match="no audio stream"):
        probe_audio(silent)


def test_the_real_voice(real: Path) -> None:
    voice = read_audio(real / "demo1_audio.wav")
    with wave.open(str(real / "demo1_audio.wav")) as file:
        pcm = np.frombuffer(file.readframes(file.getnframes()), np.int16)
    np.testing.assert_array_equal(voice, pcm / 32768)
    assert len(voice) == 153_600
    assert frames_of(len(voice)) == 240
    assert probe_audio(real / "demo1_audio.wav") == AudioInfo(16_000, 1, 9.6)
