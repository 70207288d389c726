"""The fused denoising loop of a stage: all steps and guidance branches of a batch of windows, one jit."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from keysync_jax.config import GuidanceConfig, Interval, ModelConfig
from keysync_jax.diffusion import precond
from keysync_jax.diffusion.guidance import (
    AnyGuidance,
    ClassifierFree,
    Guidance,
    Separated,
    Unguided,
    combine,
    heard,
    joined,
    keep,
    repeat,
    stretches,
    without_zeros,
)
from keysync_jax.diffusion.sampler import Denoise, sample_in_parts, start, steps
from keysync_jax.diffusion.schedule import align_your_steps
from keysync_jax.errors import UserError
from keysync_jax.nn.functional import bind
from keysync_jax.pipeline.devices import BRANCHES
from keysync_jax.typing import Array, Params


def guidance_of(config: GuidanceConfig, sigmas: np.ndarray) -> AnyGuidance:
    """The guidance that a config names, along a table of noise levels `[steps + 1]` of which the last is 0.

    At a level outside its interval a scale is 1; branches of weight 0 are left out.
    """
    return joined([without_zeros(_guidance_at(config, float(sigma))) for sigma in sigmas[:-1]])


def _guidance_at(config: GuidanceConfig, sigma: float) -> Guidance:
    def scale(value: float, interval: Interval | None) -> float:
        # The table's numbers, as they are written: 7.977 lies within an interval that ends there.
        return value if interval is None or interval[0] <= sigma <= interval[1] else 1.0

    if config.kind == "separated":
        audio = scale(config.audio, config.audio_interval)
        return Separated(audio, scale(config.identity, config.identity_interval))
    if config.kind == "cfg":
        return ClassifierFree(scale(config.scale, config.scale_interval))
    return Unguided()


def sigmas_of(config: ModelConfig, steps: int | None = None) -> np.ndarray:
    """The noise levels that a model is sampled at, `[steps + 1]` float64, the last 0.

    Args:
      steps: of the align-your-steps schedule; the model's own where None.

    Raises:
      UserError: steps are given for a model that was trained for levels of its own.
    """
    if not config.sigmas:
        return align_your_steps(config.steps if steps is None else steps)
    if steps is not None:
        raise UserError(
            f"this model was distilled for {len(config.sigmas)} steps at noise levels of its own; leave the "
            "number of steps out"
        )
    return np.append(np.array(config.sigmas), 0.0)


class Windows(NamedTuple):
    """Inputs of a batch of windows (network calls), either stage's.

    Attributes:
      noise: `[B, T, h, w, 4]` fp32, standard normal.
      audio: features `[B, T, 2, audio_dim]`.
      reference: raw latents `[B, reference_frames, h, w, 4]`.
      gt: clean scaled latents `[B, T, h, w, 4]`, kept where the mask is 0.
      mask: `[B, T, h, w, 1]`, 1 = generate.
    """

    noise: Array
    audio: Array
    reference: Array
    gt: Array
    mask: Array


@partial(jax.jit, static_argnames="graphdef")
def sample_windows(
    graphdef: nnx.GraphDef, params: Params, windows: Windows, guidance: AnyGuidance, sigmas: Array
) -> Array:
    """Samples the latents of a batch of windows.

    Keys and values of the cross-attention are computed once a window, before the loop, and used in the
    branches that have audio; in the others it adds a constant.

    Args:
      graphdef, params: a `nn.stages.Stage`.
      sigmas: `[steps + 1]` fp32, the last 0; a new number of steps compiles anew.

    Returns:
      Scaled latents `[B, T, h, w, 4]` fp32; equal to `gt` where the mask is 0.
    """
    parts = _parts(guidance, sigmas, lambda part: _guided(graphdef, params, windows, part))
    return sample_in_parts(parts, windows.noise, sigmas)


@partial(jax.jit, static_argnames="graphdef")
def sample_windows_in_turn(
    graphdef: nnx.GraphDef, params: Params, windows: Windows, guidance: AnyGuidance, sigmas: Array
) -> Array:
    """`sample_windows`, the branches one after another in the memory of one; equal up to rounding."""

    def denoiser(part: Guidance) -> Denoise:
        return _summed(graphdef, params, windows, part, jnp.arange(len(part.branches)))

    return sample_in_parts(_parts(guidance, sigmas, denoiser), windows.noise, sigmas)


@partial(jax.jit, static_argnames="graphdef")
def sample_windows_by_branch(
    graphdef: nnx.GraphDef, params: Params, windows: Windows, guidance: AnyGuidance, sigmas: Array
) -> Array:
    """`sample_windows` in a `jax.shard_map`, branches shared by the devices along `BRANCHES`.

    Each device has the same windows, and they add up what their branches made at every step. Equal to
    `sample_windows` up to rounding.
    """

    def denoiser(part: Guidance) -> Denoise:
        share = -(-len(part.branches) // jax.lax.axis_size(BRANCHES))
        own = jax.lax.axis_index(BRANCHES) * share + jnp.arange(share)
        mine = _summed(graphdef, params, windows, part, own)

        def denoise(x: Array, sigma: Array) -> Array:
            return jax.lax.psum(mine(x, sigma), BRANCHES)

        return denoise

    return sample_in_parts(_parts(guidance, sigmas, denoiser), windows.noise, sigmas)


@partial(jax.jit, static_argnames="graphdef")
def sample_steps(
    graphdef: nnx.GraphDef, params: Params, windows: Windows, guidance: AnyGuidance, sigmas: Array
) -> tuple[Array, Array]:
    """Every step of `sample_windows`: where it arrives, and the clean latents it went towards.

    Returns:
      Two arrays `[steps, B, T, h, w, 4]` fp32, scaled.
    """
    parts = _parts(guidance, sigmas, lambda part: _guided(graphdef, params, windows, part))
    return steps(parts, windows.noise, sigmas)


@partial(jax.jit, static_argnames="graphdef")
def sample_states(
    graphdef: nnx.GraphDef,
    params: Params,
    windows: Windows,
    guidance: AnyGuidance,
    sigmas: Array,
    kept: Array,
) -> Array:
    """Some states of `sample_windows` on its way, and its end.

    Args:
      kept: numbers `[K]` of the steps before which the states are kept.

    Returns:
      `[B, K + 1, T, h, w, 4]` fp16: the states, each over sqrt(1 + sigma^2), then the scaled latents.
    """
    parts = _parts(guidance, sigmas, lambda part: _guided(graphdef, params, windows, part))
    arrived, _ = steps(parts, windows.noise, sigmas)
    before = jnp.concatenate([start(windows.noise, sigmas)[None], arrived[:-1]])[kept]
    scale = precond.c_in(sigmas[kept])[:, None, None, None, None, None]
    rows = jnp.concatenate([before * scale, arrived[-1:]]).astype(jnp.float16)
    return jnp.moveaxis(rows, 0, 1)


def _parts(
    guidance: AnyGuidance, sigmas: Array, denoiser: Callable[[Guidance], Denoise]
) -> Iterator[tuple[Denoise, slice]]:
    """The denoiser of each stretch of a guidance, and its steps."""
    for part, where in stretches(guidance, len(sigmas) - 1):
        yield denoiser(part), where


def _guided(graphdef: nnx.GraphDef, params: Params, windows: Windows, guidance: Guidance) -> Denoise:
    """The guided denoiser of a batch of windows."""
    stage = bind(graphdef, params)
    projected = stage.project_audio(windows.audio)
    audio = keep(guidance, "audio", projected)
    reference = keep(guidance, "reference", windows.reference)
    key_value = stage.key_value(heard(guidance, projected))
    gt, mask = repeat(guidance, windows.gt), repeat(guidance, windows.mask)

    def network(x: Array, c_noise: Array) -> Array:
        return stage(x, c_noise, audio, reference, key_value)

    def denoise(x: Array, sigma: Array) -> Array:
        branches = precond.denoise(network, repeat(guidance, x), repeat(guidance, sigma), gt, mask)
        return combine(guidance, branches)

    return denoise


def _summed(
    graphdef: nnx.GraphDef, params: Params, windows: Windows, guidance: Guidance, branches: Array
) -> Denoise:
    """The weighted sum of some branches of the guided denoiser, one after another by one program.

    Args:
      branches: their numbers `[n]`; one past the last branch adds nothing.
    """
    stage = bind(graphdef, params)
    projected = stage.project_audio(windows.audio)
    key_value = stage.key_value(projected)
    weights = jnp.stack([jnp.asarray(w, jnp.float32) for w in guidance.weights])
    audio = jnp.array([branch.audio for branch in guidance.branches])
    reference = jnp.array([branch.reference for branch in guidance.branches])
    chosen = (
        jnp.take(weights, branches, mode="fill", fill_value=0),
        jnp.take(audio, branches, mode="fill", fill_value=False),
        jnp.take(reference, branches, mode="fill", fill_value=False),
    )

    def denoise(x: Array, sigma: Array) -> Array:
        def add(total: Array, branch: tuple[Array, Array, Array]) -> tuple[Array, None]:
            weight, has_audio, has_reference = branch
            # Keys and values have no bias: those of zero audio are zero.
            audio, key_values = _kept(has_audio, (projected, key_value))
            given = _kept(has_reference, windows.reference)

            def network(x: Array, c_noise: Array) -> Array:
                return stage(x, c_noise, audio, given, key_values)

            return total + weight * precond.denoise(network, x, sigma, windows.gt, windows.mask), None

        return jax.lax.scan(add, jnp.zeros_like(x), chosen)[0]

    return denoise


def _kept(condition: Array, tree: Any) -> Any:
    """The arrays where a scalar bool holds, else zeros."""
    return jax.tree.map(lambda x: jnp.where(condition, x, jnp.zeros_like(x)), tree)
