"""Preconditioning, schedules, guidance, the sampler and the loss against tables and closed forms."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from keysync_jax.diffusion import guidance, loss, precond, schedule
from keysync_jax.diffusion.sampler import Denoise, sample, sample_in_parts, steps
from keysync_jax.errors import UserError
from keysync_jax.tensorfile import TensorFile


def test_preconditioning_has_the_signs_and_values_of_v_scaling() -> None:
    sigma = jnp.float32(2.0)
    assert precond.c_skip(sigma) == pytest.approx(1 / 5)
    assert precond.c_out(sigma) == pytest.approx(-2 / 5**0.5)
    assert precond.c_in(sigma) == pytest.approx(1 / 5**0.5)
    assert precond.c_noise(sigma) == pytest.approx(np.log(2) / 4)


def test_denoiser_blends_before_and_after_the_network() -> None:
    rng = np.random.default_rng(0)
    x, gt = (rng.standard_normal((2, 3, 4, 4, 4)).astype(np.float32) for _ in range(2))
    mask = rng.integers(0, 2, (2, 3, 4, 4, 1)).astype(np.float32)
    sigma = np.array([0.5, 7.0], np.float32)
    seen = {}

    def network(y: jax.Array, c: jax.Array) -> jax.Array:
        seen["x"], seen["c"] = y, c
        return jnp.ones_like(y)

    out = precond.denoise(network, jnp.asarray(x), jnp.asarray(sigma), gt, mask)
    s = sigma[:, None, None, None, None]
    blended = np.where(mask == 1, x, gt)
    np.testing.assert_allclose(seen["x"], blended / np.sqrt(s**2 + 1), rtol=1e-6)
    np.testing.assert_allclose(seen["c"], np.log(sigma) / 4, rtol=1e-6)
    inside = blended / (s**2 + 1) - s / np.sqrt(s**2 + 1)
    np.testing.assert_allclose(out, np.where(mask == 1, inside, gt), rtol=1e-5, atol=1e-6)


def test_denoiser_refuses_half_precision_state() -> None:
    x = jnp.zeros((1, 1, 2, 2, 4), jnp.bfloat16)
    with pytest.raises(AssertionError, match="fp32"):
        precond.denoise(lambda y, c: y, x, jnp.ones(1), x, jnp.ones((1, 1, 2, 2, 1)))


@pytest.mark.parametrize("n", [10, 15, 25, 50])
def test_align_your_steps_equals_the_reference(golden: Path, n: int) -> None:
    table = TensorFile(golden / "dev.pipeline.safetensors")
    np.testing.assert_array_equal(schedule.align_your_steps(n), table[f"ays_sigmas_{n}"])


def test_edm_schedule_equals_the_reference(golden: Path) -> None:
    table = TensorFile(golden / "dev.pipeline.safetensors")
    np.testing.assert_array_equal(schedule.edm(18), table["edm_sigmas_18"])


def test_align_your_steps_needs_ten() -> None:
    with pytest.raises(UserError, match="at least 10 steps, not 9"):
        schedule.align_your_steps(9)


def test_separated_guidance_is_equation_9() -> None:
    z0, z_id, z_both = np.random.default_rng(0).standard_normal((3, 2, 5)).astype(np.float32)
    g = guidance.Separated(audio=5.0, identity=2.0)
    wanted = z0 + 2 * (z_id - z0) + 5 * (z_both - z_id)
    np.testing.assert_allclose(guidance.combine(g, np.concatenate([z0, z_id, z_both])), wanted, rtol=1e-5)


def test_branches_drop_what_they_say() -> None:
    x = np.ones((2, 3), np.float32)
    g = guidance.Separated()
    np.testing.assert_array_equal(guidance.keep(g, "audio", x), np.repeat([0, 0, 1], 2)[:, None] * np.ones(3))
    np.testing.assert_array_equal(
        guidance.keep(g, "reference", x), np.repeat([0, 1, 1], 2)[:, None] * np.ones(3)
    )
    plain = guidance.ClassifierFree()
    np.testing.assert_array_equal(guidance.keep(plain, "audio", x)[:, 0], [0, 0, 1, 1])
    np.testing.assert_array_equal(guidance.keep(guidance.Unguided(), "audio", x), x)


def test_scales_of_a_guidance_are_arguments_of_jit() -> None:
    traces = []

    @jax.jit
    def combined(g: guidance.Guidance, x: jax.Array) -> jax.Array:
        traces.append(1)
        return guidance.combine(g, x)

    x = jnp.arange(3.0)
    assert combined(guidance.Separated(5.0, 2.0), x) == pytest.approx(2 + 5)
    assert combined(guidance.Separated(1.0, 1.0), x) == pytest.approx(2)
    assert len(traces) == 1


def test_euler_converges_to_the_exact_solution_with_first_order() -> None:
    """For data N(0, 1), D(x, s) = x / (1 + s^2) and the ODE maps x(s0) to x(s0) / sqrt(1 + s0^2)."""
    noise = jnp.array([[0.7], [-1.3]])

    def denoise(x: jax.Array, sigma: jax.Array) -> jax.Array:
        return x / (1 + sigma[:, None] ** 2)

    errors = []
    for n in (200, 400):
        out = sample(denoise, noise, schedule.edm(n, sigma_min=1e-3))
        errors.append(float(jnp.abs(out - noise).max()))
    assert errors[1] < 2e-2
    assert 1.7 < errors[0] / errors[1] < 2.3


@pytest.mark.parametrize(
    ("scales", "branches"),
    [((5.0, 2.0), 3), ((5.0, 1.0), 2), ((1.0, 2.0), 3), ((2.0, 2.0), 2), ((1.0, 1.0), 1), ((0.0, 2.0), 3)],
)
def test_branches_of_weight_zero_are_left_out_and_the_sum_is_equation_9(
    scales: tuple[float, float], branches: int
) -> None:
    numbers = np.random.default_rng(0).standard_normal((3, 2, 5))
    z = dict(zip(guidance.Separated.branches, numbers, strict=True))
    whole = guidance.Separated(*scales)
    less = guidance.without_zeros(whole)
    assert len(less.branches) == branches
    wanted = guidance.combine(whole, jnp.concatenate([z[b] for b in whole.branches]))
    found = guidance.combine(less, jnp.concatenate([z[b] for b in less.branches]))
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_a_table_is_sampled_in_parts_as_in_one_loop() -> None:
    sigmas, noise = schedule.align_your_steps(), jnp.array([[0.7], [-1.3]])

    def scaled(by: float) -> Denoise:
        return lambda x, sigma: by * x / (1 + sigma[:, None] ** 2)

    @jax.jit
    def in_one(noise: jax.Array) -> jax.Array:
        def denoise(x: jax.Array, sigma: jax.Array) -> jax.Array:
            within = (sigma >= 1.5) & (sigma <= 8)
            return jnp.where(within, 0.9, 1.0)[:, None] * scaled(1)(x, sigma)

        return sample(denoise, noise, sigmas)

    @jax.jit
    def in_three(noise: jax.Array) -> jax.Array:
        parts = [(scaled(1), slice(0, 3)), (scaled(0.9), slice(3, 6)), (scaled(1), slice(6, 11))]
        return sample_in_parts(parts, noise, sigmas)

    np.testing.assert_allclose(in_three(noise), in_one(noise), rtol=1e-6)
    arrived, clean = steps([(scaled(1), slice(0, 4)), (scaled(1), slice(4, 11))], noise, sigmas)
    assert arrived.shape == clean.shape == (11, 2, 1)
    np.testing.assert_allclose(arrived[-1], sample(scaled(1), noise, sigmas), rtol=1e-6)
    np.testing.assert_allclose(arrived[-1], clean[-1], rtol=1e-4)


def test_loss_weights_and_noise() -> None:
    sigma = jnp.array([0.5, 2.0])
    np.testing.assert_allclose(loss.weight(sigma), [(0.25 + 1) / 0.25, 5 / 4], rtol=1e-6)
    gt = jnp.zeros((2, 1, 2, 2, 4))
    noisy = loss.noised(gt, jnp.ones_like(gt), sigma)
    np.testing.assert_allclose(noisy[:, 0, 0, 0, 0], sigma)
    np.testing.assert_allclose(loss.latent_loss(noisy, gt, sigma), loss.weight(sigma) * sigma**2, rtol=1e-6)
