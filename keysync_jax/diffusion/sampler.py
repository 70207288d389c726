"""Euler sampling of the probability-flow ODE: one `lax.scan` over a table of noise levels."""

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
    sigmas = jnp.asarray(sigmas, jnp.float32)

    def step(x: Array, pair: tuple[Array, Array]) -> tuple[Array, None]:
        return _euler(denoise, x, *pair)[0], None

    return jax.lax.scan(step, _start(noise, sigmas), (sigmas[:-1], sigmas[1:]))[0]


def steps(denoise: Denoise, noise: Array, sigmas: Array) -> tuple[Array, Array]:
    """Where each step of `sample` arrives, and the clean latents it went towards, `[steps, B, ...]` fp32."""
    sigmas = jnp.asarray(sigmas, jnp.float32)

    def step(x: Array, pair: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        x, clean = _euler(denoise, x, *pair)
        return x, (x, clean)

    return jax.lax.scan(step, _start(noise, sigmas), (sigmas[:-1], sigmas[1:]))[1]


def _start(noise: Array, sigmas: Array) -> Array:
    # The start has the variance of data (1) and noise together.
    return jnp.asarray(noise, jnp.float32) * jnp.sqrt(1 + sigmas[0] ** 2)


def _euler(denoise: Denoise, x: Array, sigma: Array, sigma_next: Array) -> tuple[Array, Array]:
    clean = denoise(x, jnp.full(x.shape[0], sigma))
    derivative = (x - clean) / sigma
    return x + (sigma_next - sigma) * derivative, clean
