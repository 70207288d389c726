"""What is in a video and a voice, what a dub of them does, and what that takes here."""

import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import jax
import jax.numpy as jnp

from keysync_jax.backend import computing
from keysync_jax.bench.measure import flop_of
from keysync_jax.bench.sizes import Size
from keysync_jax.bench.workloads import workloads
from keysync_jax.config import Dtype, SpeechConfig
from keysync_jax.diffusion.guidance import calls
from keysync_jax.doctor.finding import Finding
from keysync_jax.errors import UserError
from keysync_jax.media.audio import RATE, frames_of, probe_audio, read_audio
from keysync_jax.media.detectors import make_detector
from keysync_jax.media.landmarks import MAX_GAP, Detector
from keysync_jax.media.scenes import SceneCuts
from keysync_jax.media.timeline import FPS, Timeline
from keysync_jax.media.video import VideoInfo, open_video, probe_video, read_frames, scan_timeline
from keysync_jax.model import Model
from keysync_jax.pipeline.devices import local_devices
from keysync_jax.pipeline.dub import DubSettings
from keysync_jax.pipeline.sampling import guidance_of, sigmas_of
from keysync_jax.pipeline.windows import make_plan, padded_length

EVERY = 12
"""A face is looked for in one frame in so many: no gap that is not bridged is longer and unseen."""

MOST_TOLD = 5
"""Times that a line names."""

HDR = {16: "PQ", 18: "HLG"}
"""Transfer functions, by their code point."""

SHARE = 0.5
"""Of the rate of a plain matrix product, that the networks are taken to reach."""

assert EVERY <= MAX_GAP


def clip_findings(
    video: Path, voice: Path | None, settings: DubSettings | None = None, show: bool = True
) -> list[Finding]:
    """Reads a video once, and says what a dub would find in it.

    Args:
      voice: that it is to be dubbed with.
      settings: of the dub: its detector, and what a longer voice does.
      show: look for faces too, with the detector, which takes the most time.

    Raises:
      UserError: a file cannot be used, as `dub` says it.
    """
    settings = settings or DubSettings()
    info, timeline = probe_video(video), scan_timeline(video)
    found = [*_picture(info, timeline), *_tracks(video)]
    if voice is not None:
        found += _voice(voice, timeline, settings)
    if not show:
        return [*found, *_scenes(video, timeline, None)]
    try:
        detector = make_detector(settings.landmarks, settings.landmark_model, settings.allow_download)
    except UserError as error:
        return [*found, *_scenes(video, timeline, None), Finding("missing", "face", str(error))]
    with closing(detector):
        return [*found, *_scenes(video, timeline, detector)]


def _picture(info: VideoInfo, timeline: Timeline) -> Iterator[Finding]:
    seconds = len(timeline) / FPS
    yield Finding("ok", "picture", f"{info.width} x {info.height}, {seconds:.2f} s, {len(timeline)} frames "
                  f"at {FPS} a second of {timeline.source_frames} in the file")  # fmt: skip
    if info.fps != FPS:
        yield Finding("note", "rate", f"{float(info.fps):.4g} frames a second on average; the dub has {FPS}")
    if info.rotation or info.mirrored:
        yield Finding("ok", "orientation", "is stored turned or mirrored; the dub stands upright")
    if info.aspect != 1:
        yield Finding("ok", "pixels", f"{float(info.aspect):.3g} times as wide as high, as in the dub")
    if timeline.interlaced:
        yield Finding("note", "interlaced", "fields become whole pictures, one a frame")
    if timeline.jumps:
        yield Finding("note", "timestamps", f"jump {len(timeline.jumps)} times; no such time has passed")
    if info.colour.transfer in HDR:
        yield Finding("note", "HDR", f"{HDR[info.colour.transfer]}: keeps its tags, is written with 8 bits")


def _tracks(video: Path) -> Iterator[Finding]:
    """What the file has besides, and what of it a dub leaves out."""
    with open_video(video) as (container, stream):
        bits = max((part.bits for part in stream.format.components), default=8)
        others = {
            "picture": len(container.streams.video) - 1,
            "sound": len(container.streams.audio),
            "subtitles": len(container.streams.subtitles),
        }
        said = f"{stream.codec_context.codec.long_name}, {stream.format.name}"
    if bits > 8:
        yield Finding("note", "codec", f"{said}; {bits} bits become 8")
    else:
        yield Finding("ok", "codec", said)
    left = ", ".join(f"{kind} {count}" for kind, count in others.items() if count)
    if left:
        yield Finding("note", "tracks", f"not in the dub, whose sound is the voice: {left}")


def _voice(voice: Path, timeline: Timeline, settings: DubSettings) -> Iterator[Finding]:
    sound, samples = probe_audio(voice), len(read_audio(voice))
    frames, channels = frames_of(samples), {1: "mono", 2: "stereo"}.get(sound.channels)
    said = f"{samples / RATE:.2f} s at {sound.rate} Hz, {channels or f'{sound.channels} channels'}"
    yield Finding("ok", "voice", f"{said}: {frames} frames")
    if channels is None:
        yield Finding("note", "channels", "are mixed down to two")
    if frames > len(timeline):
        what = {
            "to-and-fro": "plays to and fro",
            "loop": "begins anew",
            "freeze": "stands still at its last frame",
            "stop": "ends the dub, and the voice is cut",
        }[settings.longer_voice]
        yield Finding("note", "longer voice", f"by {(frames - len(timeline)) / FPS:.2f} s: the video {what}")
    elif frames < len(timeline):
        rest = (len(timeline) - frames) / FPS
        yield Finding("note", "shorter voice", f"the last {rest:.2f} s of the video are not in the dub")


