"""A dataset's records from the reference's own folders (`precomputed`)."""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from keysync_jax.config import EncoderKind, VAEConfig, to_dict
from keysync_jax.data.faces import attempt
from keysync_jax.data.from_videos import SHORTEST
from keysync_jax.data.parts import Part, Work, write_part
from keysync_jax.data.precomputed import feature_dims, latents_of, read_pixels, read_precomputed
from keysync_jax.data.records import ClipInfo, EncoderInfo, Settings, audio_name, encode_frame
from keysync_jax.data.settings import PrepareSettings
from keysync_jax.data.sources import EMBEDDINGS, Clip, has_latents, stat_all, states_of
from keysync_jax.errors import UserError, machine_fault
from keysync_jax.files import fingerprint
from keysync_jax.media.landmarks import runs_without
from keysync_jax.model import Model

_OF_VIDEOS = (
    "landmarks",
    "landmark_model",
    "allow_download",
    "latents",
    "seed",
    "dtype",
    "workers",
    "devices",
    "crop",
)


class FromPrecomputed:
    """Makes records from the reference's folders."""

    def __init__(self, clips: Sequence[Clip], settings: PrepareSettings, model: Model | None):
        if settings.pitch:
            raise UserError(
                "precomputed features have no shifted voices; leave --pitch out, or prepare from the videos"
            )
        default = PrepareSettings()
        for name in _OF_VIDEOS:
            if getattr(settings, name) != getattr(default, name):
                raise UserError(
                    f"precomputed latents take no --{name.replace('_', '-')}; leave it out, or prepare from "
                    "the videos"
                )
        clips = [clip for clip in clips if has_latents(clip)]
        vae = VAEConfig() if model is None else model.config.vae
        self._scale = vae.scale_factor
        kinds = settings.encoders or tuple(
            kind for kind in EMBEDDINGS if any(kind in dict(clip.embeddings) for clip in clips)
        )
        size, dims = _first_sizes(clips, kinds, vae.latent_channels)
        if model is not None and size != model.config.keyframe.latent_size:
            raise UserError(
                f"the latents have the side {size}, the model's {model.config.keyframe.latent_size}"
            )
        self.stored = Settings(
            crop_size=size * vae.factor,
            latent_size=size,
            latents="sample",
            frames=any(clip.video is not None for clip in clips),
            vae=None,
            encoders={kind: EncoderInfo(dims[kind], None) for kind in sorted(kinds)},
            landmarks="files",
            latent_channels=vae.latent_channels,
            model=fingerprint([to_dict(vae)]),
        )

    def make(self, clips: Sequence[Clip], work: Work) -> Generator[tuple[Clip, Part | str]]:
        for clip in clips:
            yield clip, attempt(partial(self._part, clip, work), clip)

    def _part(self, clip: Clip, work: Work) -> Part:
        before = stat_all(clip)
        found = read_precomputed(clip, self.stored, self._scale, SHORTEST)
        files = states_of(clip, before)
        frames, gaps = len(found.present), runs_without(found.present)
        info = ClipInfo(clip.name, clip.source, files[0].sha256, frames, 0, 0, gaps)

        def records() -> Iterator[dict[str, np.ndarray]]:
            crops = read_pixels(clip, frames, self.stored.crop_size) if self.stored.frames else None
            for i, latent in enumerate(found.latents):
                audio = {audio_name(kind): vectors[i] for kind, vectors in found.features.items()}
                pixels = {} if crops is None else {"frame": encode_frame(next(crops))}
                yield {"mean": latent, "landmarks": found.landmarks[i], **audio, **pixels}

        return replace(write_part(work.records(clip), info, records(), self.stored), files=files)


def _first_sizes(
    clips: Sequence[Clip], kinds: Sequence[EncoderKind], channels: int
) -> tuple[int, dict[EncoderKind, int]]:
    """Side of the latents and width of the features, of the first clip that has them all."""
    failure = UserError(f"no clip has {' and '.join(kinds) or 'audio'} features beside its latents")
    for clip in clips:
        try:
            dims = feature_dims(clip)
            if kinds and all(kind in dims for kind in kinds):
                return latents_of(clip, channels).shape[2], dims
        except UserError as error:
            if fault := machine_fault(error):
                raise fault from error
            failure = error
    raise failure
