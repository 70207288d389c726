"""Euler sampling of the probability-flow ODE: a `lax.scan` over a table of noise levels."""

from collections.abc import Iterable
from typing import Protocol

import jax
import jax.numpy as jnp

from keysync_jax.typing import Array


class Denoise(Protocol):
    """D_theta with its conditions bound: `[B, ...]` fp32 and `[B]` fp32 -> x0 like x, fp32."""

    def __call__(self, x: Array, sigma: Array) -> Array: ...


def sample(denoise: Denoise, noise: Array, sigmas: Array) -> Array:
    """Draws x0 (Karras et al. 2022, algorithm 1, Euler steps, no churn).

    Args:
      denoise: the guided denoiser.
      noise: `[B, ...]`, standard normal.
      sigmas: `[steps + 1]`, decreasing, the last 0. Their number alone is compiled in.

    Returns:
      `[B, ...]` fp32.
    """
    return sample_in_parts([(denoise, slice(None))], noise, sigmas)


def sample_in_parts(parts: Iterable[tuple[Denoise, slice]], noise: Array, sigmas: Array) -> Array:
    """`sample` with one denoiser after another, a loop each.

    Args:
      parts: denoisers, and the steps of each: stretches of the table, in order, that leave none out.
    """
    sigmas = jnp.asarray(sigmas, jnp.float32)
    x = start(noise, sigmas)
    for denoise, where in parts:

        def step(x: Array, pair: tuple[Array, Array], denoise: Denoise = denoise) -> tuple[Array, None]:
            return _euler(denoise, x, *pair)[0], None

        x, _ = jax.lax.scan(step, x, (sigmas[:-1][where], sigmas[1:][where]))
    return x


def steps(parts: Iterable[tuple[Denoise, slice]], noise: Array, sigmas: Array) -> tuple[Array, Array]:
    """Where each step of `sample_in_parts` arrives, and the clean latents that it went towards.

    Returns:
      Two arrays `[steps, B, ...]` fp32.
    """
    sigmas = jnp.asarray(sigmas, jnp.float32)
    x, found = start(noise, sigmas), []
    for denoise, where in parts:

        def step(
            x: Array, pair: tuple[Array, Array], denoise: Denoise = denoise
        ) -> tuple[Array, tuple[Array, Array]]:
            x, clean = _euler(denoise, x, *pair)
            return x, (x, clean)

        x, each = jax.lax.scan(step, x, (sigmas[:-1][where], sigmas[1:][where]))
        found.append(each)
    arrived, clean = (jnp.concatenate(arrays) for arrays in zip(*found, strict=True))
    return arrived, clean


def start(noise: Array, sigmas: Array) -> Array:
    """Where sampling begins: it has the variance of data (1) and of noise together."""
    return jnp.asarray(noise, jnp.float32) * jnp.sqrt(1 + sigmas[0] ** 2)


def _euler(denoise: Denoise, x: Array, sigma: Array, sigma_next: Array) -> tuple[Array, Array]:
    clean = denoise(x, jnp.full(x.shape[0], sigma))
    derivative = (x - clean) / sigma
    return x + (sigma_next - sigma) * derivative, clean
