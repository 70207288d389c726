"""A voice: glottal pulses and noise, shaped by the vocal tract of a speaker."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from keysync_jax.synthetic.phonemes import PHONEMES, SILENCE, Utterance

SAMPLE_RATE = 16000
# The vocal tract is set anew every `_HOP` samples; pitch and loudness every half of that, linear in between.
_HOP = 160
_CONTROL = _HOP // 2
_FFT = 6 * _HOP
_HIGHEST_HARMONIC = 7600.0
_FIFTH_FORMANT = (4500.0, 300.0)
# How long the release of a plosive takes at most, and which part of the plosive it may be.
_RELEASE_SECONDS, _RELEASE_SHARE = 0.03, 0.35


@dataclass(frozen=True)
class Speaker:
    """How one person sounds.

    Attributes:
      pitch: base of the voice, Hz.
      tract_scale: factor on all formants; a shorter vocal tract has a larger one.
      tilt: fall of the glottal spectrum, in units of 6 dB an octave.
      breathiness: level of the noise in the voice, relative to the voice.
      vibrato: depth of a regular change of the pitch, semitones.
      vibrato_rate: its rate, Hz.
      jitter: depth of an irregular change of the pitch, semitones.
      liveliness: height of the accents of the pitch, semitones.
      loudness: the largest absolute sample of an utterance.
      speech_rate: factor on the speed; for `draw_utterance`.
      background: root mean square of the noise behind the voice; 0 for none.
    """

    pitch: float
    tract_scale: float
    tilt: float
    breathiness: float
    vibrato: float
    vibrato_rate: float
    jitter: float
    liveliness: float
    loudness: float
    speech_rate: float
    background: float


def draw_speaker(rng: np.random.Generator) -> Speaker:
    """Draws a person: the higher the voice, the shorter the vocal tract tends to be."""
    height = rng.random()
    return Speaker(
        pitch=float(85 * (250 / 85) ** height),
        tract_scale=float(np.clip(0.9 + 0.24 * height + rng.uniform(-0.05, 0.05), 0.85, 1.2)),
        tilt=float(rng.uniform(0.5, 0.8)),
        breathiness=float(rng.uniform(0.01, 0.08)),
        vibrato=float(rng.uniform(0.0, 0.2)),
        vibrato_rate=float(rng.uniform(4.0, 6.0)),
        jitter=float(rng.uniform(0.05, 0.25)),
        liveliness=float(rng.uniform(1.0, 4.0)),
        loudness=float(rng.uniform(0.3, 0.8)),
        speech_rate=float(rng.uniform(0.85, 1.15)),
        background=float(rng.choice([0.0, rng.uniform(1e-4, 1e-3)])),
    )


def synthesise(utterance: Utterance, speaker: Speaker, rng: np.random.Generator) -> np.ndarray:
    """Says an utterance.

    A band-limited train of pulses and white noise (the source) pass through a cascade of digital resonators
    (the filter; Klatt, 1980, "Software for a cascade/parallel formant synthesizer") whose formants glide
    from sound to sound; frication and bursts pass through a band of their own. The filters are applied to
    overlapping pieces of the source in the frequency domain.

    Args:
      utterance: what is said, and when.
      speaker: who says it.
      rng: the source of chance, for noise, accents and jitter.

    Returns:
      Sound at 16 kHz, one channel, float32 `[round(seconds * 16000)]`, within -1 and 1. Where nothing is said
      it is the speaker's background noise, or zero.
    """
    samples = round(utterance.seconds * SAMPLE_RATE)
    frames = -(-samples // _HOP) + 1
    times = np.arange(2 * frames) * _CONTROL / SAMPLE_RATE
    tracks = _tracks(utterance, times)
    pitch = _at_samples(_pitch(utterance, speaker, times, rng), samples)
    noise = rng.standard_normal(samples, dtype=np.float32)
    voice = _at_samples(tracks.voice, samples) * (_pulses(pitch) + speaker.breathiness * noise)
    friction = _at_samples(tracks.friction, samples) * noise
    tract = _tract(tracks.formants[::2], tracks.bandwidths[::2], speaker)
    band = _band(tracks.centres[::2] * np.sqrt(speaker.tract_scale), tracks.breadths[::2])
    spectrum = np.fft.rfft(_pieces(voice, frames), _FFT) * tract
    spectrum += np.fft.rfft(_pieces(friction, frames), _FFT) * band
    sound = _joined(np.fft.irfft(spectrum, _FFT), samples)
    peak = np.abs(sound).max(initial=0.0)
    if peak > 0:
        sound *= speaker.loudness / peak
    if speaker.background > 0:
        sound += speaker.background * rng.standard_normal(samples, dtype=np.float32)
    return np.clip(sound, -1, 1).astype(np.float32)


@dataclass(frozen=True)
class _Tracks:
    """What the voice does at each control point: `[K]`, formants and bandwidths (Hz) `[K, 4]`."""

    voice: np.ndarray
    friction: np.ndarray
    centres: np.ndarray
    breadths: np.ndarray
    formants: np.ndarray
    bandwidths: np.ndarray


def _tracks(utterance: Utterance, times: np.ndarray) -> _Tracks:
    segments = utterance.segments_at(times)
    sounds = utterance.phonemes[segments]
    ends, lengths = utterance.boundaries[1:][segments], np.diff(utterance.boundaries)[segments]
    plosive = np.array([p.kind == "plosive" for p in PHONEMES])[sounds]
    released = ~plosive | (ends - times <= np.minimum(_RELEASE_SECONDS, _RELEASE_SHARE * lengths))
    voice = np.array([p.voicing * p.level for p in PHONEMES])[sounds]
    centre, breadth, noise = np.array([(*p.frication[:2], p.frication[2] * p.level) for p in PHONEMES])[
        sounds
    ].T
    return _Tracks(
        voice=_smooth(voice, 5),
        friction=_smooth(noise * released, 3),
        centres=_smooth(centre, 3),
        breadths=_smooth(breadth, 3),
        formants=_smooth(np.array([p.formants for p in PHONEMES])[sounds], 9),
        bandwidths=_smooth(np.array([p.bandwidths for p in PHONEMES])[sounds], 9),
    )


def _smooth(track: np.ndarray, points: int) -> np.ndarray:
    """The track `[K]` or `[K, N]` under a moving raised cosine of so many points, an odd number."""
    kernel = np.hanning(points + 2)[1:-1]
    kernel /= kernel.sum()
    edge = ((points // 2, points // 2),) + ((0, 0),) * (track.ndim - 1)
    padded = np.pad(track, edge, mode="edge")
    return sum(weight * padded[i : i + len(track)] for i, weight in enumerate(kernel))


def _pitch(utterance: Utterance, speaker: Speaker, times: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Pitch in Hz at each control point: it falls within a phrase and rises on some of the vowels."""
    edges = utterance.boundaries
    semitones = speaker.vibrato * np.sin(2 * np.pi * speaker.vibrato_rate * times)
    semitones += speaker.jitter * _smooth(rng.standard_normal(len(times)), 9) * 2
    pauses = np.flatnonzero(utterance.phonemes == SILENCE)
    for before, after in pairwise(pauses):
        start, end = edges[before + 1], edges[after]
        semitones -= np.where((times >= start) & (times < end), 4 * (times - start) / (end - start) - 2, 0)
    for number, index in enumerate(utterance.phonemes):
        accent = rng.random()
        if PHONEMES[index].kind == "vowel" and accent < 0.4:
            middle = (edges[number] + edges[number + 1]) / 2
            semitones += speaker.liveliness * (0.5 + accent) * np.exp(-0.5 * ((times - middle) / 0.08) ** 2)
    return speaker.pitch * 2 ** (_smooth(semitones, 13) / 12)


