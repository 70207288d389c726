"""The voice of the synthetic world: its sounds, its mouth, and that one follows from the other."""

import numpy as np
import pytest

from keysync_jax.synthetic.articulation import Articulation
from keysync_jax.synthetic.phonemes import (
    INDEX,
    PHONEMES,
    SILENCE,
    Utterance,
    articulate,
    draw_utterance,
    excerpt,
    frame_times,
    phonemes_of_frames,
    silent_utterance,
)
from keysync_jax.synthetic.voice import Speaker, draw_speaker, synthesise

FIELDS = ("opening", "width", "rounding", "teeth")


def said(*segments: tuple[str, float]) -> Utterance:
    """An utterance of (symbol, seconds)."""
    edges = np.concatenate([[0.0], np.cumsum([seconds for _, seconds in segments])])
    return Utterance(np.array([INDEX[symbol] for symbol, _ in segments]), edges)


def drawn(seed: int, seconds: float) -> tuple[Utterance, Speaker, np.ndarray]:
    rng = np.random.default_rng(seed)
    speaker = draw_speaker(rng)
    utterance = draw_utterance(rng, seconds, speaker.speech_rate)
    return utterance, speaker, synthesise(utterance, speaker, rng)


def plain_speaker(**changes: float) -> Speaker:
    values = {
        "pitch": 110.0,
        "tract_scale": 1.0,
        "tilt": 0.6,
        "breathiness": 0.02,
        "vibrato": 0.0,
        "vibrato_rate": 5.0,
        "jitter": 0.0,
        "liveliness": 0.0,
        "loudness": 0.5,
        "speech_rate": 1.0,
        "background": 0.0,
    }
    return Speaker(**(values | changes))


