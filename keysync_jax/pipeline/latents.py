"""Frames to latents and back, in calls of a fixed shape."""

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from keysync_jax.model import Network
from keysync_jax.nn.functional import bind
from keysync_jax.nn.vae import Posterior
from keysync_jax.typing import Array, Frames, Params

FRAMES_PER_CALL = 2
"""Frames that the VAE takes at once: 512 x 512 frames need about 1.5 GiB each while decoding."""


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


def encode_frames(
    vae: Network, frames: Iterable[np.ndarray], per_call: int = FRAMES_PER_CALL
) -> Iterator[np.ndarray]:
    """Scaled latents of a stream of frames, the mean of the posterior.

    The reference draws from the posterior instead; the mean keeps the region outside the mask free of
    that noise, and a dub the same at every run.

    Args:
      frames: uint8 RGB `[S, S, 3]` each.

    Yields:
      `[n, s, s, 4]` fp32 with n <= `per_call`, in order.
    """
    stream = iter(frames)
    while group := list(islice(stream, per_call)):
        full = _filled(np.stack(group), per_call)
        yield np.asarray(_encode(*vae, full))[: len(group)]


def encode_posterior(
    vae: Network, frames: Iterable[np.ndarray], per_call: int = FRAMES_PER_CALL
) -> Iterator[Posterior]:
    """The posterior over raw latents of a stream of frames, for training data.

    Args:
      frames: uint8 RGB `[S, S, 3]` each.

    Yields:
      Mean and log-variance, numpy fp32 `[n, s, s, 4]` each with n <= `per_call`, in order.
    """
    stream = iter(frames)
    while group := list(islice(stream, per_call)):
        full = _posterior(*vae, _filled(np.stack(group), per_call))
        yield Posterior(*(np.asarray(moment)[: len(group)] for moment in full))


def decode_latents(vae: Network, latents: np.ndarray, per_call: int = FRAMES_PER_CALL) -> np.ndarray:
    """Frames of scaled latents, each decoded alone as the reference does.

    Args:
      latents: `[T, s, s, 4]`.

    Returns:
      fp32 `[T, S, S, 3]` in [0, 255], not rounded.
    """
    parts = [latents[i : i + per_call] for i in range(0, len(latents), per_call)]
    return np.concatenate([np.asarray(_decode(*vae, _filled(p, per_call)))[: len(p)] for p in parts])


def _filled(rows: Frames, count: int) -> np.ndarray:
    """Repeats the last row until there are `count`, so that every call has one shape."""
    return np.concatenate([rows, np.repeat(rows[-1:], count - len(rows), axis=0)])
