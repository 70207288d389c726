"""From raw clips to a dataset to train on: the job behind `keysync prepare`.

Worker processes decode, find faces and cut crops (`faces`); this process encodes latents and sound and
writes. A finished clip is a part file in the dataset's `.work` folder, so an interrupted run goes on
behind the clips that are done; at the end the parts are put together to shards, in the order of the clips'
names, and the manifest is written last.
"""

import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import tee
from pathlib import Path
from typing import Protocol, get_args

import numpy as np

from keysync_jax import __version__
from keysync_jax.backend import computing
from keysync_jax.config import Dtype, EncoderKind, VAEConfig, encoder_name, to_dict
from keysync_jax.data.faces import Faces, Task, attempt, cut_all, read_crops
from keysync_jax.data.parts import Done, Part, Skipped, Work, key_of, open_work, remove_work, write_part
from keysync_jax.data.precomputed import feature_dims, latents_of, read_pixels, read_precomputed
from keysync_jax.data.records import (
    FORMAT,
    MANIFEST,
    ClipInfo,
    Dataset,
    EncoderInfo,
    LatentKind,
    Manifest,
    Settings,
    audio_name,
    encode_frame,
    runs_without,
)
from keysync_jax.data.report import PrepareReport, add_sources, check_same, read_report
from keysync_jax.data.sources import (
    EMBEDDINGS,
    Clip,
    find_clips,
    has_latents,
    is_reference_layout,
    stat_all,
    states_of,
)
from keysync_jax.errors import UserError, machine_fault
from keysync_jax.files import fingerprint
from keysync_jax.media.detectors import DETECTORS, detector_identity, make_detector
from keysync_jax.media.pitch import check_semitones, shifted
from keysync_jax.model import DTYPES, Model, Network, model_bytes, model_folder, open_model
from keysync_jax.pipeline.environment import code_digest
from keysync_jax.pipeline.features import audio_features
from keysync_jax.pipeline.latents import encode_posterior
from keysync_jax.pipeline.phases import Phases
from keysync_jax.typing import Params

MIB = 2**20

SHORTEST = 14
"""Frames of the shortest sample: T in a row."""

CODE = ("config", "data", "media", "model", "nn", "pipeline", "tensorfile")
"""Modules and packages of keysync_jax that a part is made by."""

_OF_VIDEOS = ("landmarks", "landmark_model", "allow_download", "latents", "seed", "dtype", "workers", "crop")


@dataclass(frozen=True)
class PrepareSettings:
    """How to prepare. Precomputed latents refuse what is of videos alone.

    Attributes:
      encoders: audio features to compute; those of every encoder that the model has, where empty.
      pitch: semitones, up or down, by which the voice is shifted for further features of every encoder.
      landmarks: detector for the clips that have no `.npy` file of landmarks beside them.
      landmark_model: the detector's model file, where it is not in the cache.
      allow_download: fetch a detector's model file from its official address, and a model that is on the hub.
      latents: store the posterior, from which training samples anew, or one sample of it.
      seed: of stored samples.
      dtype: "fp32", "tf32" or "bf16", of the VAE's computation; audio features are fp32.
      workers: processes that decode and look for faces; 0: this one. The dataset does not depend on it.
      shard_mib: size at which a shard is full; a clip is never split.
      crop: side of the crop of a dataset for training a VAE: frames and landmarks alone, without a model.
      retry_skipped: try the clips again that an earlier call skipped. In a complete dataset those that can be
        used now lie behind the others, in shards of their own.
    """

    encoders: tuple[EncoderKind, ...] = ()
    pitch: tuple[float, ...] = ()
    landmarks: str = "mediapipe"
    landmark_model: Path | None = None
    allow_download: bool = False
    latents: LatentKind = "posterior"
    seed: int = 0
    dtype: Dtype = "fp32"
    workers: int = 0
    shard_mib: int = 512
    crop: int | None = None
    retry_skipped: bool = False

    def __post_init__(self) -> None:
        for semitones in self.pitch:
            check_semitones(semitones)
        if self.landmarks not in DETECTORS:
            raise UserError(
                f"there is no landmark detector {self.landmarks}; choose one of {', '.join(DETECTORS)}"
            )
        if self.latents not in ("posterior", "sample"):
            raise UserError(f"the latents are stored as posterior or sample, not {self.latents}")
        if self.dtype not in DTYPES:
            raise UserError(f"the dtype is one of {', '.join(DTYPES)}, not {self.dtype}")
        if self.seed < 0:
            raise UserError(f"the seed is 0 or more, not {self.seed}")
        if self.workers < 0:
            raise UserError(f"the number of workers is 0 or more, not {self.workers}")
        if self.crop is not None and self.crop < 16:
            raise UserError(f"a crop has a side of 16 pixels or more, not {self.crop}")
        if self.shard_mib < 1:
            raise UserError(f"a shard holds at least 1 MiB, not {self.shard_mib}")


