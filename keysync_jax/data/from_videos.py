"""A dataset's records from videos: what workers cut (`faces`), with latents and sound encoded here."""

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import cached_property
from itertools import tee
from pathlib import Path
from typing import get_args

import numpy as np

from keysync_jax.config import EncoderKind, encoder_name, to_dict
from keysync_jax.data.faces import Faces, Task, cut_all, read_crops
from keysync_jax.data.parts import Part, Work, key_of, write_part
from keysync_jax.data.records import ClipInfo, EncoderInfo, Settings, audio_name, encode_frame
from keysync_jax.data.settings import PrepareSettings
from keysync_jax.data.sources import Clip
from keysync_jax.errors import UserError
from keysync_jax.files import fingerprint
from keysync_jax.media.detectors import detector_identity, make_detector
from keysync_jax.media.landmarks import runs_without
from keysync_jax.media.pitch import shifted
from keysync_jax.model import Model, Network
from keysync_jax.pipeline.devices import local_devices
from keysync_jax.pipeline.features import audio_features
from keysync_jax.pipeline.flow import spread
from keysync_jax.pipeline.latents import encode_posterior
from keysync_jax.pipeline.memory import batches
from keysync_jax.typing import Params

COMPRESSING = 4
"""Threads that compress pictures, each a frame."""

SHORTEST = 14
"""Frames of the shortest sample: T in a row."""


