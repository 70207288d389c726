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
    # The start has the variance of data (1) and noise together.
    x = jnp.asarray(noise, jnp.float32) * jnp.sqrt(1 + sigmas[0] ** 2)

    def step(x: Array, pair: tuple[Array, Array]) -> tuple[Array, None]:
        sigma, sigma_next = pair
        derivative = (x - denoise(x, jnp.full(x.shape[0], sigma))) / sigma
        return x + (sigma_next - sigma) * derivative, None

    return jax.lax.scan(step, x, (sigmas[:-1], sigmas[1:]))[0]
