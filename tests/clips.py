"""Small clips made on the spot: a moving gradient with a face's landmarks, and a voice of tones."""

import wave
from pathlib import Path

import numpy as np

from keysync_jax.media.writer import VideoWriter


def write_voice(path: Path, seconds: float, rate: int = 22_050) -> Path:
    """A mono 16-bit WAV whose pitch rises."""
    t = np.arange(round(seconds * rate)) / rate
    samples = 0.3 * np.sin(2 * np.pi * (150 + 40 * t) * t) * (0.6 + 0.4 * np.sin(9 * t))
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples * 32767).astype("<i2").tobytes())
    return path


def write_video(
    path: Path, frames: int, width: int = 96, height: int = 80, voice: Path | None = None
) -> Path:
    """A picture that slides by one pixel a frame."""
    rows, columns = np.mgrid[:height, : width + frames]
    picture = np.stack([rows * 2, columns % 200, 100 + 50 * np.sin(columns / 7)], axis=-1).astype(np.uint8)
    with VideoWriter(path, width, height, voice) as writer:
        for i in range(frames):
            writer.write(np.ascontiguousarray(picture[:, i : i + width]))
    return path


def face_landmarks(frames: int, width: int = 96, height: int = 80) -> np.ndarray:
    """68 points `[frames, 68, 2]` in the places of a face that sways a little."""
    angle = np.linspace(np.pi, 0, 17)
    jaw = np.stack([np.cos(angle), 0.9 * np.sin(angle)], axis=-1)
    rest = np.random.default_rng(0).uniform([-0.6, -0.5], [0.6, 0.6], (51, 2))
    rest[28 - 17] = [0.0, -0.1]
    centre = np.array([width / 2, height / 2 - 4]) + np.stack(
        [3 * np.sin(np.arange(frames) / 5), np.zeros(frames)], axis=-1
    )
    return (centre[:, None] + 16 * np.concatenate([jaw, rest])).astype(np.float32)