class Videos:
    """What is the same for every dataset that is made from videos."""

    stored: Settings

    def __init__(self, settings: PrepareSettings):
        self.settings = settings

    def make(self, clips: Sequence[Clip], work: Work) -> Generator[tuple[Clip, Part | str]]:
        tasks = [self.task(clip, work.crops) for clip in clips]
        with closing(cut_all(tasks, self.settings.workers)) as results:
            for task, faces in results:
                if isinstance(faces, str):
                    yield task.clip, faces
                else:
                    # An error here, of the device or the disk, is not the clip's fault and ends the run.
                    crops = read_crops(faces, task.size)
                    yield task.clip, self.part(task.clip, faces, crops, work.records(task.clip))

    def task(self, clip: Clip, folder: Path) -> Task:
        """What a worker is to do for a clip; its crops may lie in the folder."""
        return Task(
            clip,
            folder / key_of(clip.name),
            self.stored.crop_size,
            SHORTEST,
            self.settings.landmarks,
            self.settings.landmark_model,
        )

    def part(self, clip: Clip, faces: Faces, crops: Iterable[np.ndarray], path: Path) -> Part:
        """Writes the part file of a clip, which appears whole or not at all.

        Args:
          crops: uint8 `[S, S, 3]` of every frame.
        """
        frames, gaps = len(faces.present), runs_without(faces.present)
        info = ClipInfo(clip.name, clip.source, faces.files[0].sha256, frames, 0, 0, gaps)
        part = write_part(path, info, self._records(faces, crops), self.stored)
        return replace(part, files=faces.files)

    def _records(self, faces: Faces, crops: Iterable[np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        """The arrays of every frame."""
        raise NotImplementedError


class FramesAlone(Videos):
    """Makes records of frames and landmarks, for training a VAE."""

    def __init__(self, clips: Sequence[Clip], settings: PrepareSettings, crop: int):
        super().__init__(settings)
        if settings.encoders or settings.pitch:
            raise UserError("frames alone have no audio features; leave --encoders and --pitch out")
        self.stored = Settings(
            crop_size=crop,
            latent_size=0,
            latents="none",
            frames=True,
            vae=None,
            encoders={},
            landmarks=settings.landmarks,
            latent_channels=0,
            landmark_model=_try_detector(clips, settings),
        )

    def _records(self, faces: Faces, crops: Iterable[np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        pictures = spread(encode_frame, crops, COMPRESSING)
        for points, picture in zip(faces.landmarks, pictures, strict=True):
            yield {"landmarks": points, "frame": picture}


class FromVideos(Videos):
    """Makes records from videos, with a model's VAE and encoders."""

    def __init__(self, clips: Sequence[Clip], settings: PrepareSettings, model: Model):
        super().__init__(settings)
        self.model = model
        config = model.config
        kinds = settings.encoders or tuple(k for k in get_args(EncoderKind) if k in config.encoders)
        for kind in kinds:
            if kind not in config.encoders:
                raise UserError(f"{model.folder}: has no {kind} encoder, only {', '.join(config.encoders)}")
        encoders: dict[EncoderKind, EncoderInfo] = {
            kind: EncoderInfo(config.encoders[kind].hidden_size, model.hashes[encoder_name(kind)])
            for kind in sorted(kinds)
        }
        vae = model.hashes["vae.safetensors"]
        self.stored = Settings(
            crop_size=config.crop_size,
            latent_size=config.keyframe.latent_size,
            latents=settings.latents,
            frames=True,
            vae=vae,
            encoders=encoders,
            landmarks=settings.landmarks,
            dtype=settings.dtype,
            seed=settings.seed,
            pitch=tuple(sorted({float(semitones) for semitones in settings.pitch})),
            latent_channels=config.vae.latent_channels,
            landmark_model=_try_detector(clips, settings),
            model=fingerprint(
                [to_dict(config.vae), {kind: to_dict(config.encoders[kind]) for kind in encoders}]
            ),
        )

    @cached_property
    def _vae(self) -> Network:
        return self.model.load("vae", self.settings.dtype)

    @cached_property
    def _frames_at_once(self) -> int:
        """Of a call of the VAE on each device; the same for all clips, whatever memory is free by then."""
        return batches("balanced", self.model.config, self.settings.dtype).frames

    @cached_property
    def _encoders(self) -> dict[EncoderKind, Params]:
        return {kind: self.model.load_encoder(kind) for kind in self.stored.encoders}

    def _records(self, faces: Faces, crops: Iterable[np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        config, frames = self.model.config, len(faces.present)
        voices = {0.0: faces.wave} | {shift: shifted(faces.wave, shift) for shift in self.stored.pitch}
        features = {
            audio_name(kind, shift): audio_features(config.encoders[kind], params, wave, frames)
            for kind, params in self._encoders.items()
            for shift, wave in voices.items()
        }
        encoded, shown = tee(crops)
        latents = self._latents(encoded, faces.files[0].sha256)
        pictures = spread(encode_frame, shown, COMPRESSING)
        for i, (latent, picture) in enumerate(zip(latents, pictures, strict=True)):
            audio = {name: vectors[i] for name, vectors in features.items()}
            yield {**latent, "landmarks": faces.landmarks[i], **audio, "frame": picture}

    def _latents(self, crops: Iterator[np.ndarray], sha256: str) -> Iterator[dict[str, np.ndarray]]:
        """What is stored of each frame's posterior."""
        rng = np.random.default_rng([self.settings.seed, int(sha256[:16], 16)])
        devices = local_devices(self.settings.devices)
        for posterior in encode_posterior(self._vae, crops, self._frames_at_once, devices):
            for mean, logvar in zip(posterior.mean, posterior.logvar, strict=True):
                if self.stored.latents == "posterior":
                    yield {"mean": mean.astype(np.float16), "logvar": logvar.astype(np.float16)}
                else:
                    noise = rng.standard_normal(mean.shape, np.float32)
                    yield {"mean": mean + np.exp(0.5 * logvar) * noise}


def _try_detector(clips: Sequence[Clip], settings: PrepareSettings) -> str | None:
    """Makes sure that there is a detector, where a clip needs one, and fetches its model file only once.

    Returns:
      SHA-256 of the model file; None for a detector without one, and where no clip needs one.
    """
    if all(clip.landmarks is not None for clip in clips):
        return None
    make_detector(settings.landmarks, settings.landmark_model, settings.allow_download).close()
    return detector_identity(settings.landmarks, settings.landmark_model).get("model")