def _at_samples(track: np.ndarray, samples: int) -> np.ndarray:
    """A track `[K]` of control points at every sample, linearly interpolated."""
    ramp = np.arange(_CONTROL) / _CONTROL
    steps = track[:-1, None] + np.diff(track)[:, None] * ramp
    return steps.reshape(-1)[:samples]


def _pulses(pitch: np.ndarray) -> np.ndarray:
    """Glottal pulses `[S]` at a pitch in Hz `[S]`: cosines of all harmonics up to 7.6 kHz, of unit power.

    The sum of N harmonics has a closed form (the Dirichlet kernel); the next harmonic fades in and out with
    the fraction of N, so that a gliding pitch makes no clicks.
    """
    cycles = np.cumsum(pitch / SAMPLE_RATE)
    angle = 2 * np.pi * (cycles - np.round(cycles))
    harmonics = _HIGHEST_HARMONIC / pitch
    whole = np.floor(harmonics)
    half = np.sin(angle / 2)
    near = np.abs(half) < 1e-6
    kernel = np.where(near, 2 * whole + 1, np.sin((whole + 0.5) * angle) / np.where(near, 1, half))
    total = (kernel - 1) / 2 + (harmonics - whole) * np.cos((whole + 1) * angle)
    return total * np.sqrt(2 / harmonics)


