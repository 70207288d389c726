"""The whole pipeline on a real clip: what both sides are given, and what ours makes of it.

Latents, features, landmarks and noise are ours and given to both. So the plan, the masks, both stages, the
decoder and the merging of windows are compared, and no encoder and no generator of random numbers.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from keysync_jax.config import StageKind
from keysync_jax.diffusion.guidance import Separated
from keysync_jax.diffusion.schedule import align_your_steps
from keysync_jax.errors import UserError
from keysync_jax.media.audio import frames_of, read_audio
from keysync_jax.media.crop import crop_frame, crop_track, landmarks_in_crop
from keysync_jax.media.detectors import DETECTORS, make_detector
from keysync_jax.media.landmarks import bridge, detect_all, load_landmarks
from keysync_jax.media.masks import make_mask, to_latent
from keysync_jax.media.video import probe_video, read_frames, scan_timeline
from keysync_jax.model import Model, Network
from keysync_jax.parity import rules
from keysync_jax.parity.golden import Golden
from keysync_jax.parity.ours import StageNetwork, VAENetwork
from keysync_jax.pipeline.features import audio_features
from keysync_jax.pipeline.generate import (
    INTERPOLATION_STREAM,
    KEYFRAME_STREAM,
    Clip,
    Features,
    Sampling,
    interpolation,
    keyframes,
)
from keysync_jax.pipeline.latents import decode_latents, encode_frames
from keysync_jax.pipeline.windows import FRAMES, HOP, Plan, make_plan, merge_windows
from keysync_jax.typing import Array

SIDE, LATENT_SIDE, AUDIO_DIM = 512, 64, 768
"""What the release's pipeline fixes: pixels of the crop, cells of the latents, width of an audio vector."""


@dataclass(frozen=True)
class ClipSource:
    """A clip to compare on.

    Attributes:
      landmarks: a `.npy` file, or a detector's name.
      frames: most that are taken; as many whole windows as fit are compared.
    """

    video: Path
    voice: Path
    landmarks: str = "mediapipe"
    landmark_model: Path | None = None
    frames: int = 2 * HOP + 1


def clip_inputs(model: Model, source: ClipSource) -> dict[str, np.ndarray]:
    """Everything that both pipelines are given, `clip/in/NAME` -> array in torch's layout.

    Raises:
      UserError: the model's sizes are not those that the release's pipeline fixes, or the clip is too short.
    """
    config = model.config
    sizes = (config.keyframe.latent_size, config.crop_size, config.keyframe.audio_dim, config.keyframe.frames)
    if sizes != (LATENT_SIDE, SIDE, AUDIO_DIM, FRAMES) or config.interpolation.audio_dim != AUDIO_DIM:
        raise UserError(
            f"the release's pipeline takes {SIDE} pixels, {LATENT_SIDE} cells of latents, "
            f"audio vectors of {AUDIO_DIM} and {FRAMES} frames a call; this model is of other sizes"
        )
    wave = read_audio(source.voice)
    timeline = scan_timeline(source.video)
    count = min(source.frames, len(timeline), frames_of(len(wave)))
    if count < FRAMES:
        raise UserError(f"{count} frames are too few to compare; a window has {FRAMES}")
    count = (count - 1) // HOP * HOP + 1
    landmarks, crops = _face(source, count)
    latents = np.concatenate(list(encode_frames(model.load("vae"), crops)))
    encoders = {
        "keyframe": config.keyframe.audio_encoder,
        "interpolation": config.interpolation.audio_encoder,
    }
    features = {
        f"audio_{stage}": audio_features(config.encoders[kind], model.load_encoder(kind), wave, count)
        for stage, kind in encoders.items()
    }
    given = {"latents": np.moveaxis(latents, -1, 1), "landmarks": landmarks, **features, **clip_noise(count)}
    return {f"clip/in/{name}": np.ascontiguousarray(x, np.float32) for name, x in given.items()}


