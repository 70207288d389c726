"""The fused denoising loop of a stage: all steps and guidance branches of a batch of windows, one jit."""

from functools import partial
from typing import NamedTuple

import jax
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
