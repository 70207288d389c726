"""Clips of the reference's own folders: latents, audio features and landmarks that its scripts computed."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import cv2
import numpy as np

from keysync_jax.config import EncoderKind
from keysync_jax.data.records import Settings
from keysync_jax.data.sources import LATENTS, Clip, has_latents
from keysync_jax.errors import UserError
from keysync_jax.media.landmarks import POINTS, bridge
from keysync_jax.media.timeline import FPS
from keysync_jax.media.video import read_frames
from keysync_jax.tensorfile import TensorFile

CANVAS = 512
"""Side of the frames whose pixels the reference's landmarks are in."""

LONGEST_DIFFERENCE = FPS
"""Frames by which the parts of a clip may differ in length; the shortest counts."""


@dataclass(frozen=True)
class Precomputed:
    """One clip.

    Attributes:
      latents: raw samples, fp32 `[T, h, w, C]`.
      features: of each encoder, fp32 `[T, 2, D]`.
      landmarks: in crop pixels, fp32 `[T, 68, 2]`, and whether a frame has a face, bool `[T]`.
    """

    latents: np.ndarray
    features: Mapping[EncoderKind, np.ndarray]
    landmarks: np.ndarray
    present: np.ndarray


def latents_of(clip: Clip, channels: int) -> np.ndarray:
    """Scaled latents as stored, `[T, channels, h, h]`; a view of the file."""
    if not has_latents(clip):
        raise UserError(
            f"{clip.path}: has no latents ({Path(clip.name).name}{LATENTS}); give raw videos in a folder of "
            "their own"
        )
    latents = _tensor(clip.path, "latents")
    if latents.ndim != 4 or latents.shape[1] != channels or latents.shape[2] != latents.shape[3]:
        raise UserError(
            f"{clip.path}: its latents have shape {list(latents.shape)}, not [T, {channels}, h, h]"
        )
    return latents


def feature_dims(clip: Clip) -> dict[EncoderKind, int]:
    """Width of the features of each encoder that the clip has."""
    return {kind: _features(path).shape[-1] for kind, path in clip.embeddings}


def read_precomputed(clip: Clip, settings: Settings, scale_factor: float, shortest: int) -> Precomputed:
    """Reads a clip of the reference's folders.

    Raises:
      UserError: a part is missing, misshapen, too short, or much longer than another.
    """
    assert settings.latent_channels is not None
    latents = latents_of(clip, settings.latent_channels)
    if latents.shape[2] != settings.latent_size:
        raise UserError(
            f"{clip.path}: its latents have the side {latents.shape[2]}, others {settings.latent_size}"
        )
    embeddings = dict(clip.embeddings)
    for kind in settings.encoders:
        if kind not in embeddings:
            raise UserError(f"{clip.path}: this clip has no {kind} features")
    features = {kind: _features(path) for kind, path in clip.embeddings if kind in settings.encoders}
    for kind, array in features.items():
        if array.shape[-1] != settings.encoders[kind].dim:
            raise UserError(f"{embeddings[kind]}: its vectors are {array.shape[-1]} wide, not as the others")
    landmarks = _landmarks(clip)
    lengths = [len(latents), len(landmarks), *(len(array) for array in features.values())]
    if max(lengths) - min(lengths) > LONGEST_DIFFERENCE:
        raise UserError(f"{clip.path}: latents, landmarks and features have {lengths} frames")
    frames = min(lengths)
    if frames < shortest:
        raise UserError(f"{clip.path}: has {frames} frames, a sample needs {shortest}")
    raw = latents[:frames].astype(np.float32).transpose(0, 2, 3, 1) / np.float32(scale_factor)
    if not np.isfinite(raw).all():
        raise UserError(f"{clip.path}: its latents are not finite")
    points, present = bridge(landmarks[:frames])
    return Precomputed(
        raw,
        {kind: array[:frames].astype(np.float32) for kind, array in features.items()},
        (points * np.float32(settings.crop_size / CANVAS)).astype(np.float32),
        present,
    )


def read_pixels(clip: Clip, frames: int, size: int) -> Iterator[np.ndarray]:
    """The video's frames brought to `[size, size, 3]` as the reference does (a video is square already).

    Raises:
      UserError: there is no video, or it is shorter than the latents.
    """
    if clip.video is None:
        raise UserError(f"{clip.path}: this clip has no video, others have; the pixel loss needs one")
    count = 0
    for frame in islice(read_frames(clip.video), frames):
        count += 1
        yield cv2.resize(frame, (size, size), interpolation=cv2.INTER_LINEAR)
    if count < frames:
        raise UserError(f"{clip.video}: has {count} frames, its latents {frames}")


def _features(path: Path) -> np.ndarray:
    array = _tensor(path, "audio")
    if array.ndim != 3 or array.shape[1] != 2:
        raise UserError(f"{path}: its features have shape {list(array.shape)}, not [T, 2, D]")
    return array


def _tensor(path: Path, key: str) -> np.ndarray:
    file = TensorFile(path)
    if key not in file:
        raise UserError(f"{path}: has no tensor {key!r}")
    return file[key]


def _landmarks(clip: Clip) -> np.ndarray:
    """Landmarks in pixels of the 512 x 512 frame, `[T, 68, 2]`."""
    if clip.landmarks is None:
        raise UserError(f"{clip.path}: this clip has no landmarks (.npy)")
    try:
        landmarks = np.load(clip.landmarks, allow_pickle=False).astype(np.float32)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{clip.landmarks}: cannot be read as landmarks ({error})") from None
    if landmarks.ndim != 3 or landmarks.shape[1:] != (POINTS, 2):
        raise UserError(f"{clip.landmarks}: has shape {list(landmarks.shape)}, not [T, {POINTS}, 2]")
    middle = np.nanmedian(landmarks, axis=(0, 1)) if len(landmarks) else np.zeros(2)
    if not (np.isnan(middle).all() or ((middle >= 0) & (middle <= CANVAS)).all()):
        raise UserError(
            f"{clip.landmarks}: its landmarks lie outside of a {CANVAS} x {CANVAS} frame, whose pixels "
            "they must be in"
        )
    return landmarks
