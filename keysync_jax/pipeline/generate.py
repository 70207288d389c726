"""The two stages over a whole clip: keyframes first, then the frames between them."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.stages import Lowered

from keysync_jax.config import EncoderKind, StageConfig
from keysync_jax.diffusion.guidance import AnyGuidance
from keysync_jax.errors import UserError
from keysync_jax.model import Network
from keysync_jax.pipeline.devices import ONE_DEVICE, Devices
from keysync_jax.pipeline.flow import Clock, results
from keysync_jax.pipeline.sampling import (
    Windows,
    sample_windows,
    sample_windows_by_branch,
    sample_windows_in_turn,
)
from keysync_jax.pipeline.windows import Plan
from keysync_jax.typing import Array

KEYFRAME_STREAM, INTERPOLATION_STREAM = 0, 1


@dataclass(frozen=True)
class Features:
    """Audio features of a clip and the encoder that made them.

    Attributes:
      vectors: `[frames, 2, audio_dim]` fp32.
    """

    encoder: EncoderKind
    vectors: np.ndarray


@dataclass(frozen=True)
class Clip:
    """What both stages take from the source.

    Attributes:
      latents: scaled `[N, s, s, 4]` fp32 of the source's frames.
      masks: `[N, s, s]` uint8, 1 = generate.
      source: frame of the source that each of the plan's frames shows.
      identity: what shows who it is: a frame of the source, by default the first that has a face; a scaled
        latent `[s, s, 4]` of another picture; None: every frame is its own.
    """

    latents: np.ndarray
    masks: np.ndarray
    source: np.ndarray
    identity: int | np.ndarray | None = 0

    def window(self, frames: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Latents `[T, s, s, 4]` and masks `[T, s, s, 1]` of the plan's frames."""
        shown = self.source[frames]
        return self.latents[shown], self.masks[shown][..., None].astype(np.float32)

    def reference(self, frames: list[int]) -> np.ndarray:
        """What shows who it is: scaled latents `[1, s, s, 4]`, or one for each frame, `[T, s, s, 4]`."""
        if self.identity is None:
            return self.latents[self.source[frames]]
        identity = self.identity if isinstance(self.identity, np.ndarray) else self.latents[self.identity]
        return identity[None]


