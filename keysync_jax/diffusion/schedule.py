"""Tables of noise levels for sampling, in float64 numpy, highest first and a last 0."""

import numpy as np

from keysync_jax.errors import UserError

ALIGN_YOUR_STEPS = (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002)
"""Noise levels optimised for SVD (Sabour et al. 2024); called "10 steps", it takes 11."""

STUDENTS: dict[int, tuple[float, ...]] = {
    4: (700.0, 15.886, 4.248, 1.789),
    2: (700.0, 4.248),
    1: (700.0,),
}
"""Steps -> noise levels of a student, all out of the table above."""


def align_your_steps(n: int = 10) -> np.ndarray:
    """The reference's schedule.

    Args:
      n: 10 gives the table itself (11 Euler steps); for a larger n the table is interpolated
        log-linearly to n levels.

    Returns:
      `[12]` for n = 10, else `[n + 1]`, float64; the last is 0.

    Raises:
      UserError: n is under 10.
    """
    if n < 10:
        raise UserError(f"align-your-steps needs at least 10 steps, not {n}")
    sigmas = np.array(ALIGN_YOUR_STEPS)
    if n > 10:
        # Interpolated upwards as the reference does, so that the last digit agrees too.
        rising = np.interp(np.linspace(0, 1, n), np.linspace(0, 1, len(sigmas)), np.log(sigmas[::-1]))
        sigmas = np.exp(rising)[::-1]
    return np.append(sigmas, 0.0)


def edm(n: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> np.ndarray:
    """EDM's schedule (Karras et al. 2022, eq. 5): `[n + 1]` float64 of fp32 precision, the last is 0."""
    ramp = np.linspace(0, 1, n, dtype=np.float32)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    root = np.float32(high) + ramp * np.float32(low - high)
    return np.append((root.astype(np.float64) ** rho).astype(np.float32), 0.0).astype(np.float64)
