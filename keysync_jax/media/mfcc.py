"""Mel-frequency cepstra of a voice, as SyncNet and the active-speaker network were trained on them.

The definitions are those of python_speech_features 0.6 with its defaults at 16 kHz, which both use: int16
samples, 100 vectors a second, four to a video frame. Only numpy: the package is abandoned and a sdist.
"""

import functools

import numpy as np

RATE = 16_000
WINDOW, HOP = 400, 160
"""Samples of a window and from one to the next: 25 ms, 10 ms."""

PER_FRAME = 4
"""Vectors to a video frame at 25 fps."""

COEFFICIENTS = 13
_FILTERS, _FFT, _EMPHASIS, _LIFTER = 26, 512, 0.97, 22
_BLOCK = 4096
_LEAST = np.finfo(np.float64).eps
"""Stands for a power of 0, whose logarithm is then -36."""


def mfcc(wave: np.ndarray, block: int = _BLOCK) -> np.ndarray:
    """13 coefficients every 10 ms, the first one the logarithm of the window's power.

    The wave is taken as zero after its end; n samples of more than one window give 1 + ceil((n - 400) / 160)
    vectors.

    Args:
      wave: int16 `[S]`, 16 kHz, mono.
      block: vectors that are computed at a time, which bounds the memory beside the result.

    Returns:
      float32 `[N, 13]`.

    Raises:
      ValueError: the samples are not int16.
    """
    if wave.dtype != np.int16 or wave.ndim != 1:
        raise ValueError(f"expected int16 samples of one channel, got {wave.dtype} {wave.shape}")
    count = 1 + max(0, -(-(len(wave) - WINDOW) // HOP))
    found = np.empty((count, COEFFICIENTS), np.float32)
    for first in range(0, count, block):
        last = min(first + block, count)
        found[first:last] = _cepstra(_emphasised(wave, HOP * first, HOP * (last - 1) + WINDOW))
    return found


def to_int16(wave: np.ndarray) -> np.ndarray:
    """float `[S]` at full scale 1 as int16, rounded; what is beyond full scale is clipped."""
    return np.clip(np.rint(np.asarray(wave, np.float64) * 32768), -32768, 32767).astype(np.int16)


def _emphasised(wave: np.ndarray, start: int, stop: int) -> np.ndarray:
    """x[n] - 0.97 x[n - 1] from `start` to `stop`, float64. The first sample is kept, zeros follow."""
    samples = wave[max(start - 1, 0) : stop].astype(np.float64)
    before = samples[:-1] if start else np.concatenate([[0.0], samples[:-1]])
    emphasised = samples[1 if start else 0 :] - _EMPHASIS * before
    return np.pad(emphasised, (0, stop - start - len(emphasised)))


def _cepstra(samples: np.ndarray) -> np.ndarray:
    """float64 `[N, 13]` of the samples that N windows cover; the windows are rectangular."""
    windows = np.lib.stride_tricks.sliding_window_view(samples, WINDOW)[::HOP]
    spectrum = np.fft.rfft(windows, _FFT)
    power = (spectrum.real**2 + spectrum.imag**2) / _FFT
    bands = _above_zero(power @ _filters().T)
    cepstra = (np.log(bands) @ _cosines().T) * _lifter()
    cepstra[:, 0] = np.log(_above_zero(power.sum(axis=1)))
    return cepstra


def _above_zero(x: np.ndarray) -> np.ndarray:
    return np.where(x == 0, _LEAST, x)


@functools.cache
def _filters() -> np.ndarray:
    """Triangles of equal height between whole bins, evenly spaced in mel: float64 `[26, 257]`."""
    highest = 2595 * np.log10(1 + RATE / 2 / 700)
    hertz = 700 * (10 ** (np.linspace(0, highest, _FILTERS + 2) / 2595) - 1)
    edges = np.floor((_FFT + 1) * hertz / RATE).astype(int)
    filters = np.zeros((_FILTERS, _FFT // 2 + 1))
    for row, low, peak, high in zip(filters, edges, edges[1:], edges[2:], strict=False):
        row[low:peak] = (np.arange(low, peak) - low) / (peak - low)
        row[peak:high] = (high - np.arange(peak, high)) / (high - peak)
    return filters


@functools.cache
def _cosines() -> np.ndarray:
    """The first rows of the orthonormal cosine transform (type II): float64 `[13, 26]`."""
    k, n = np.arange(COEFFICIENTS)[:, None], np.arange(_FILTERS)
    scale = np.where(k == 0, np.sqrt(1 / _FILTERS), np.sqrt(2 / _FILTERS))
    return np.asarray(scale * np.cos(np.pi * k * (2 * n + 1) / (2 * _FILTERS)))


@functools.cache
def _lifter() -> np.ndarray:
    return 1 + _LIFTER / 2 * np.sin(np.pi * np.arange(COEFFICIENTS) / _LIFTER)
