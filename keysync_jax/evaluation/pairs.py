"""Cross-sync pairs of the synthetic world: a talking source, another person's voice, and the known result."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import cv2
import numpy as np

from keysync_jax.backend import computing
from keysync_jax.files import fingerprint
from keysync_jax.media.crop import crop_frame, crop_track, landmarks_in_crop
from keysync_jax.media.masks import mouth_region
from keysync_jax.media.video import read_frames
from keysync_jax.metrics.mouth import MouthReader, Mouths, eye_distance
from keysync_jax.model import Model
from keysync_jax.pipeline.dub import Decoder, DubSettings, dub
from keysync_jax.pipeline.environment import environment
from keysync_jax.pipeline.latents import decode_latents, encode_frames
from keysync_jax.synthetic.phonemes import Utterance, silent_utterance
from keysync_jax.synthetic.voice import SAMPLE_RATE
from keysync_jax.synthetic.world import FORMAT, SyntheticClip, draw_clip, truth_of, write_clip, write_wave

VOICES = 100_000
"""Number of the first clip whose voice drives a pair; its person is not seen."""


@dataclass(frozen=True)
class Truth:
    """How a pair's frames should look, and what is known of them.

    Attributes:
      frames: uint8 `[T, S, S, 3]`.
      landmarks: `[T, 68, 2]` in pixels.
      opening: gap of the inner lips over the distance of the eyes, `[T]`.
      occluder: 1 where something covers the face, uint8 `[T, S, S]`; nowhere in most clips.
    """

    frames: np.ndarray
    landmarks: np.ndarray
    opening: np.ndarray
    occluder: np.ndarray


class Pair:
    """Pair `number` of the world `seed`: files in a folder, made when they are missing.

    Clips, frames and truths are made when they are asked for, and kept, some 10 MB a second, until `forget`.
    """

    def __init__(self, folder: Path, seed: int, number: int, seconds: float, occluded: bool = False):
        self.folder, self.number = folder, number
        self._seed, self._seconds, self._occluded = seed, seconds, occluded
        folder.mkdir(parents=True, exist_ok=True)
        self.video = folder / f"{self.source.name}.mp4"
        self.voice = folder / f"{self.driving.name}.wav"
        self.silence = folder / "silence.wav"
        if not self.video.is_file():
            write_clip(folder, self.source)
        if not self.voice.is_file():
            write_wave(self.voice, self.driving.wave)
        if not self.silence.is_file():
            write_wave(self.silence, np.zeros(round(seconds * SAMPLE_RATE), np.float32))
        self.forget()

    def forget(self) -> None:
        """Lets go of everything that can be made or read again; what is left takes no memory to speak of."""
        for name, value in vars(Pair).items():
            if isinstance(value, cached_property):
                vars(self).pop(name, None)

    @cached_property
    def source(self) -> SyntheticClip:
        """The clip whose mouth is to be replaced."""
        return draw_clip(self._seed, self.number, self._seconds, self._occluded)

    @cached_property
    def driving(self) -> SyntheticClip:
        """The clip whose voice does it."""
        return draw_clip(self._seed, VOICES + self.number, self._seconds)

    @property
    def landmarks_file(self) -> Path:
        return self.video.with_suffix(".npy")

    @property
    def occluder_file(self) -> Path:
        """What covers the face; only where the pair is occluded."""
        return self.video.with_suffix(".truth.npz")

    @cached_property
    def original(self) -> np.ndarray:
        """Frames of the source as they are read back, uint8 `[T, S, S, 3]`."""
        return np.stack(list(read_frames(self.video)))

    @cached_property
    def spoken(self) -> Truth:
        """The source's person with the driving speech."""
        return _truth(self.source, self.driving.utterance)

    @cached_property
    def unsaid(self) -> Truth:
        """The source itself."""
        return _truth(self.source, None)

    @cached_property
    def silent(self) -> Truth:
        """The source's person with a mouth at rest."""
        return _truth(self.source, silent_utterance(len(self.source) / 25))

    @cached_property
    def boxes(self) -> np.ndarray:
        """The crop that a dub takes, `[T, 4]`."""
        landmarks = self.unsaid.landmarks
        height, width = self.original.shape[1:3]
        return crop_track(landmarks, np.ones(len(landmarks), bool), height, width)

    def crops(self, frames: np.ndarray, size: int) -> np.ndarray:
        """The crop of each frame, uint8 `[T, size, size, 3]`."""
        return np.stack([crop_frame(frame, box, size) for frame, box in zip(frames, self.boxes, strict=True)])

    def mouth(self, size: int) -> np.ndarray:
        """Where in the crop a mouth is, the source's or the true one: bool `[T, size, size]`."""
        regions = [
            [mouth_region(points, size) for points in landmarks_in_crop(truth.landmarks, self.boxes, size)]
            for truth in (self.unsaid, self.spoken)
        ]
        return np.logical_or(*np.array(regions, bool))

    def face(self, size: int) -> np.ndarray:
        """Where in the crop the source's face is, the hull of its landmarks: bool `[T, size, size]`."""
        masks = np.zeros((len(self.boxes), size, size), np.uint8)
        points = landmarks_in_crop(self.unsaid.landmarks, self.boxes, size)
        for mask, landmarks in zip(masks, points, strict=True):
            cv2.fillConvexPoly(mask, cv2.convexHull(np.rint(landmarks).astype(np.int32)), 1)
        return masks.astype(bool)

    def covered(self, size: int) -> np.ndarray:
        """Where in the crop something lies before the face: bool `[T, size, size]`."""
        return self.crops(255 * self.unsaid.occluder, size) > 127

    @cached_property
    def readable(self) -> np.ndarray:
        """Frames in which nothing covers the mouth, which the reader could not read: bool `[T]`."""
        size = self.original.shape[1]
        return ~(self.covered(size) & self.mouth(size)).any(axis=(1, 2))

    def dubbed(
        self,
        model: Model,
        output: Path,
        silent: bool = False,
        occluder: bool = False,
        seed: int = 0,
        devices: int | None = None,
        decoder: Decoder = "full",
    ) -> np.ndarray:
        """Frames of the dub as they are read back, uint8 `[T, S, S, 3]`; a file that is there is taken.

        Args:
          silent: with a silent voice.
          occluder: leave what covers the face as it is.
        """
        if not output.is_file():
            output.parent.mkdir(parents=True, exist_ok=True)
            settings = DubSettings(
                landmarks=str(self.landmarks_file),
                occluder=self.occluder_file if occluder else None,
                seed=seed,
                devices=devices,
                decoder=decoder,
            )
            dub(self.video, self.silence if silent else self.voice, output, model, settings)
        return np.stack(list(read_frames(output)))[: len(self.source)]

    def reconstructed(self, model: Model, decoder: Decoder = "full") -> np.ndarray:
        """The source's crops through the VAE's encoder and a decoder alone, uint8."""
        vae, size = model.load("vae"), model.config.crop_size
        network = model.load(DubSettings(decoder=decoder).component(model.config))
        with computing("fp32"):
            latents = np.concatenate(list(encode_frames(vae, self.crops(self.original, size))))
            return np.rint(decode_latents(network, latents)).astype(np.uint8)