def _face(source: ClipSource, count: int) -> tuple[np.ndarray, Iterator[np.ndarray]]:
    """Landmarks in the crops, whole pixels `[count, 68, 2]`, and the crops."""
    info = probe_video(source.video)
    if source.landmarks in DETECTORS:
        detector = make_detector(source.landmarks, source.landmark_model)
        try:
            found = detect_all(islice(read_frames(source.video), count), detector, lambda n: None)
        finally:
            detector.close()
    else:
        timeline = scan_timeline(source.video)
        found = load_landmarks(Path(source.landmarks), len(timeline), timeline)[:count]
    landmarks, present = bridge(found)
    if not present.all():
        raise UserError(f"{source.video}: the release's pipeline needs a face in every frame")
    boxes = crop_track(landmarks, present, info.height, info.width)
    inside = np.trunc(landmarks_in_crop(landmarks, boxes, SIDE))
    frames = islice(read_frames(source.video), count)
    return inside, (crop_frame(frame, box, SIDE) for frame, box in zip(frames, boxes, strict=False))


def clip_noise(count: int) -> dict[str, np.ndarray]:
    """Noise of every keyframe call, and of every window, of a clip of so many frames."""
    plan = make_plan(count)
    shape = (FRAMES, 4, LATENT_SIDE, LATENT_SIDE)
    return {
        "noise_keyframes": rules.array("live/clip/keyframes", (len(plan.keyframe_calls), *shape)),
        "noise_windows": rules.array("live/clip/windows", (len(plan.windows), *shape)),
    }


@dataclass(frozen=True)
class _GivenNoise(Sampling):
    """Sampling with given noise, `[calls, T, s, s, 4]` of each stage."""

    given: Mapping[int, np.ndarray] | None = None

    def noise(self, stream: int, call: int, shape: tuple[int, ...]) -> Any:
        assert self.given is not None
        return self.given[stream][call]


class ClipRun:
    """Our pipeline on the clip of a golden file: `run(entry)` with the entries below `clip`."""

    def __init__(self, golden: Golden, dtypes: Mapping[str, str]):
        self.golden, self.dtypes = golden, dtypes

    def __call__(self, entry: str) -> Array:
        made = {
            "out/masks": lambda: self._clip.masks[:, None],
            "out/keyframes": lambda: np.moveaxis(self._keyframes, -1, 1),
            "out/windows": lambda: np.moveaxis(np.concatenate(self._windows), -1, 1),
            "out/frames": lambda: np.moveaxis(self._frames, -1, 1),
        }
        return made[entry]()

    def _given(self, name: str) -> np.ndarray:
        return np.asarray(self.golden.stored[f"clip/in/{name}"])

    @cached_property
    def _plan(self) -> Plan:
        return make_plan(len(self._given("latents")))

    @cached_property
    def _clip(self) -> Clip:
        latents = np.moveaxis(self._given("latents"), 1, -1)
        masks = to_latent(make_mask(self._given("landmarks")), LATENT_SIDE)
        return Clip(latents, masks, np.arange(len(latents)))

    @cached_property
    def _sampling(self) -> _GivenNoise:
        names = {KEYFRAME_STREAM: "noise_keyframes", INTERPOLATION_STREAM: "noise_windows"}
        given = {stream: np.moveaxis(self._given(name), 2, -1) for stream, name in names.items()}
        return _GivenNoise(Separated(), align_your_steps(), given=given)

    def _stage(self, kind: StageKind) -> tuple[Network, Features]:
        stage = StageNetwork(self.golden, kind, self.dtypes[kind], inputs=False)
        return Network(stage.graphdef, stage.params), Features("hubert", self._given(f"audio_{kind}"))

    @cached_property
    def _keyframes(self) -> np.ndarray:
        network, features = self._stage("keyframe")
        return np.concatenate(list(keyframes(network, self._clip, self._plan, features, self._sampling)))

    @cached_property
    def _windows(self) -> list[np.ndarray]:
        network, features = self._stage("interpolation")
        inputs = (network, self._clip, self._plan, features, self._keyframes, self._sampling)
        return list(interpolation(*inputs))

    @cached_property
    def _frames(self) -> np.ndarray:
        vae = VAENetwork(self.golden, self.dtypes["vae"])
        network = Network(vae.graphdef, vae.params)
        return np.stack(list(merge_windows(decode_latents(network, w) for w in self._windows))) / 255
