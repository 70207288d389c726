"""Frames to latents and back, in calls of a fixed shape."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.stages import Lowered

from keysync_jax.model import Network
from keysync_jax.nn.functional import bind
from keysync_jax.nn.vae import Posterior
from keysync_jax.pipeline.devices import ONE_DEVICE, Devices
from keysync_jax.pipeline.flow import Clock, results
from keysync_jax.typing import Array, Frames, Params

FRAMES_PER_CALL = 2
"""Frames that the VAE takes at once unless it is told otherwise."""


def encoder_program(vae: Network, size: int, per_call: int, devices: Devices) -> Lowered:
    """The program of `encode_frames` for frames of `size` x `size`; the VAE has shapes for parameters."""
    frames = jax.ShapeDtypeStruct((per_call * len(devices), size, size, 3), np.uint8)
    return devices.lowered(_encode, vae, frames)


def decoder_program(vae: Network, latent: tuple[int, int, int], per_call: int, devices: Devices) -> Lowered:
    """The program of `decode_frames` for latents `[s, s, C]`; the VAE has shapes for parameters."""
    latents = jax.ShapeDtypeStruct((per_call * len(devices), *latent), np.float32)
    return devices.lowered(_decode_pixels, vae, latents)


@partial(jax.jit, static_argnames="graphdef")
def _encode(graphdef: nnx.GraphDef, params: Params, frames: Array) -> Array:
    vae = bind(graphdef, params)
    return vae.encode(frames.astype(jnp.float32) / 127.5 - 1).mean * vae.config.scale_factor


@partial(jax.jit, static_argnames="graphdef")
def _posterior(graphdef: nnx.GraphDef, params: Params, frames: Array) -> Posterior:
    return bind(graphdef, params).encode(frames.astype(jnp.float32) / 127.5 - 1)


@partial(jax.jit, static_argnames="graphdef")
def _decode(graphdef: nnx.GraphDef, params: Params, latents: Array) -> Array:
    frames = bind(graphdef, params).decode(latents[:, None])[:, 0]
    return (jnp.clip(frames, -1, 1) + 1) * 127.5


@partial(jax.jit, static_argnames="graphdef")
def _decode_pixels(graphdef: nnx.GraphDef, params: Params, latents: Array) -> Array:
    return jnp.rint(_decode(graphdef, params, latents)).astype(jnp.uint8)


def encode_frames(
    vae: Network,
    frames: Iterable[np.ndarray],
    per_call: int = FRAMES_PER_CALL,
    devices: Devices = ONE_DEVICE,
    device: Clock | None = None,
) -> Iterator[np.ndarray]:
    """Scaled latents of a stream of frames, the mean of the posterior.

    The reference draws from the posterior instead; the mean keeps the region outside the mask free of
    that noise, and a dub the same at every run.

    Args:
      frames: uint8 RGB `[S, S, 3]` each.
      per_call: frames of a call that each device takes.
      device: is told how long the devices were busy.

    Yields:
      `[n, s, s, 4]` fp32 of each call, in order; the next call is under way.
    """
    return _mapped(_encode, vae, frames, per_call, devices, device)


def encode_posterior(
    vae: Network,
    frames: Iterable[np.ndarray],
    per_call: int = FRAMES_PER_CALL,
    devices: Devices = ONE_DEVICE,
    device: Clock | None = None,
) -> Iterator[Posterior]:
    """The posterior over raw latents of a stream of frames, for training data.

    Args:
      frames: uint8 RGB `[S, S, 3]` each.
      per_call: frames of a call that each device takes.
      device: is told how long the devices were busy.

    Yields:
      Mean and log-variance, numpy fp32 `[n, s, s, 4]` of each call, in order; the next call is under way.
    """
    return _mapped(_posterior, vae, frames, per_call, devices, device)


def decode_frames(
    vae: Network,
    latents: Iterable[np.ndarray],
    per_call: int = FRAMES_PER_CALL,
    devices: Devices = ONE_DEVICE,
    device: Clock | None = None,
) -> Iterator[Frames]:
    """Pixels of a stream of scaled latents, each decoded alone as the reference does, rounded on the device.

    Args:
      latents: `[s, s, 4]` each.
      per_call: frames of a call that each device takes.
      device: is told how long the devices were busy.

    Yields:
      uint8 RGB `[n, S, S, 3]` of each call, in order; the next call is under way.
    """
    return _mapped(_decode_pixels, vae, latents, per_call, devices, device)


def decode_latents(vae: Network, latents: np.ndarray, per_call: int = FRAMES_PER_CALL) -> np.ndarray:
    """Frames of scaled latents, each decoded alone as the reference does.

    Args:
      latents: `[T, s, s, 4]`.

    Returns:
      fp32 `[T, S, S, 3]` in [0, 255], not rounded.
    """
    parts = [latents[i : i + per_call] for i in range(0, len(latents), per_call)]
    return np.concatenate([np.asarray(_decode(*vae, _filled(p, per_call)))[: len(p)] for p in parts])


def _mapped(
    function: Callable[..., Any],
    vae: Network,
    rows: Iterable[np.ndarray],
    per_call: int,
    devices: Devices,
    device: Clock | None,
) -> Iterator[Any]:
    """`function(graphdef, params, rows)` over a stream of rows, call by call: arrays, or trees of them."""
    stream, size = iter(rows), per_call * len(devices)
    vae = devices.network(vae)
    counts: deque[int] = deque()

    def calls() -> Iterator[Any]:
        while group := list(islice(stream, size)):
            counts.append(len(group))
            yield devices.run(function, vae, devices.split(_filled(np.stack(group), size)))

    for made in results(calls(), device):
        whole = slice(counts.popleft())
        yield jax.tree.map(itemgetter(whole), made)


def _filled(rows: Frames, count: int) -> np.ndarray:
    """Repeats the last row until there are `count`, so that every call has one shape."""
    return np.concatenate([rows, np.repeat(rows[-1:], count - len(rows), axis=0)])