@dataclass(frozen=True)
class Sampling:
    """How to sample.

    Attributes:
      sigmas: noise levels `[steps + 1]`, the last 0.
      seed: of all noise.
      windows_per_call: windows of a network call that each device takes, at most; the last call is filled up.
      scale_factor: stored latents are raw ones times this.
      devices: that share a call's windows, or the branches of each where there are few.
      in_turn: a window's branches one after another, in the memory of one.
    """

    guidance: AnyGuidance
    sigmas: np.ndarray
    seed: int = 0
    windows_per_call: int = 1
    scale_factor: float = 0.18215
    devices: Devices = ONE_DEVICE
    in_turn: bool = False

    def calls(self, windows: int) -> "Calls":
        """How a stage of so many windows is done."""
        devices = self.devices.for_windows(windows, len(self.guidance.branches))
        # No larger than the stage needs; a power of two, so that lengths of clips have few programs.
        needed = 2 ** math.ceil(math.log2(max(-(-windows // len(devices)), 1)))
        size = min(self.windows_per_call, needed) * len(devices)
        if devices.share_branches:
            return Calls(sample_windows_by_branch, devices, size)
        return Calls(sample_windows_in_turn if self.in_turn else sample_windows, devices, size)

    def noise(self, stream: int, call: int, shape: tuple[int, ...]) -> jax.Array:
        """The noise of one window: it depends on the seed, the stage and the window's number alone."""
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(self.seed), stream), call)
        return jax.random.normal(key, shape)


class Calls(NamedTuple):
    """The network calls of a stage.

    Attributes:
      function: one of `sampling`'s, which take the same arguments.
      devices: that it runs on.
      size: windows of a call.
    """

    function: Callable[..., jax.Array]
    devices: Devices
    size: int

    def given(self, sampling: Sampling) -> tuple[AnyGuidance, Array]:
        """What every call takes beside its windows, on the devices."""
        return self.devices.copy((sampling.guidance, np.asarray(sampling.sigmas, np.float32)))


def lowered(
    config: StageConfig, network: Network, sampling: Sampling, windows: int, references: int
) -> Lowered:
    """The program that a stage of so many windows runs, before there are any (`Devices.lowered`).

    Args:
      network: with shapes for parameters.
      references: reference latents of a window.
    """
    calls = sampling.calls(windows)
    side, channels = config.latent_size, config.unet.out_channels

    def rows(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((calls.size, *shape), np.float32)

    latents = rows(config.frames, side, side, channels)
    reference = rows(references, side, side, channels)
    audio, mask = rows(config.frames, 2, config.audio_dim), rows(config.frames, side, side, 1)
    shapes = Windows(latents, audio, reference, latents, mask)
    return calls.devices.lowered(calls.function, network, shapes, *calls.given(sampling))


def check_features(config: StageConfig, features: Features, frames: int) -> None:
    """Refuses features of another encoder than the stage was trained on, or too few of them."""
    if features.encoder != config.audio_encoder:
        raise UserError(
            f"the {config.kind} stage was trained on {config.audio_encoder} features, "
            f"it was given {features.encoder} features; sync would be lost"
        )
    if features.vectors.shape != (frames, 2, config.audio_dim):
        raise UserError(
            f"the {config.kind} stage needs audio features of shape {[frames, 2, config.audio_dim]}, "
            f"not {list(features.vectors.shape)}"
        )


def keyframes(
    network: Network,
    clip: Clip,
    plan: Plan,
    features: Features,
    sampling: Sampling,
    first_call: int = 0,
    device: Clock | None = None,
) -> Iterator[np.ndarray]:
    """Latents of the keyframes, call by call.

    Args:
      first_call: calls that an earlier run has done.
      device: is told how long the devices were busy.

    Yields:
      The keyframes of each call that has any, `[n, s, s, 4]` scaled, anchors and padding dropped.
    """

    def inputs(call: int) -> Windows:
        return keyframe_inputs(clip, plan, features, sampling, call)

    calls = sum(bool(call.kept) for call in plan.keyframe_calls)
    for call, latents in _sampled(network, inputs, first_call, calls, sampling, device):
        yield latents[plan.keyframe_calls[call].kept]


def keyframe_inputs(clip: Clip, plan: Plan, features: Features, sampling: Sampling, call: int) -> Windows:
    """What a call of the keyframe stage takes, without the axis of a batch."""
    frames = list(plan.keyframe_calls[call].source)
    latents, masks = clip.window(frames)
    noise = sampling.noise(KEYFRAME_STREAM, call, latents.shape)
    identity = clip.reference(frames) / np.float32(sampling.scale_factor)
    return Windows(noise, features.vectors[frames], identity, latents, masks)


def interpolation(
    network: Network,
    clip: Clip,
    plan: Plan,
    features: Features,
    keyframe_latents: np.ndarray,
    sampling: Sampling,
    first_window: int = 0,
    device: Clock | None = None,
) -> Iterator[np.ndarray]:
    """Latents of all frames, window by window.

    Args:
      keyframe_latents: scaled `[K, s, s, 4]`.
      first_window: windows that an earlier run has done.
      device: is told how long the devices were busy.

    Yields:
      `[T, s, s, 4]` scaled of each window in order; its ends are the keyframes themselves.
    """

    def inputs(window: int) -> Windows:
        return interpolation_inputs(clip, plan, features, keyframe_latents, sampling, window)

    for window, latents in _sampled(network, inputs, first_window, len(plan.windows), sampling, device):
        yield np.concatenate(
            [keyframe_latents[window][None], latents[1:-1], keyframe_latents[window + 1][None]]
        )


def interpolation_inputs(
    clip: Clip,
    plan: Plan,
    features: Features,
    keyframe_latents: np.ndarray,
    sampling: Sampling,
    window: int,
) -> Windows:
    """What a window of the interpolation stage takes, without the axis of a batch."""
    start, end = plan.windows[window]
    frames = list(range(start, end + 1))
    latents, masks = clip.window(frames)
    ends = keyframe_latents[window : window + 2] / np.float32(sampling.scale_factor)
    noise = sampling.noise(INTERPOLATION_STREAM, window, latents.shape)
    return Windows(noise, features.vectors[frames], ends, latents, masks)


def _sampled(
    network: Network,
    inputs: Callable[[int], Windows],
    first: int,
    count: int,
    sampling: Sampling,
    device: Clock | None,
) -> Iterator[tuple[int, np.ndarray]]:
    """Samples windows `first` to `count` in batches of one shape; yields (window, latents)."""
    plan = sampling.calls(count)
    function, devices, size = plan
    network, given = devices.network(network), plan.given(sampling)
    starts = range(first, count, size)

    def batch(start: int) -> Windows:
        rows = [inputs(n) for n in range(start, min(start + size, count))]
        rows += rows[-1:] * (size - len(rows))
        noise, *others = zip(*rows, strict=True)
        # The noise stays on the device: to read it the host would wait for the call before this one.
        return devices.split(Windows(jnp.stack(noise), *map(np.stack, others)))

    calls = (devices.run(function, network, batch(start), *given) for start in starts)
    for start, latents in zip(starts, results(calls, device), strict=True):
        yield from zip(range(start, min(start + size, count)), latents, strict=False)