def _tract(formants: np.ndarray, bandwidths: np.ndarray, speaker: Speaker) -> np.ndarray:
    """Frequency response of the vocal tract and the glottis, complex `[F, bins]`, for formants `[F, 4]`."""
    frames = len(formants)
    fifth = np.broadcast_to(np.array(_FIFTH_FORMANT), (frames, 2))
    centres = np.concatenate([formants, fifth[:, :1]], axis=1) * speaker.tract_scale
    radii = np.exp(-np.pi * np.concatenate([bandwidths, fifth[:, 1:]], axis=1) / SAMPLE_RATE)
    first, second = -2 * radii * np.cos(2 * np.pi * centres / SAMPLE_RATE), radii**2
    # The product of the resonators' denominators, as one polynomial of z^-1 a frame.
    polynomial = np.ones((frames, 1))
    for n in range(centres.shape[1]):
        longer = np.pad(polynomial, ((0, 0), (0, 2)))
        longer[:, 1:-1] += first[:, n : n + 1] * polynomial
        longer[:, 2:] += second[:, n : n + 1] * polynomial
        polynomial = longer
    gain = polynomial.sum(axis=1, keepdims=True)
    frequencies = np.fft.rfftfreq(_FFT, 1 / SAMPLE_RATE)
    # Glottal flow falls by 12 dB an octave above its corner; radiation from the lips gives 6 of them back.
    glottis = (1 + 1j * frequencies / 250) ** -speaker.tilt * (1j * frequencies / (60 + 1j * frequencies))
    return gain / np.fft.rfft(polynomial, _FFT) * glottis


def _band(centres: np.ndarray, breadths: np.ndarray) -> np.ndarray:
    """Frequency response of a band for noise, complex `[F, bins]`, with 1 at its centre."""
    frequencies = np.fft.rfftfreq(_FFT, 1 / SAMPLE_RATE)
    damped = 1j * frequencies * breadths[:, None]
    return (damped / (centres[:, None] ** 2 - frequencies**2 + damped)) ** 2


def _pieces(signal: np.ndarray, frames: int) -> np.ndarray:
    """Cuts a signal `[S]` into pieces `[F, 2 hops]`, one hop apart, whose windows add up to 1."""
    padded = np.zeros((frames + 1) * _HOP, np.float32)
    padded[_HOP : _HOP + len(signal)] = signal
    blocks = padded.reshape(-1, _HOP)
    window = 0.5 - 0.5 * np.cos(np.pi * np.arange(2 * _HOP, dtype=np.float32) / _HOP)
    return np.concatenate([blocks[:-1], blocks[1:]], axis=1) * window


def _joined(pieces: np.ndarray, samples: int) -> np.ndarray:
    """Adds filtered pieces `[F, n hops]` up where they overlap, to a signal of so many samples."""
    frames, hops = len(pieces), pieces.shape[1] // _HOP
    blocks = np.zeros((frames + hops - 1, _HOP))
    for n in range(hops):
        blocks[n : n + frames] += pieces[:, n * _HOP : (n + 1) * _HOP]
    return blocks.reshape(-1)[_HOP : _HOP + samples]
