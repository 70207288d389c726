"""Log-mel spectra of a clip, an audio encoder without weights.

Vector k is centred at sample 320 k + 160, so vectors 2i and 2i + 1 are centred in the first and the second
half of video frame i. It is a function of the samples around it alone, to the bit: no step depends on the
clip's length, or on how the clip is cut into blocks.
"""

import functools

import numpy as np

from keysync_jax.config import FFT_SPACING_HZ, LogMelConfig

HOP = 320
"""Samples from vector to vector, 20 ms at 16 kHz."""

WINDOW = 400
"""Samples of a window, 25 ms."""

FFT = 512
"""Length that a window is filled up to."""

_BLOCK = 4096


def log_mel(config: LogMelConfig, wave: np.ndarray, count: int, *, block: int = _BLOCK) -> np.ndarray:
    """The first `count` vectors of a wave, which is silent before its start and after its end.

    Args:
      wave: float `[samples]`, mono, 16 kHz, full scale 1.
      block: vectors that are computed at a time, which bounds the memory beside the result.

    Returns:
      float32 `[count, bands (2 context + 1)]`: the bands of vectors k - context to k + context, in the order
      of time.
    """
    first = -config.context
    total = count + 2 * config.context
    plain = np.empty((total, config.bands), np.float32)
    for start in range(0, total, block):
        stop = min(start + block, total)
        plain[start:stop] = _spectra(config, _excerpt(wave, first + start, first + stop))
    stacked = np.lib.stride_tricks.sliding_window_view(plain, 2 * config.context + 1, axis=0)
    return stacked.transpose(0, 2, 1).reshape(count, config.hidden_size)


def _excerpt(wave: np.ndarray, first: int, last: int) -> np.ndarray:
    """The samples of the windows of vectors `first` to `last` - 1, float64; zeros outside of the wave."""
    start, stop = (HOP * k + HOP // 2 - WINDOW // 2 for k in (first, last))
    stop += WINDOW - HOP
    inside = np.asarray(wave[max(start, 0) : max(stop, 0)], np.float64)
    before = min(max(-start, 0), stop - start)
    return np.pad(inside, (before, stop - start - before - len(inside)))


def _spectra(config: LogMelConfig, excerpt: np.ndarray) -> np.ndarray:
    """Normalised log power, one vector a window, float64 `[N, bands]`."""
    windows = np.lib.stride_tricks.sliding_window_view(excerpt, WINDOW)[::HOP]
    # Periodic, so it is symmetric about its sample 200, the centre; a white noise keeps its variance.
    hann = np.sin(np.pi * np.arange(WINDOW) / WINDOW) ** 2
    spectrum = np.fft.rfft(windows * hann, FFT)
    power = (spectrum.real**2 + spectrum.imag**2) / np.sum(hann**2)
    bands = np.empty((len(power), config.bands))
    for b, (start, weights) in enumerate(_filters(config)):
        # Not a matrix product, whose rounding depends on the number of windows.
        bands[:, b] = (power[:, start : start + len(weights)] * weights).sum(axis=1)
    return (np.log(bands + config.floor) - config.mean) / config.std


@functools.lru_cache
def _filters(config: LogMelConfig) -> list[tuple[int, np.ndarray]]:
    """First frequency and weights of each band: a triangle, of sum 1."""
    edges, bins = config.edges_hz, np.arange(FFT // 2 + 1) * FFT_SPACING_HZ
    filters = []
    for low, peak, high in zip(edges, edges[1:], edges[2:], strict=False):
        weights = np.maximum(0, np.minimum((bins - low) / (peak - low), (high - bins) / (high - peak)))
        inside = np.flatnonzero(weights)
        filters.append((int(inside[0]), weights[inside] / weights.sum()))
    return filters
