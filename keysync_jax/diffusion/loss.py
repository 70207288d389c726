"""The training loss of the denoiser (eq. 3 to 6)."""

import jax.numpy as jnp

from keysync_jax.typing import Array


def weight(sigma: Array) -> Array:
    """lambda(sigma) = (sigma^2 + 1) / sigma^2, EDM's weight for sigma_data = 1."""
    return (sigma**2 + 1) / sigma**2


def noised(gt: Array, noise: Array, sigma: Array) -> Array:
    """z^n = z + sigma noise. gt, noise: `[B, T, h, w, C]`; sigma: `[B]`, one a clip."""
    return gt + sigma[:, None, None, None, None] * noise


def latent_loss(denoised: Array, gt: Array, sigma: Array) -> Array:
    """Weighted mean squared error `[B]` of the denoised latents.

    D equals gt outside the mask, so only the generated region counts.

    Args:
      denoised, gt: `[B, T, h, w, C]` fp32.  sigma: `[B]`.
    """
    return weight(sigma) * jnp.mean((denoised - gt) ** 2, axis=(1, 2, 3, 4))