def clips_digest() -> str:
    """Names a folder of pairs' clips: 8 hex digits of the world's format, the code, libraries and device."""
    return fingerprint({"world": FORMAT, **environment("synthetic", "evaluation.pairs")})[:8]


def dubs_digest(model: Model) -> str:
    """Names a folder of pairs' dubs: 8 hex digits of all that `Pair.dubbed` depends on, the pair apart.

    Dubs that another code made, another device or another config lie in a folder of another name, so they are
    neither taken for these nor lost.
    """
    made = {"clips": clips_digest(), "model": model.fingerprint, "dtype": DubSettings().compute_dtype}
    return fingerprint(made)[:8]


def read_mouths(reader: MouthReader, frames: np.ndarray, pair: Pair) -> Mouths:
    """Mouths in frames of a pair: the head is where it is in the source."""
    return reader.read(frames, pair.unsaid.landmarks)


def _truth(clip: SyntheticClip, speech: Utterance | None) -> Truth:
    pictures = list(clip.pictures(speech))
    known = truth_of(clip, pictures)
    opening = known["gap"] / eye_distance(known["landmarks"])
    pixels, covered = (
        np.stack(arrays) for arrays in zip(*((p.pixels, p.occluder) for p in pictures), strict=True)
    )
    return Truth(pixels, known["landmarks"], opening, covered)
