"""From a video and a voice to a dubbed video: the whole path, phase by phase.

Every phase streams or keeps its result on disk (`workspace`), so host memory does not grow with the
clip but for landmarks, masks and audio features; and an interrupted run goes on where it was.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path
from typing import Literal, get_args

import jax
import numpy as np

from keysync_jax import __version__
from keysync_jax.backend import computing
from keysync_jax.config import Dtype, GuidanceConfig, Interval, ModelConfig, StageKind, to_dict
from keysync_jax.errors import UserError
from keysync_jax.files import sha256_of
from keysync_jax.media.composite import paste, seam_energy
from keysync_jax.media.crop import crop_frame
from keysync_jax.media.detectors import DETECTORS, detector_identity, make_detector
from keysync_jax.media.landmarks import bridge, load_landmarks, runs_without, save_landmarks
from keysync_jax.media.occlusion import Occluder
from keysync_jax.media.playback import played_frames
from keysync_jax.media.timeline import FPS, Longer
from keysync_jax.media.video import read_frames
from keysync_jax.media.writer import VideoWriter, check_writable
from keysync_jax.model import Model, model_bytes, model_folder, open_model
from keysync_jax.pipeline.devices import Devices, check_count, local_devices
from keysync_jax.pipeline.encoding import Encoder, detect_and_encode
from keysync_jax.pipeline.environment import environment
from keysync_jax.pipeline.features import audio_features
from keysync_jax.pipeline.flow import Clock, ahead, spread
from keysync_jax.pipeline.generate import Clip, Features, Sampling, check_features, interpolation, keyframes
from keysync_jax.pipeline.identity import CURRENT, Chosen, Identity
from keysync_jax.pipeline.latents import decode_frames, encode_frames
from keysync_jax.pipeline.memory import Batches, Memory, batches, check_memory
from keysync_jax.pipeline.phases import Phases, Told
from keysync_jax.pipeline.programs import Compiling, programs
from keysync_jax.pipeline.report import DubReport, warned
from keysync_jax.pipeline.sampling import guidance_of, sigmas_of
from keysync_jax.pipeline.source import Geometry, Source, face_geometry, probe_source
from keysync_jax.pipeline.windows import FRAMES, merge_windows
from keysync_jax.pipeline.workspace import ResumableArray, Workspace
from keysync_jax.typing import Frames

AHEAD = 8
"""Frames that are read, or pasted, before they are asked for."""

Decoder = Literal["full", "small"]

PASTING = 4
"""Threads that paste faces, each a frame."""

BORDER_EVERY = 25
"""The border of the paste is measured in one frame in so many."""


@dataclass(frozen=True)
class DubSettings:
    """How to dub.

    Attributes:
      landmarks: a `.npy` file with landmarks `[frames, 68, 2]`, or the name of a detector.
      landmark_model: the detector's model file, where it is not in the cache.
      allow_download: fetch a detector's model file from its official address, and a model that is on the hub.
      occluder: masks of what lies before the face, as `media.occlusion.Occluder` takes them; it is left as it
        is (eq. 7).
      identity: what shows the networks who it is (`pipeline.identity`).
      longer_voice: what the video does where the voice is longer: it plays "to-and-fro", in a "loop" (whose
        end and beginning meet in a cut), stands still at its last frame ("freeze"), or the dub ends with it
        ("stop").
      provenance: whether the file says that its picture is synthetic, and what made it.
      steps: of the align-your-steps schedule, at least 10; the model's own where None.
      audio_interval, identity_interval: noise levels at which the samples are guided by each; the model's own
        (the paper's: all of them) where None. Fewer take less time.
      decoder: "full": the VAE's; "small": the model's small one, in about a tenth of the work.
      seed: of all noise; the same inputs, seed and device give the same result.
      dtype: "bf16" or "fp32", of the networks; bf16 on an accelerator and fp32 on CPU where None.
      quality: constant rate factor of the video, 0 (lossless) to 51.
      memory: "small", "balanced" or "fast", how much of a device's memory is used; see `memory.Memory`. The
        result does not depend on it beyond rounding.
      windows_per_call: windows of a network call that each device takes, at most; as `memory` says where it
        is None. More use an accelerator better.
      devices: of this host that share the work; all of them where None. The result does not depend on it
        beyond rounding.
    """

    landmarks: str = "mediapipe"
    landmark_model: Path | None = None
    allow_download: bool = False
    occluder: Path | None = None
    identity: str = "first"
    longer_voice: Longer = "to-and-fro"
    provenance: bool = True
    steps: int | None = None
    audio_interval: Interval | None = None
    identity_interval: Interval | None = None
    decoder: Decoder = "full"
    seed: int = 0
    dtype: Dtype | None = None
    quality: int = 16
    memory: Memory = "balanced"
    windows_per_call: int | None = None
    devices: int | None = None

    def __post_init__(self) -> None:
        if self.dtype not in (None, "fp32", "bf16"):
            raise UserError(f"the dtype is fp32 or bf16, not {self.dtype}")
        if self.longer_voice not in get_args(Longer):
            choices = ", ".join(get_args(Longer))
            raise UserError(f"under a longer voice a video plays {choices}, not {self.longer_voice}")
        if self.decoder not in get_args(Decoder):
            raise UserError(f"the decoder is full or small, not {self.decoder}")
        if not 0 <= self.quality <= 51:
            raise UserError(f"the quality is 0 (lossless) to 51, not {self.quality}")
        if self.landmark_model is not None and self.landmarks != "mediapipe":
            raise UserError(f"a landmark model is MediaPipe's; landmarks={self.landmarks} takes none")
        check_memory(self.memory)
        if self.windows_per_call is not None and self.windows_per_call < 1:
            raise UserError(f"a network call takes at least 1 window, not {self.windows_per_call}")
        check_count(self.devices)

    def guidance(self, config: GuidanceConfig) -> GuidanceConfig:
        """A model's guidance in the intervals that are asked for.

        Raises:
          UserError: there are some, and the model is not guided.
        """
        audio, identity = self.audio_interval, self.identity_interval
        if audio is None and identity is None:
            return config
        if config.kind == "none":
            raise UserError("this model is not guided, so its guidance has no interval")
        return config.within(audio or config.audio_interval, identity or config.identity_interval)

    def component(self, config: ModelConfig) -> str:
        """Name of the model's component that decodes.

        Raises:
          UserError: it has no small decoder, and that is asked for.
        """
        if self.decoder == "small" and config.decoder_small is None:
            raise UserError("this model has no small decoder; leave --decoder out (docs/distillation.md)")
        return "decoder_small" if self.decoder == "small" else "vae"

    @property
    def compute_dtype(self) -> Dtype:
        return self.dtype or ("fp32" if jax.default_backend() == "cpu" else "bf16")


def dub(
    video: str | Path,
    voice: str | Path,
    output: str | Path,
    model: str | Path | Model,
    settings: DubSettings | None = None,
    show_progress: bool = False,
    told: Told | None = None,
) -> DubReport:
    """Dubs a video with a voice; the output is as long as the voice, unless it is to stop with the video.

    The face crop of every frame is generated anew below the nose bridge and pasted back into the full
    frame; where no face is found the source passes through. The voice is muxed at its own sample rate. An
    interrupted call goes on where it was when it is repeated.

    Args:
      video: any file that PyAV reads; it is resampled to 25 frames a second.
      voice: any file with sound.
      output: .mp4, .m4v, .mov or .mkv.
      model: a model directory (`keysync convert` makes one), or one on the hub (`model.model_folder`).
      told: is told where the dub is: phase, units done, and all of them.

    Raises:
      UserError: an input cannot be used; nothing was written.
    """
    with warned() as warnings:
        phases = Phases(show=show_progress, told=told)
        made = _dub(Path(video), Path(voice), Path(output), model, settings or DubSettings(), phases)
    return replace(made, warnings=tuple(warnings))


def _dub(
    video: Path, voice: Path, output: Path, model: str | Path | Model, settings: DubSettings, phases: Phases
) -> DubReport:
    devices = local_devices(settings.devices)
    check_writable(output)
    for source_file in (video, voice):
        if output.resolve() == source_file.resolve():
            raise UserError(f"cannot write {output}: it is an input; give the dub a name of its own")
    # Rows of a file are one for each frame of the video.
    rows_are_given = settings.landmarks not in DETECTORS or settings.occluder is not None
    source = probe_source(video, voice, rows_are_given, settings.longer_voice)
    if not isinstance(model, Model):
        model = model_folder(model, settings.allow_download)
    given = _given_landmarks(source, settings)
    occluder = _given_occluder(source, settings)
    identity = Identity.given(settings, source.used)
    if not isinstance(model, Model):
        model = _open(Path(model), phases)
    if model.config.keyframe.frames != FRAMES:
        raise UserError(
            f"the plan of a dub is for {FRAMES} frames a call, the model's is {model.config.keyframe.frames}"
        )
    dtype, decoder = settings.compute_dtype, settings.component(model.config)
    sizes = batches(settings.memory, model.config, dtype, settings.windows_per_call)
    sampling = sampling_of(model.config, settings, devices, sizes)
    identities = model.config.keyframe.frames if identity.name == CURRENT else 1
    made_from = _fingerprint(source, model, settings, sampling, identity)
    with (
        Workspace(output, made_from) as work,
        computing(dtype),
        Compiling(
            programs(model.config, dtype, sampling, sizes.frames, source.plan, identities, decoder),
            dtype,
            _complete(source, work),
        ) as compiling,
    ):
        encoder = Encoder(source, model, dtype, sizes.frames, devices, work, compiling)
        landmarks, present = _landmarks(source, settings, given, encoder, phases)
        geometry = face_geometry(source, model.config, landmarks, present, occluder, phases)
        chosen = identity.choose(landmarks, present, settings, model.config.crop_size)
        run = _Run(
            source, model, settings, sampling, sizes, geometry, chosen, work, phases, compiling, encoder
        )
        report = run.to(output)
        work.remove()
    return replace(report, made_from=made_from, settings=_plain(settings))


def _plain(settings: DubSettings) -> dict[str, object]:
    """The settings in JSON's types."""
    return {
        name: str(value) if isinstance(value, Path) else value for name, value in to_dict(settings).items()
    }


def sampling_of(config: ModelConfig, settings: DubSettings, devices: Devices, sizes: Batches) -> Sampling:
    """How a dub samples with a model."""
    sigmas = sigmas_of(config, settings.steps)
    return Sampling(
        guidance_of(settings.guidance(config.guidance), sigmas),
        sigmas,
        settings.seed,
        sizes.windows,
        config.vae.scale_factor,
        devices,
        sizes.in_turn,
    )


def _complete(source: Source, work: Workspace) -> set[str]:
    """Phases that an earlier run has completed."""
    plan = source.plan
    rows = {
        "encode": ("latents", source.used),
        "keyframes": ("keyframes", len(plan.keyframes)),
        "interpolation": ("windows", len(plan.windows)),
    }
    return {phase for phase, (name, count) in rows.items() if work.done(name) == count}


def _open(folder: Path, phases: Phases) -> Model:
    with phases.phase("checking", model_bytes(folder), "B") as advance:
        return open_model(folder, advance)


def _fingerprint(
    source: Source, model: Model, settings: DubSettings, sampling: Sampling, identity: Identity
) -> dict[str, object]:
    """Everything that landmarks, latents and generated frames depend on."""
    landmarks = settings.landmarks
    return {
        **environment(),
        "video": sha256_of(source.video),
        "voice": sha256_of(source.voice),
        "landmarks": detector_identity(landmarks, settings.landmark_model)
        if landmarks in DETECTORS
        else sha256_of(landmarks),
        "occluder": None if settings.occluder is None else sha256_of(settings.occluder),
        "identity": identity.digest,
        "longer voice": settings.longer_voice,
        "model": model.fingerprint,
        "sigmas": sampling.sigmas.tolist(),
        "guidance": to_dict(settings.guidance(model.config.guidance)),
        "seed": settings.seed,
        "dtype": settings.compute_dtype,
    }


def _given_landmarks(source: Source, settings: DubSettings) -> np.ndarray | None:
    """Landmarks of every used frame out of the user's file, which is checked; None with a detector."""
    if settings.landmarks in DETECTORS:
        return None
    found = load_landmarks(Path(settings.landmarks), len(source.timeline), source.timeline)[: source.used]
    bridge(found)
    return found


def _given_occluder(source: Source, settings: DubSettings) -> Occluder | None:
    if settings.occluder is None:
        return None
    return Occluder(settings.occluder, len(source.timeline), source.info.height, source.info.width)


def _landmarks(
    source: Source, settings: DubSettings, given: np.ndarray | None, encoder: Encoder, phases: Phases
) -> tuple[np.ndarray, np.ndarray]:
    """Landmarks of every used frame, and whether it has a face, as `bridge` returns them.

    They are given, kept by an earlier run, or found now; they are kept once it is clear that there is a face.
    """
    stored = encoder.work.folder / "landmarks.npy"
    if given is None and not stored.is_file():
        device, decoder = Clock(), Clock()
        with phases.phase("landmarks", source.used, "frames", device=device, decoder=decoder) as advance:
            chosen = (settings.landmarks, settings.landmark_model, settings.allow_download)
            with closing(make_detector(*chosen)) as detector:
                found = detect_and_encode(source, detector, encoder, advance, device, decoder)
            bridged = bridge(found)
            save_landmarks(stored, found)
            return bridged
    with phases.phase("landmarks", source.used, "frames") as advance:
        found = load_landmarks(stored, source.used) if given is None else given
        advance(source.used)
        return bridge(found)


@dataclass
class _Run:
    """One dub after its inputs were checked: the phases, in the paper's order."""

    source: Source
    model: Model
    settings: DubSettings
    sampling: Sampling
    sizes: Batches
    geometry: Geometry
    identity: Chosen
    work: Workspace
    phases: Phases
    compiling: Compiling
    encoder: Encoder
    borders: list[tuple[float, float]] = field(default_factory=list)

    def to(self, output: Path) -> DubReport:
        latents = self._encode().values
        clip = Clip(latents, self.geometry.masks, self.source.shown, self._shown_identity())
        features = self._listen()
        keys = self._keyframes(clip, features)
        device = Clock()
        windows = self._windows(clip, features, keys.values, device)
        if self.settings.memory == "small":
            windows, device = self._interpolate(windows, device), Clock()
        self._compose(windows, output, device)
        present = self.geometry.present[self.source.shown[: self.source.frames]]
        absent = int((~present).sum())
        before, after = (sum(energies) for energies in zip((0.0, 0.0), *self.borders, strict=True))
        border = after / before if before > 0 else None
        return DubReport(output, self.source.frames, absent, self.phases, runs_without(present), border)

    def _latents(self, name: str, rows: int, *inner: int) -> ResumableArray:
        size, channels = self.model.config.keyframe.latent_size, self.model.config.vae.latent_channels
        return self.work.array(name, (rows, *inner, size, size, channels))

    def _encode(self) -> ResumableArray:
        """Latents of the crop of every used frame: those that were not made while landmarks were found."""
        count, done = self.source.used, self.encoder.done
        device, decoder = Clock(), Clock()
        with self.phases.phase("encode", count, "frames", done, device=device, decoder=decoder) as advance:
            if done < count:
                with ahead(decoder.timed(self._crops(done)), AHEAD) as crops:
                    for made in self.encoder.encode(crops, device):
                        advance(made)
        return self.encoder.latents

    def _shown_identity(self) -> Chosen:
        """The identity as `Clip` takes it: the crop of a picture as its latent."""
        if not isinstance(self.identity, np.ndarray):
            return self.identity
        vae = self.model.load("vae", self.settings.compute_dtype)
        return next(encode_frames(vae, [self.identity], *self._frames_at_once()))[0]

    def _frames_at_once(self) -> tuple[int, Devices]:
        """Frames of a call of the VAE that each device takes, and the devices."""
        return self.sizes.frames, self.sampling.devices

    def _crops(self, first: int) -> Iterator[np.ndarray]:
        size = self.model.config.crop_size
        frames = islice(read_frames(self.source.video), first, self.source.used)
        for frame, box in zip(frames, self.geometry.boxes[first:], strict=True):
            yield crop_frame(frame, box, size)

    def _listen(self) -> dict[StageKind, Features]:
        """Features of the voice for each stage, from the encoder that the stage was trained on.

        The plan can reach up to 12 frames past the voice; those frames, dropped later, repeat the last
        vectors, so the features of the voice itself do not depend on the plan.
        """
        config, frames = self.model.config, self.source.frames
        planned = len(self.source.shown)
        made: dict[str, Features] = {}
        kinds = sorted({config.keyframe.audio_encoder, config.interpolation.audio_encoder})
        with self.phases.phase("audio", len(kinds), "encoders") as advance:
            self.compiling.wait("audio")
            for kind in kinds:
                params = self.model.load_encoder(kind)
                vectors = audio_features(config.encoders[kind], params, self.source.wave, frames)
                made[kind] = Features(kind, np.concatenate([vectors, vectors[[-1] * (planned - frames)]]))
                advance(1)
        stages: dict[StageKind, Features] = {
            "keyframe": made[config.keyframe.audio_encoder],
            "interpolation": made[config.interpolation.audio_encoder],
        }
        for stage, features in stages.items():
            check_features(config.stage(stage), features, planned)
        return stages

    def _keyframes(self, clip: Clip, features: dict[StageKind, Features]) -> ResumableArray:
        plan, latents = self.source.plan, self._latents("keyframes", len(self.source.plan.keyframes))
        kept = [len(call.kept) for call in plan.keyframe_calls]
        calls = sum(n > 0 for n in kept)
        first = int(np.searchsorted(np.cumsum(kept), latents.done, side="right"))
        device = Clock()
        with self.phases.phase("keyframes", calls, "calls", first, device=device) as advance:
            if not latents.complete:
                network = self.model.load("keyframe", self.settings.compute_dtype)
                self.compiling.wait("keyframes")
                inputs = (network, clip, plan, features["keyframe"], self.sampling)
                for rows in keyframes(*inputs, first, device):
                    latents.append(rows)
                    advance(1)
        return latents

    def _windows(
        self, clip: Clip, features: dict[StageKind, Features], keyframe_latents: np.ndarray, device: Clock
    ) -> Iterator[np.ndarray]:
        """Latents of every window in order, those that an earlier run made first; new ones are kept."""
        plan = self.source.plan
        latents = self._latents("windows", len(plan.windows), self.model.config.interpolation.frames)
        done = latents.done
        yield from latents.values[:done]
        if done < len(latents):
            network = self.model.load("interpolation", self.settings.compute_dtype)
            self.compiling.wait("interpolation")
            inputs = (network, clip, plan, features["interpolation"], keyframe_latents, self.sampling)
            for window in interpolation(*inputs, done, device):
                latents.append(window[None])
                yield window

    def _interpolate(self, windows: Iterator[np.ndarray], device: Clock) -> Iterator[np.ndarray]:
        """All windows before any is decoded, so that their network's memory is free again by then."""
        count = len(self.source.plan.windows)
        with self.phases.phase("interpolation", count, "windows", device=device) as advance:
            for _ in windows:
                advance(1)
        return iter(self._latents("windows", count, self.model.config.interpolation.frames).values)

    def _compose(self, windows: Iterator[np.ndarray], output: Path, device: Clock) -> None:
        """Samples and decodes the windows, pastes each frame into the source's and writes it, all at once."""
        info, source = self.source.info, self.source
        decoder, encoder = Clock(), Clock()
        originals = played_frames(source.video, source.frames, source.longer, timeline=source.timeline)
        with (
            self.phases.phase(
                "compose", source.frames, "frames", device=device, decoder=decoder, encoder=encoder
            ) as advance,
            ahead(decoder.timed(originals), AHEAD) as read,
            ahead(self._decoded(windows, device), 1) as calls,
            ahead(self._composed(read, calls), AHEAD) as frames,
            ExitStack() as file,
        ):
            writer = VideoWriter(
                output,
                info.width,
                info.height,
                source.voice,
                quality=self.settings.quality,
                colour=info.colour,
                aspect=info.aspect,
                until=Fraction(source.frames, FPS) if source.longer == "stop" else None,
                metadata=self._provenance() if self.settings.provenance else None,
            )
            file.enter_context(writer)
            for frame in frames:
                with encoder.running():
                    writer.write(frame)
                advance(1)
            with encoder.running():  # It holds some frames back until the file is closed.
                file.close()

    def _composed(self, read: Iterator[np.ndarray], calls: Iterator[Frames]) -> Iterator[np.ndarray]:
        faces = chain.from_iterable(calls)
        return composed(read, faces, self.geometry, self.source.shown, self.borders)

    def _provenance(self) -> dict[str, str]:
        """What the file says of itself."""
        made = f"keysync_jax {__version__}, model {self.model.fingerprint[:16]}, seed {self.settings.seed}"
        said = "The mouth in this video is synthetic: it was generated to follow the voice."
        return {"comment": f"{said} Made by {made}."}

    def _decoded(self, windows: Iterator[np.ndarray], device: Clock) -> Iterator[Frames]:
        """Generated crops of the frames that have a face, call by call; for a thread of its own."""
        with computing(self.settings.compute_dtype):
            decoder = self.settings.component(self.model.config)
            network = self.model.load(decoder, self.settings.compute_dtype)
            self.compiling.wait("compose")
            yield from decode_frames(network, self._shown_latents(windows), *self._frames_at_once(), device)

    def _shown_latents(self, windows: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        """Latents of the frames that have a face; none that is not shown is decoded.

        A frame that two windows share has the same latents in both, its keyframe's: averaging them, as the
        reference averages their pixels, changes no bit.
        """
        shown = self.source.shown[: self.source.frames]
        for latents, at in zip(merge_windows(windows), shown, strict=False):
            if self.geometry.present[at]:
                yield latents


def composed(
    originals: Iterable[np.ndarray],
    generated: Iterable[np.ndarray],
    geometry: Geometry,
    shown: np.ndarray,
    borders: list[tuple[float, float]] | None = None,
) -> Iterator[np.ndarray]:
    """The dub's frames before encoding.

    Args:
      originals: uint8 `[H, W, 3]` of every frame of the dub.
      generated: uint8 `[S, S, 3]`, the generated crop of every frame that has a face.
      shown: frame of the video that each frame of the dub shows.
      borders: gets `seam_energy` of one frame in `BORDER_EVERY`.

    Yields:
      uint8 `[H, W, 3]`: the original where there is no face, and outside the pasted region.
    """
    faces = iter(generated)

    def pasted(item: tuple[int, np.ndarray, np.ndarray | None, int]) -> np.ndarray:
        number, original, face, at = item
        if face is None:
            return original
        place = geometry.masks[at], geometry.boxes[at]
        result = paste(original, face, *place)
        if borders is not None and number % BORDER_EVERY == 0:
            borders.append(seam_energy(original, result, *place))
        return result

    items = (
        (number, original, next(faces) if geometry.present[at] else None, at)
        for number, (original, at) in enumerate(zip(originals, shown, strict=False))
    )
    return spread(pasted, items, PASTING)