def mel_bank(bands: int, points: int) -> np.ndarray:
    """Triangles on the mel scale from 60 Hz to 7.8 kHz, `[points // 2 + 1, bands]`."""
    frequencies = np.fft.rfftfreq(points, 1 / 16000)
    ends = 2595 * np.log10(1 + np.array([60.0, 7800.0]) / 700)
    edges = 700 * (10 ** (np.linspace(*ends, bands + 2) / 2595) - 1)
    rising = (frequencies[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - frequencies[:, None]) / (edges[2:] - edges[1:-1])
    return np.maximum(0, np.minimum(rising, falling))


def log_mel(sound: np.ndarray, frames: int) -> np.ndarray:
    """40 bands at eleven moments within 0.1 s of each frame's middle, `[T, 440]`."""
    moments = np.round(frame_times(frames) * 16000).astype(int)[:, None] + np.arange(-5, 6) * 320
    pieces = np.pad(sound, 4000)[moments[..., None] + 4000 + np.arange(-200, 200)]
    power = np.abs(np.fft.rfft(pieces * np.hanning(400), 512)) ** 2 @ mel_bank(40, 512)
    return np.log(power / power.mean() + 1e-4).reshape(frames, -1)


def test_the_same_seed_says_the_same():
    (utterance, speaker, sound), (again, same_speaker, same_sound) = drawn(3, 2.0), drawn(3, 2.0)
    assert speaker == same_speaker
    np.testing.assert_array_equal(utterance.phonemes, again.phonemes)
    np.testing.assert_array_equal(utterance.boundaries, again.boundaries)
    np.testing.assert_array_equal(sound, same_sound)
    assert not np.array_equal(sound, drawn(4, 2.0)[2])


@pytest.mark.parametrize("seconds", [0.05, 0.3, 1.0, 2.52, 7.9999])
def test_utterances_fill_their_time(seconds: float):
    for seed in range(5):
        utterance, _, sound = drawn(seed, seconds)
        edges = utterance.boundaries
        assert edges[0] == 0
        assert edges[-1] == utterance.seconds == seconds
        assert np.all(np.diff(edges) > 0)
        assert len(edges) == len(utterance.phonemes) + 1
        assert utterance.phonemes[0] == utterance.phonemes[-1] == SILENCE
        assert edges[-1] - edges[-2] < max(0.8, seconds / 2)
        assert sound.shape == (round(seconds * 16000),)
        assert sound.dtype == np.float32


def test_speech_has_pauses_and_every_sound():
    utterance = draw_utterance(np.random.default_rng(0), 300.0)
    assert set(utterance.phonemes) == set(range(len(PHONEMES)))
    pauses = np.diff(utterance.boundaries)[1:-1][utterance.phonemes[1:-1] == SILENCE]
    assert pauses.min() >= 0.15
    assert pauses.max() <= 2.0 + 1e-9
    assert 0.02 < np.mean(pauses > 0.8) < 0.25
    assert 40 < len(pauses) < 200


@pytest.mark.parametrize(
    ("start", "seconds"), [(0.0, 5.0), (0.0, 60.0), (3.21, 4.0), (58.9, 1.1), (7.0, 0.03)]
)
def test_an_excerpt_says_the_same_at_the_same_time(start: float, seconds: float):
    whole = draw_utterance(np.random.default_rng(4), 60.0)
    part = excerpt(whole, start, seconds)
    assert part.boundaries[0] == 0
    assert part.seconds == seconds
    assert len(part.boundaries) == len(part.phonemes) + 1
    assert np.all(np.diff(part.boundaries) >= min(0.04, seconds))
    times = np.linspace(0.04, seconds - 0.04, 200)
    if seconds > 0.08:
        np.testing.assert_array_equal(
            part.phonemes[part.segments_at(times)], whole.phonemes[whole.segments_at(times + start)]
        )


def test_an_excerpt_lies_within():
    whole = draw_utterance(np.random.default_rng(4), 10.0)
    for start, seconds in ((-0.1, 1.0), (9.5, 0.6)):
        with pytest.raises(ValueError, match="is not within 10"):
            excerpt(whole, start, seconds)


def test_a_higher_speech_rate_says_more():
    counts = [len(draw_utterance(np.random.default_rng(1), 60.0, rate).phonemes) for rate in (0.8, 1.2)]
    assert counts[1] > 1.2 * counts[0]


def test_speakers_are_within_range():
    speakers = [draw_speaker(np.random.default_rng(seed)) for seed in range(100)]
    pitches = np.array([s.pitch for s in speakers])
    assert pitches.min() >= 85
    assert pitches.max() <= 250
    assert pitches.std() > 30
    assert all(0.85 <= s.tract_scale <= 1.2 for s in speakers)
    assert 10 < sum(s.background == 0 for s in speakers) < 90


def test_the_loudest_sample_is_the_speakers():
    for seed in range(5):
        _, speaker, sound = drawn(seed, 2.0)
        assert np.abs(sound).max() == pytest.approx(speaker.loudness, abs=0.01)
        assert 0.3 <= speaker.loudness <= 0.8


def test_silence_is_silent_and_closed():
    utterance = silent_utterance(1.0)
    assert not synthesise(utterance, plain_speaker(), np.random.default_rng(0)).any()
    mouth = articulate(utterance, 25)
    assert not any(getattr(mouth, field).any() for field in FIELDS)
    noisy = synthesise(utterance, plain_speaker(background=0.001), np.random.default_rng(0))
    assert noisy.std() == pytest.approx(0.001, rel=0.05)


def test_a_pause_is_silent_and_closed():
    utterance = said(("a", 0.4), ("silence", 0.4), ("o", 0.4))
    sound = synthesise(utterance, plain_speaker(), np.random.default_rng(0))
    assert not sound[round(0.5 * 16000) : round(0.75 * 16000)].any()
    assert sound[: round(0.3 * 16000)].std() > 0.05
    middle = articulate(utterance, 30).opening[13:17]
    assert middle.max() < 1e-6
    assert articulate(said(("a", 0.4), ("silence", 0.16), ("o", 0.4)), 24).opening.min() > 0.05


@pytest.mark.parametrize("symbol", ["p", "b", "m"])
@pytest.mark.parametrize("vowel", ["a", "i", "o"])
def test_lips_meet(symbol: str, vowel: str):
    for seconds in (0.08, 0.09, 0.12):
        # The closure's middle is the middle of frame 5, 0.22 s.
        utterance = said((vowel, 0.22 - seconds / 2), (symbol, seconds), (vowel, 0.2))
        opening = articulate(utterance, 10).opening
        assert opening[5] < 0.02
        assert opening[2] > 0.7 * next(p for p in PHONEMES if p.symbol == vowel).opening


def test_lips_meet_in_whatever_is_said():
    utterance = draw_utterance(np.random.default_rng(5), 60.0, 1.15)
    mouth, closed = articulate(utterance, 1500), [INDEX[s] for s in "pbm"]
    frames = utterance.segments_at(frame_times(1500))
    for number in np.flatnonzero(np.isin(utterance.phonemes, closed)):
        assert mouth.opening[frames == number].min() < 0.05


def test_the_mouth_is_smooth_and_uses_its_range():
    mouth = articulate(draw_utterance(np.random.default_rng(2), 60.0), 1500)
    assert isinstance(mouth, Articulation)
    for field in FIELDS:
        values = getattr(mouth, field)
        assert values.shape == (1500,)
        assert values.dtype == np.float32
        assert np.ptp(values) > 0.7
        assert np.abs(np.diff(values)).max() < 0.75
    assert mouth.opening.min() == 0
    assert mouth.width.min() < -0.7
    assert mouth.width.max() > 0.6


def test_vowels_look_different():
    shapes = np.array([articulate(said((p.symbol, 0.6)), 15).opening[7] for p in PHONEMES])
    np.testing.assert_allclose(shapes, [p.opening for p in PHONEMES], atol=0.01)
    vowels = [(p.opening, p.width, p.rounding) for p in PHONEMES if p.kind == "vowel" and p.symbol != "y"]
    gaps = np.abs(np.array(vowels)[:, None] - np.array(vowels)).max(axis=-1)
    assert gaps[~np.eye(len(vowels), dtype=bool)].min() >= 0.15


def test_frames_know_their_phoneme():
    utterance = said(("silence", 0.1), ("m", 0.08), ("a", 0.22))
    symbols = [PHONEMES[i].symbol for i in phonemes_of_frames(utterance, 12)]
    assert symbols == ["silence"] * 2 + ["m"] * 2 + ["a"] * 8


@pytest.mark.parametrize("scale", [0.85, 1.0, 1.2])
@pytest.mark.parametrize("pitch", [85.0, 130.0, 200.0])
def test_vowels_have_their_formants(scale: float, pitch: float):
    """The loudest harmonic is the first formant's; the second formant stands out above the valley below."""
    speaker = plain_speaker(pitch=pitch, tract_scale=scale)
    for symbol in ("a", "ae", "e", "ih", "i", "y", "schwa"):
        sound = synthesise(said((symbol, 1.0)), speaker, np.random.default_rng(0))[4000:12000]
        level = 20 * np.log10(np.abs(np.fft.rfft(sound * np.hanning(len(sound)))))
        first, second = (scale * f for f in PHONEMES[INDEX[symbol]].formants[:2])
        low = np.arange(round(0.5 * pitch / 2), round((first + second) / 2 / 2))
        assert abs(2 * low[np.argmax(level[low])] - first) < 0.75 * pitch
        near = np.arange(round((second - pitch / 2) / 2), round((second + pitch / 2) / 2))
        between = np.arange(
            round(((first + second) / 2 - pitch / 2) / 2), round(((first + second) / 2 + pitch / 2) / 2)
        )
        assert level[near].max() > level[between].max() + (0 if second < 2 * first else 3)


def test_the_pitch_is_the_speakers():
    """All that sounds is near a harmonic of the pitch, and odd harmonics have their part in it."""
    frequencies = np.fft.rfftfreq(16000, 1 / 16000)
    for pitch in (90.0, 160.0, 245.0):
        sound = synthesise(
            said(("a", 1.0)), plain_speaker(pitch=pitch, breathiness=0.0), np.random.default_rng(0)
        )
        power = np.abs(np.fft.rfft(sound[4000:12000] * np.hanning(8000), 16000)) ** 2
        number = np.round(frequencies / pitch)
        near = np.abs(frequencies - number * pitch) < 8
        assert power[near].sum() > 0.99 * power.sum()
        assert power[number % 2 == 1].sum() > 0.2 * power.sum()


def test_every_sound_is_its_own():
    """The log spectra of any two sounds between the same vowels differ by 1.5 dB or more."""
    means = []
    for phoneme in PHONEMES:
        utterance = said(("schwa", 0.2), (phoneme.symbol, 0.12), ("schwa", 0.2))
        sound = synthesise(utterance, plain_speaker(), np.random.default_rng(0))
        pieces = sound[3200 + np.arange(0, 1921, 160)[:, None] + np.arange(-200, 200)]
        power = np.abs(np.fft.rfft(pieces * np.hanning(400), 512)) ** 2 @ mel_bank(40, 512)
        means.append(10 * np.log10(power + 1e-4))
    gaps = np.sqrt(((np.array(means)[:, None] - np.array(means)) ** 2).mean(axis=(2, 3)))
    assert gaps[~np.eye(len(means), dtype=bool)].min() > 1.5


def test_the_mouth_follows_from_the_sound():
    """A linear map from sound to mouth, learnt from some speakers, holds for others; other sound fails."""
    frames = 250
    clips = [drawn(seed, 10.0) for seed in range(17)]
    sound = [log_mel(wave, frames) for _, _, wave in clips]
    mouth = np.array([[getattr(articulate(u, frames), f) for f in ("opening", "width")] for u, _, _ in clips])
    features, targets = np.concatenate(sound[:12]), np.concatenate(mouth[:12].transpose(0, 2, 1))
    middle = features.mean(axis=0)
    inputs = features - middle
    gram = inputs.T @ inputs + 2000 * np.eye(inputs.shape[1])
    weights = np.linalg.solve(gram, inputs.T @ (targets - targets.mean(axis=0)))
    found = [(s - middle) @ weights for s in sound[12:]]
    right = correlations(found, mouth[12:])
    wrong = correlations(found[1:] + found[:1], mouth[12:])
    print("correlations of opening and width:", np.round(right, 3), "with other sound:", np.round(wrong, 3))
    assert right[0] >= 0.9
    assert right[1] >= 0.55
    assert np.abs(wrong).max() < 0.2


def correlations(found: list[np.ndarray], mouth: np.ndarray) -> list[float]:
    """Of `[T, 2]` found and `[2, T]` true for each clip, over all clips together."""
    return [
        float(np.corrcoef(np.concatenate([f[:, n] for f in found]), mouth[:, n].reshape(-1))[0, 1])
        for n in range(2)
    ]
