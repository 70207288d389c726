"""Preconditioning of the denoiser D_theta (eq. 1), with the mask of eq. 2 inside it.

V-scaling for sigma_data = 1 with EDM's noise label (Karras et al. 2022, table 1).
"""

from collections.abc import Callable

import jax.numpy as jnp

from keysync_jax.typing import Array


def c_skip(sigma: Array) -> Array:
    return 1 / (sigma**2 + 1)


def c_out(sigma: Array) -> Array:
    return -sigma / jnp.sqrt(sigma**2 + 1)


def c_in(sigma: Array) -> Array:
    return 1 / jnp.sqrt(sigma**2 + 1)


def c_noise(sigma: Array) -> Array:
    return jnp.log(sigma) / 4


def denoise(
    network: Callable[[Array, Array], Array], x: Array, sigma: Array, gt: Array, mask: Array
) -> Array:
    """D_theta(x; sigma): the clean latents, generated where the mask is 1 and `gt` elsewhere.

    Args:
      network: F_theta(c_in x, c_noise), conditions bound; may compute in a lower precision.
      x: noisy latents `[B, T, h, w, C]` fp32.  sigma: `[B]` fp32.
      gt: clean scaled latents like x.  mask: `[B, T, h, w, 1]`, 1 = generate.
    """
    assert x.dtype == sigma.dtype == jnp.float32, "sampler state and sigma are fp32"
    s = sigma[:, None, None, None, None]
    x = mask * x + (1 - mask) * gt
    f = network(c_in(s) * x, c_noise(sigma)).astype(jnp.float32)
    return mask * (c_out(s) * f + c_skip(s) * x) + (1 - mask) * gt