def prepare(
    source: str | Path | Sequence[Path],
    output: str | Path,
    model: str | Path | Model | None = None,
    settings: PrepareSettings | None = None,
    show_progress: bool = False,
) -> PrepareReport:
    """Prepares a dataset for training.

    Of every clip: frames at 25 a second, the crop that follows the face, 68 landmarks, the VAE's posterior,
    audio features, and the crop as JPEG. A clip that cannot be used is skipped and the report says why. What
    the machine cannot do (a disk that fails, memory, permissions) ends the call and skips nothing. An
    interrupted call goes on where it was when it is repeated; on a complete dataset it does nothing.

    Args:
      source: a folder of videos (searched with its subfolders), a video, a `.txt` file that lists videos, a
        list of videos and folders, or the reference's own folders with precomputed latents.
      output: folder of the dataset.
      model: a model directory, or one on the hub (`model.model_folder`), for its VAE and audio encoders;
        precomputed latents need none.

    Raises:
      UserError: an argument cannot be used, or not one clip can; the dataset is complete, and of other clips,
        settings or files.
      OSError: the machine cannot read a clip, or write.
    """
    source = Path(source) if isinstance(source, str) else source
    output, settings, phases = Path(output), settings or PrepareSettings(), Phases(show=show_progress)
    clips = find_clips(source)
    if isinstance(model, str | Path):
        folder = model_folder(model, settings.allow_download)
        with phases.phase("checking", model_bytes(folder), "B") as advance:
            model = open_model(folder, advance)
    maker: _Maker
    if is_reference_layout(source):
        maker = _FromPrecomputed(clips, settings, model)
    elif settings.crop is not None:
        if model is not None:
            raise UserError("prepare takes --crop, for frames alone, or --model, whose size the crop has")
        maker = _FramesAlone(clips, settings, settings.crop)
    elif model is None:
        raise UserError(
            "prepare needs a model directory, for its VAE and audio encoders (or --crop, for frames alone)"
        )
    else:
        maker = _FromVideos(clips, settings, model)
    decided = False
    if not os.path.isfile(output / MANIFEST):  # Not Path.is_file, which fails in a folder without permission.
        with _open_work(output, maker, settings) as work, computing(settings.dtype):
            decided = work.planned
            report = _make(clips, maker, work, phases)
        if not (decided and settings.retry_skipped):  # The skipped ones have just been tried otherwise.
            return report
    return _complete(output, clips, maker, settings, phases)


def check(dataset: str | Path, show_progress: bool = False) -> Dataset:
    """Reads all of a dataset and compares it with its manifest.

    Raises:
      UserError: something is missing, truncated or altered.
    """
    opened = Dataset(dataset)
    total = sum(shard.bytes for shard in opened.manifest.shards)
    with Phases(show=show_progress).phase("checking", total, "B") as advance:
        opened.verify(advance)
    return opened


class _Maker(Protocol):
    """Makes the records of clips.

    Attributes:
      stored: what the manifest will say of all of them.
    """

    stored: Settings

    def make(self, clips: Sequence[Clip], work: Work) -> Generator[tuple[Clip, Part | str]]:
        """A part, or the reason why there is none, for every clip in order."""
        ...


class _Videos:
    """What is the same for every dataset that is made from videos."""

    stored: Settings

    def __init__(self, settings: PrepareSettings):
        self.settings = settings

    def make(self, clips: Sequence[Clip], work: Work) -> Generator[tuple[Clip, Part | str]]:
        tasks = [
            Task(
                clip,
                work.crops / key_of(clip.name),
                self.stored.crop_size,
                SHORTEST,
                self.settings.landmarks,
                self.settings.landmark_model,
            )
            for clip in clips
        ]
        with closing(cut_all(tasks, self.settings.workers)) as results:
            for task, faces in results:
                try:
                    # An error here, of the device or the disk, is not the clip's fault and ends the run.
                    yield task.clip, faces if isinstance(faces, str) else self._part(task, faces, work)
                finally:
                    task.crops.unlink(missing_ok=True)

    def _part(self, task: Task, faces: Faces, work: Work) -> Part:
        clip, frames = task.clip, len(faces.present)
        gaps = runs_without(faces.present)
        info = ClipInfo(clip.name, clip.source, faces.files[0].sha256, frames, 0, 0, gaps)
        part = write_part(work.records(clip), info, self._records(task, faces), self.stored)
        return replace(part, files=faces.files)

    def _records(self, task: Task, faces: Faces) -> Iterator[dict[str, np.ndarray]]:
        """The arrays of every frame."""
        raise NotImplementedError


class _FramesAlone(_Videos):
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

    def _records(self, task: Task, faces: Faces) -> Iterator[dict[str, np.ndarray]]:
        for points, crop in zip(faces.landmarks, read_crops(task.crops), strict=True):
            yield {"landmarks": points, "frame": encode_frame(crop)}


