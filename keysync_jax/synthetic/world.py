"""Clips of the synthetic world: a person, a voice, a movement; all of it a function of (seed, number)."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from keysync_jax.files import replacing
from keysync_jax.media.landmarks import save_landmarks
from keysync_jax.media.timeline import FPS
from keysync_jax.media.writer import VideoWriter
from keysync_jax.synthetic.articulation import Articulation
from keysync_jax.synthetic.face import Picture, mouth_aspect_ratio, render
from keysync_jax.synthetic.identity import Identity, draw_identity
from keysync_jax.synthetic.motion import Motion, draw_motion
from keysync_jax.synthetic.occluders import Occluder, draw_occluder
from keysync_jax.synthetic.phonemes import (
    PHONEMES,
    Utterance,
    articulate,
    draw_utterance,
    excerpt,
    phonemes_of_frames,
)
from keysync_jax.synthetic.voice import SAMPLE_RATE, draw_speaker, synthesise

FORMAT = "keysync-synthetic-2"
"""Changes whenever the same seed and number give another clip."""

SIZE = 256
"""Side of the pictures in pixels."""

# Parts of a clip draw from streams of their own, so that none depends on how much another one draws.
_PERSON, _SPEECH, _MOVEMENT, _VOICE, _OCCLUDER = range(5)


@dataclass(frozen=True)
class SyntheticClip:
    """One clip: everything that is known of it.

    Attributes:
      name: of its files.
      wave: sound, float32 mono `[samples]` at 16 kHz.
      occluder: what passes before the mouth, where something does.
    """

    name: str
    identity: Identity
    motion: Motion
    utterance: Utterance
    wave: np.ndarray
    occluder: Occluder | None = None

    def __len__(self) -> int:
        return len(self.motion)

    @cached_property
    def articulation(self) -> Articulation:
        """What the mouth does."""
        return articulate(self.utterance, len(self))

    def pictures(self, speech: Utterance | None = None, size: int = SIZE) -> Iterator[Picture]:
        """The frames.

        Args:
          speech: what the mouth says instead; the same head, movement and light. This is what a dub with
            that speech should look like.
        """
        articulation = self.articulation if speech is None else articulate(speech, len(self))
        return render(self.identity, self.motion, articulation, size, self.occluder)


def draw_clip(seed: int, number: int, seconds: float, occluded: bool = False) -> SyntheticClip:
    """Clip `number` of the world `seed`: a new person with a new voice, who says something new.

    Args:
      seconds: length; rounded to whole frames.
      occluded: something passes before the mouth.
    """

    def stream(part: int) -> np.random.Generator:
        return np.random.default_rng([seed, number, part])

    frames = round(seconds * FPS)
    person, speech = stream(_PERSON), stream(_SPEECH)
    identity, speaker = draw_identity(person), draw_speaker(person)
    utterance = _draw_speech(speech, frames / FPS, speaker.speech_rate)
    return SyntheticClip(
        name=f"clip-{number:05d}",
        identity=identity,
        motion=draw_motion(stream(_MOVEMENT), frames),
        utterance=utterance,
        wave=synthesise(utterance, speaker, stream(_VOICE)),
        occluder=draw_occluder(stream(_OCCLUDER), frames) if occluded else None,
    )


def _draw_speech(rng: np.random.Generator, seconds: float, speech_rate: float) -> Utterance:
    """So many seconds out of the middle of a longer utterance.

    Clips that all begin and end with a closed mouth would be alike by that alone, whatever is said.
    """
    before = float(rng.uniform(0.5, 2.5))
    whole = draw_utterance(rng, before + seconds + 1.0, speech_rate)
    return excerpt(whole, before, seconds)


def write_clip(folder: Path, clip: SyntheticClip) -> None:
    """Writes a clip; the video comes last, so where it is the clip is complete.

    `NAME.mp4` has picture and sound, `NAME.npy` the 68 landmarks (which `keysync prepare` and `dub` take),
    `NAME.truth.npz` what `truth_of` returns, `NAME.wav` the sound as it was made.
    """
    pictures = list(clip.pictures())
    save_landmarks(folder / f"{clip.name}.npy", np.stack([picture.landmarks for picture in pictures]))
    _write_npz(folder / f"{clip.name}.truth.npz", truth_of(clip, pictures))
    sound = folder / f"{clip.name}.wav"
    write_wave(sound, clip.wave)
    video = folder / f"{clip.name}.mp4"
    # One thread: a clip is the same on machines of any number of cores.
    with VideoWriter(video, SIZE, SIZE, sound, quality=12, preset="veryfast", threads=1) as writer:
        for picture in pictures:
            writer.write(picture.pixels)


def truth_of(clip: SyntheticClip, pictures: list[Picture]) -> dict[str, np.ndarray]:
    """Ground truth of a clip's frames, by name.

    `opening`, `width`, `rounding`, `teeth`: of the articulation, `[T]`. `mar`: mouth aspect ratio of the
    inner lips. `gap`, `mouth_width`: of the inner lips, in pixels. `phoneme`: symbols. `landmarks`:
    `[T, 68, 2]`.
    `occluder`: uint8 `[T, S, S]`, 1 where something covers the face; only where the clip has one.
    """
    symbols = np.array([phoneme.symbol for phoneme in PHONEMES])
    truth: dict[str, np.ndarray] = {name: np.asarray(x) for name, x in asdict(clip.articulation).items()}
    landmarks = np.stack([picture.landmarks for picture in pictures])
    truth |= {
        "mar": np.array([mouth_aspect_ratio(points) for points in landmarks], np.float32),
        "gap": np.array([picture.mouth_gap for picture in pictures], np.float32),
        "mouth_width": np.array([picture.mouth_width for picture in pictures], np.float32),
        "phoneme": symbols[phonemes_of_frames(clip.utterance, len(clip))],
        "landmarks": landmarks,
    }
    if clip.occluder is not None:
        truth["occluder"] = np.stack([picture.occluder for picture in pictures])
    return truth


def write_wave(path: Path, wave: np.ndarray) -> None:
    """Writes sound as a WAV file of 16 bits."""
    import wave as container

    with replacing(path) as partial, container.open(str(partial), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes(np.rint(np.clip(wave, -1, 1) * 32767).astype("<i2").tobytes())


def _write_npz(path: Path, arrays: dict[str, Any]) -> None:
    with replacing(path) as partial, partial.open("wb") as file:
        np.savez_compressed(file, **arrays)
