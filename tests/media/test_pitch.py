"""Shifted voices: the frequency moves, the time does not."""

import numpy as np
import pytest

from keysync_jax.errors import UserError
from keysync_jax.media.audio import RATE
from keysync_jax.media.pitch import shifted

SECONDS = np.arange(4 * RATE) / RATE
SHIFTS = [-12, -4, -2, -0.5, 0.5, 2, 4, 12]
CLICK = 160
PLACES = RATE * np.arange(37, 380, 31) // 100


def centre(wave: np.ndarray, place: int) -> float:
    """Centre of the energy within 100 ms of `place`, in samples."""
    stretch = np.arange(place - RATE // 10, place + RATE // 10)
    energy = wave[stretch].astype(np.float64) ** 2
    return float((stretch * energy).sum() / energy.sum())


def clicks() -> np.ndarray:
    """Bursts of noise, 10 ms each, in silence."""
    rng, wave = np.random.default_rng(0), np.zeros(len(SECONDS), np.float32)
    for place in PLACES:
        wave[place : place + CLICK] = 0.3 * np.hanning(CLICK) * rng.standard_normal(CLICK)
    return wave


def peak(wave: np.ndarray) -> float:
    """The strongest frequency of the middle two seconds, in Hz."""
    spectrum = np.abs(np.fft.rfft(wave[RATE : 3 * RATE] * np.hanning(2 * RATE), 1 << 18))
    return float(spectrum.argmax() * RATE / (1 << 18))


@pytest.mark.parametrize("semitones", SHIFTS)
def test_a_tone_moves_by_its_interval(semitones: float) -> None:
    tone = (0.5 * np.sin(2 * np.pi * 220 * SECONDS)).astype(np.float32)
    found = shifted(tone, semitones)
    assert (found.shape, found.dtype) == (tone.shape, np.float32)
    assert peak(found) == pytest.approx(220 * 2 ** (semitones / 12), rel=0.01)
    assert found[RATE:-RATE].std() == pytest.approx(tone.std(), rel=0.05)


@pytest.mark.parametrize("semitones", SHIFTS)
def test_clicks_stay_where_they_are(semitones: float) -> None:
    wave = clicks()
    found = shifted(wave, semitones)
    moved = [(centre(found, place) - centre(wave, place)) / RATE for place in PLACES]
    assert np.abs(moved).max() < 0.005


@pytest.mark.parametrize("semitones", [-4, -2, 2, 4])
def test_a_tone_begins_and_ends_where_it_did(semitones: float) -> None:
    heard = (SECONDS >= 1) & (SECONDS < 2.5)
    found = shifted((0.5 * np.sin(2 * np.pi * 220 * SECONDS) * heard).astype(np.float32), semitones)
    loud = np.flatnonzero(np.abs(found) > 0.2) / RATE
    assert loud[0] == pytest.approx(1, abs=0.005)
    assert loud[-1] == pytest.approx(2.5, abs=0.005)


@pytest.mark.parametrize("pitch", [80, 120, 250])
@pytest.mark.parametrize("semitones", [-4, 4])
def test_the_harmonics_of_a_voice_stay_together(pitch: float, semitones: float) -> None:
    """Windows that did not agree would put energy between the harmonics."""
    voice = sum(np.sin(2 * np.pi * pitch * k * SECONDS + k * k) / k for k in range(1, 20))
    found = shifted((0.2 * voice).astype(np.float32), semitones)[RATE : 3 * RATE]
    power = np.abs(np.fft.rfft(found * np.hanning(len(found)))) ** 2
    frequency, first = np.fft.rfftfreq(len(found), 1 / RATE), pitch * 2 ** (semitones / 12)
    away = np.abs(frequency - first * np.round(frequency / first))
    assert power[away < 3].sum() > 0.95 * power.sum()


@pytest.mark.parametrize("samples", [0, 1, 100, 641, 16_000])
@pytest.mark.parametrize("semitones", [-12, 3, 12])
def test_any_length_keeps_its_length(samples: int, semitones: float) -> None:
    assert shifted(np.ones(samples, np.float32), semitones).shape == (samples,)


def test_silence_stays_silent() -> None:
    assert not shifted(np.zeros(5000, np.float32), 2).any()


@pytest.mark.parametrize("semitones", [0, 12.5, -13, float("nan"), float("inf")])
def test_shifts_that_make_no_sense(semitones: float) -> None:
    with pytest.raises(UserError, match="a pitch shift is up to 12 semitones up or down"):
        shifted(np.zeros(100, np.float32), semitones)
