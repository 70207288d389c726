"""The training loss of the denoiser (eq. 3 to 6), and the noise levels that it is taken at."""

from typing import Literal

import jax
import jax.numpy as jnp

from keysync_jax.typing import Array


def draw_sigma(key: Array, count: int, p_mean: float, p_std: float) -> Array:
    """`[count]` fp32 noise levels, ln sigma ~ N(p_mean, p_std^2) (Karras et al. 2022, table 1)."""
    return jnp.exp(p_mean + p_std * jax.random.normal(key, (count,)))


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


def pixel_loss(decoded: Array, frame: Array, sigma: Array, kind: Literal["l2", "l1"] = "l2") -> Array:
    """Weighted mean squared (l2) or absolute (l1) error `[B]` of one decoded frame of each clip.

    Args:
      decoded: `[B, H, W, 3]` fp32; is clipped to [-1, 1], beyond which it has no gradient.
      frame: the true frames in [-1, 1], like decoded.
      sigma: `[B]`.
    """
    error = jnp.clip(decoded, -1, 1) - frame
    return weight(sigma) * jnp.mean(error**2 if kind == "l2" else jnp.abs(error), axis=(1, 2, 3))


def total(latent: Array, pixel: Array, pixel_weight: float) -> Array:
    """The loss of a batch (eq. 6): means of both `[B]` parts, the pixel loss times lambda_2."""
    return latent.mean() + pixel_weight * pixel.mean()