class _FromVideos(_Videos):
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
    def _encoders(self) -> dict[EncoderKind, Params]:
        return {kind: self.model.load_encoder(kind) for kind in self.stored.encoders}

    def _records(self, task: Task, faces: Faces) -> Iterator[dict[str, np.ndarray]]:
        config, frames = self.model.config, len(faces.present)
        voices = {0.0: faces.wave} | {shift: shifted(faces.wave, shift) for shift in self.stored.pitch}
        features = {
            audio_name(kind, shift): audio_features(config.encoders[kind], params, wave, frames)
            for kind, params in self._encoders.items()
            for shift, wave in voices.items()
        }
        crops, pixels = tee(read_crops(task.crops))
        latents = self._latents(crops, faces.files[0].sha256)
        for i, (crop, latent) in enumerate(zip(pixels, latents, strict=True)):
            audio = {name: vectors[i] for name, vectors in features.items()}
            yield {**latent, "landmarks": faces.landmarks[i], **audio, "frame": encode_frame(crop)}

    def _latents(self, crops: Iterator[np.ndarray], sha256: str) -> Iterator[dict[str, np.ndarray]]:
        """What is stored of each frame's posterior."""
        rng = np.random.default_rng([self.settings.seed, int(sha256[:16], 16)])
        for posterior in encode_posterior(self._vae, crops):
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


class _FromPrecomputed:
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


def _open_work(output: Path, maker: _Maker, settings: PrepareSettings) -> AbstractContextManager[Work]:
    return open_work(output, maker.stored, settings.shard_mib * MIB, _code())


def _code() -> str:
    """What parts are made by."""
    return f"{__version__} {code_digest(*CODE)}"


def _make(clips: Sequence[Clip], maker: _Maker, work: Work, phases: Phases) -> PrepareReport:
    """A new dataset, or a further piece of a complete one."""
    if work.planned:
        done, skipped = work.plan(clips)
    else:
        done, skipped = _make_parts(clips, maker, work, phases)
        if done:
            work.decide(done, skipped)
    if done:
        return _finish(done, skipped, work, phases)
    work.discard()
    if work.before is None:
        raise UserError(f"none of the {len(clips)} clips can be used; the first: {skipped[0][1]}")
    report = PrepareReport.of(work.before, skipped)
    report.save(work.output)
    return report


def _make_parts(
    clips: Sequence[Clip], maker: _Maker, work: Work, phases: Phases
) -> tuple[list[Done], Skipped]:
    """Parts of all clips, those of an earlier run included, and the clips that were skipped."""
    parts = {clip.name: part for clip in clips if (part := work.find(clip)) is not None}
    missing = [clip for clip in clips if clip.name not in parts]
    reasons: dict[str, str] = {}
    with (
        phases.phase("clips", len(clips), "clips", len(parts)) as advance,
        closing(maker.make(missing, work)) as results,
    ):
        for clip, made in results:
            if isinstance(made, str):
                reasons[clip.name] = made
            else:
                work.finish(clip, made)
                parts[clip.name] = made
            advance(1)
    done = [(clip, parts[clip.name]) for clip in clips if clip.name in parts]
    return done, [(clip.source, reasons[clip.name]) for clip in clips if clip.name in reasons]


def _finish(done: list[Done], skipped: Skipped, work: Work, phases: Phases) -> PrepareReport:
    """Shards, then the report and the manifest."""
    with phases.phase("shards", len(done), "clips") as advance:
        manifest = work.assemble(done, advance)
    manifest = replace(manifest, code=tuple(dict.fromkeys([*manifest.code, _code()])))
    report = PrepareReport.of(manifest, skipped)
    add_sources(work.output, done)
    if work.before is None:
        report.save(work.output)
        manifest.save(work.output)
    else:  # The manifest says first which clips were added, see read_report.
        manifest.save(work.output)
        report.save(work.output)
    work.discard()
    return report


def _complete(
    output: Path, clips: Sequence[Clip], maker: _Maker, settings: PrepareSettings, phases: Phases
) -> PrepareReport:
    """The report of a complete dataset that the same call made, after another try of the skipped if asked."""
    manifest = Manifest.load(output)
    report = read_report(output, manifest)
    check_same(output, manifest, report.skipped, maker.stored, clips, phases)
    skipped = {source for source, _ in report.skipped}
    if not (settings.retry_skipped and skipped):
        remove_work(output)
        return report
    if manifest.format != FORMAT:
        raise UserError(
            f"{output}: is of the format {manifest.format}, to which no clips are added; prepare it anew"
        )
    with _open_work(output, maker, settings) as work, computing(settings.dtype):
        return _make([clip for clip in clips if clip.source in skipped], maker, work, phases)
