"""Audio features of a clip: two vectors a video frame, from a speech encoder or as log-mel spectra."""

import jax.numpy as jnp
import numpy as np

from keysync_jax.config import EncoderConfig, LogMelConfig
from keysync_jax.errors import UserError
from keysync_jax.pipeline.log_mel import log_mel
from keysync_jax.pipeline.speech_stream import PIECES, Moments, Pieces, hidden_states
from keysync_jax.typing import Params

SAMPLES_PER_FRAME = 640
"""16 kHz audio at 25 frames a second."""

VECTORS_PER_FRAME = 2

_WAVE_EPS = 1e-7
_BLOCK = 1 << 20


def audio_features(
    config: EncoderConfig,
    params: Params,
    wave: np.ndarray,
    frames: int,
    *,
    dtype: jnp.dtype = jnp.float32,
    pieces: Pieces = PIECES,
) -> np.ndarray:
    """The features of a whole clip as the KeySync networks expect them.

    The wave is normalised over the clip where the encoder needs it, trimmed or filled up with zeros to
    whole frames, and encoded in one exact pass (`speech_stream`). `frames` frames of samples give
    2 `frames` - 1 vectors, since the last one would need samples past the end; HuBERT and wav2vec2
    get a zero vector at the end, WavLM's vectors are stretched to 2 `frames` by nearest neighbour.
    Log-mel spectra (`log_mel`) take the wave as it is, and are 2 `frames` of themselves.

    Args:
      params: of the encoder; log-mel has none.
      wave: float `[samples]`, mono, 16 kHz, any number of samples.
      frames: video frames to cover, at least 1.

    Returns:
      float32 `[frames, 2, D]`.

    Raises:
      UserError: the wave is empty, or the encoder does not give 50 vectors a second.
    """
    if len(wave) == 0:
        raise UserError("the voice has no samples")
    samples = frames * SAMPLES_PER_FRAME
    wanted = frames * VECTORS_PER_FRAME
    if isinstance(config, LogMelConfig):
        return log_mel(config, wave[:samples], wanted).reshape(frames, VECTORS_PER_FRAME, -1)
    if config.vectors(samples) != wanted - 1:
        raise UserError(
            f"the {config.kind} encoder's convolutions do not give 50 vectors for a second of audio"
        )
    wave = normalise_wave(wave) if config.normalise_wave else wave
    wave = np.pad(wave[:samples], (0, max(0, samples - len(wave))))
    vectors = hidden_states(config, params, wave, dtype=dtype, pieces=pieces)
    fitted = stretch_nearest(vectors, wanted) if config.kind == "wavlm" else np.pad(vectors, ((0, 1), (0, 0)))
    return fitted.reshape(frames, VECTORS_PER_FRAME, -1)


def normalise_wave(wave: np.ndarray) -> np.ndarray:
    """(wave - mean) / sqrt(var + 1e-7) over the whole wave, unbiased variance; float32 `[samples]`."""
    moments = Moments()
    for start in range(0, len(wave), _BLOCK):
        piece = np.asarray(wave[start : start + _BLOCK], np.float64)
        moments = moments.merge(len(piece), piece.mean(), piece.var() * len(piece))
    variance = moments.squares / max(1, moments.count - 1)
    return ((wave - np.float32(moments.mean)) / np.float32(np.sqrt(variance + _WAVE_EPS))).astype(np.float32)


def stretch_nearest(vectors: np.ndarray, count: int) -> np.ndarray:
    """Nearest-neighbour resize over time, `[N, D]` -> `[count, D]`: output i is input floor(i N / count)."""
    return vectors[np.arange(count) * len(vectors) // count]
