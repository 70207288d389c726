"""The fused denoising loop of a stage: all steps and guidance branches of a batch of windows, one jit."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from keysync_jax.config import GuidanceConfig
from keysync_jax.diffusion import precond
from keysync_jax.diffusion.guidance import (
    ClassifierFree,
    Guidance,
    Separated,
    Unguided,
    combine,
    heard,
    keep,
    repeat,
)
from keysync_jax.diffusion.sampler import Denoise, sample, steps
from keysync_jax.nn.functional import bind
from keysync_jax.pipeline.devices import BRANCHES
from keysync_jax.typing import Array, Params


def guidance_of(config: GuidanceConfig) -> Guidance:
    """The guidance that a config names."""
    if config.kind == "separated":
        return Separated(config.audio, config.identity)
    return ClassifierFree(config.scale) if config.kind == "cfg" else Unguided()


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
    graphdef: nnx.GraphDef, params: Params, windows: Windows, guidance: Guidance, sigmas: Array
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
    return sample(_guided(graphdef, params, windows, guidance), windows.noise, sigmas)


@partial(jax.jit, static_argnames="graphdef")
def sample_windows_in_turn(
    graphdef: nnx.GraphDef, params: Params, windows: Windows, guidance: Guidance, sigmas: Array
) -> Array:
    """`sample_windows`, the branches one after another in the memory of one; equal up to rounding."""
    branches = jnp.arange(len(guidance.branches))
    return sample(_summed(graphdef, params, windows, guidance, branches), windows.noise, sigmas)


@partial(jax.jit, static_argnames="graphdef")
def sample_windows_by_branch(
    graphdef: nnx.GraphDef, params: Params, windows: Windows, guidance: Guidance, sigmas: Array
) -> Array:
    """`sample_windows` in a `jax.shard_map`, branches shared by the devices along `BRANCHES`.

    Each device has the same windows, and they add up what their branches made at every step. Equal to
    `sample_windows` up to rounding.
    """
    share = -(-len(guidance.branches) // jax.lax.axis_size(BRANCHES))
    own = jax.lax.axis_index(BRANCHES) * share + jnp.arange(share)
    part = _summed(graphdef, params, windows, guidance, own)

    def denoise(x: Array, sigma: Array) -> Array:
        return jax.lax.psum(part(x, sigma), BRANCHES)

    return sample(denoise, windows.noise, sigmas)


@partial(jax.jit, static_argnames="graphdef")
def sample_steps(
    graphdef: nnx.GraphDef, params: Params, windows: Windows, guidance: Guidance, sigmas: Array
) -> tuple[Array, Array]:
    """Every step of `sample_windows`: where it arrives, and the clean latents it went towards.

    Returns:
      Two arrays `[steps, B, T, h, w, 4]` fp32, scaled.
    """
    return steps(_guided(graphdef, params, windows, guidance), windows.noise, sigmas)


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