def _scenes(video: Path, timeline: Timeline, detector: Detector | None) -> Iterator[Finding]:
    """Cuts of all frames, faces of some."""
    cuts, seen = SceneCuts(), []
    for number, frame in enumerate(read_frames(video)):
        cuts.update(frame)
        if detector is not None and number % EVERY == 0:
            seen.append(detector.detect(frame) is not None)
    if cuts.frames:
        times = _times(cuts.frames)
        yield Finding("note", "cuts", f"{cuts.count} ({times}): one crop follows the face over them")
    else:
        yield Finding("ok", "cuts", "none")
    if detector is not None:
        yield _faces(seen, len(timeline))


def _faces(seen: Sequence[bool], frames: int) -> Finding:
    """Of one frame in `EVERY`, whether it has a face."""
    if not any(seen):
        return Finding("missing", "face", f"none in {len(seen)} frames that were looked at; give --landmarks")
    if all(seen):
        return Finding("ok", "face", f"in all of {len(seen)} frames that were looked at")
    absent = [EVERY * i for i, face in enumerate(seen) if not face]
    share = len(absent) / len(seen)
    return Finding("note", "face", f"none in {share:.0%} of {len(seen)} frames that were looked at "
                   f"({_times(absent)}); they pass through undubbed")  # fmt: skip


def _times(frames: Sequence[int]) -> str:
    told = ", ".join(f"{frame / FPS:.1f} s" for frame in frames[:MOST_TOLD])
    return told + (f" and {len(frames) - MOST_TOLD} more" if len(frames) > MOST_TOLD else "")


def cost_findings(model: Model, frames: int, settings: DubSettings | None = None) -> list[Finding]:
    """What the networks of a dub take on this machine, by their operations and a short measurement.

    Nothing of the networks runs and no weights are read.

    Args:
      frames: of the dub.

    Raises:
      UserError: the settings do not fit the devices.
    """
    settings = settings or DubSettings()
    devices, dtype = local_devices(settings.devices), settings.compute_dtype
    operations = _operations(model, frames, settings)
    rate = len(devices) * _rate(dtype)
    total = sum(operations.values())
    parts = ", ".join(f"{name} {flop / 1e12:.3g}" for name, flop in operations.items())
    where = f"{dtype}, {len(devices)} x {jax.local_devices()[0].device_kind}"
    lasting = _lasting(total / (SHARE * rate))
    assumed = f"{SHARE:.0%} of the {rate / 1e12:.3g} TFLOP/s that a matrix product reaches here now"
    return [
        Finding("ok", "networks", f"{total / 1e12:.3g} TFLOP ({parts}), {where}"),
        Finding("ok", "time", f"about {lasting} for the networks at {assumed}; compiling comes on top"),
    ]


def _operations(model: Model, frames: int, settings: DubSettings) -> dict[str, float]:
    """Of all calls of each network, windows that are filled up included."""
    config, dtype = model.config, settings.compute_dtype
    plan = make_plan(padded_length(frames))
    windows = {
        "keyframe": sum(bool(call.kept) for call in plan.keyframe_calls),
        "interpolation": len(plan.windows),
    }
    sigmas = sigmas_of(config, settings.steps)
    branches = calls(guidance_of(settings.guidance(config.guidance), sigmas), len(sigmas) - 1)
    speech = [encoder for encoder in config.encoders.values() if isinstance(encoder, SpeechConfig)]
    # Both stages are one network but for a few channels of its first convolution.
    size = Size(config.interpolation, config.vae, speech[0] if speech else SpeechConfig("hubert"))
    (network,) = workloads("unet", size, dtype, 1)
    made = {kind: float(count * branches * flop_of(network)) for kind, count in windows.items()}
    for workload in workloads("vae", size, dtype, 1):
        made[workload.name] = frames * flop_of(workload)
    if speech:
        (audio,) = workloads("audio", size, dtype, 1)
        made["speech"] = frames / audio.frames * flop_of(audio)
    return made


def _rate(dtype: Dtype) -> float:
    """Operations a second of one device in a matrix product, the best of a few tries."""
    side = 1024 if jax.default_backend() == "cpu" else 8192
    x = jnp.ones((side, side), jnp.bfloat16 if dtype == "bf16" else jnp.float32)
    with computing(dtype):
        product = jax.jit(jnp.matmul)
        product(x, x).block_until_ready()
        took = []
        for _ in range(5):
            before = time.perf_counter()
            product(x, x).block_until_ready()
            took.append(time.perf_counter() - before)
    return 2 * side**3 / min(took)


def _lasting(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def frames_of_dub(video: Path, voice: Path | None, settings: DubSettings) -> int:
    """Frames of a dub: the voice's; the video's where there is no voice yet, or where it ends before it."""
    frames = None if voice is None else frames_of(len(read_audio(voice)))
    if frames is not None and settings.longer_voice != "stop":
        return frames
    shown = len(scan_timeline(video))
    return shown if frames is None else min(frames, shown)
