"""What is measured: functions of arrays whose shapes alone are known, and random arrays to fill them."""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import ShapeDtypeStruct as Shape

from keysync_jax.bench.sizes import Size
from keysync_jax.config import Dtype
from keysync_jax.diffusion.guidance import Separated
from keysync_jax.diffusion.schedule import align_your_steps
from keysync_jax.errors import UserError
from keysync_jax.model import DTYPES
from keysync_jax.nn.functional import Make, bind, shapes
from keysync_jax.nn.speech import SpeechModel
from keysync_jax.nn.stages import stage
from keysync_jax.nn.vae import VAE
from keysync_jax.pipeline.memory import Memory
from keysync_jax.pipeline.sampling import Windows, sample_windows, sample_windows_in_turn

SECONDS_OF_SPEECH = 10


@dataclass(frozen=True)
class Workload:
    """One program.

    Attributes:
      name: for tables.
      run: function of parameters and inputs, not jitted.
      params, inputs: name -> shape and dtype.
      frames: video frames that one call makes or takes.
      dtype: of the computation.
      note: what the call is, for the reader.
    """

    name: str
    run: Callable[[Any, Any], Any]
    params: dict[str, Shape]
    inputs: dict[str, Shape]
    frames: int
    note: str
    dtype: Dtype = "fp32"


def workloads(part: str, size: Size, dtype: Dtype, batch: int, memory: Memory = "balanced") -> list[Workload]:
    """The programs of a part: "unet", "vae", "audio" or "sampler".

    Args:
      dtype: of the computation; matrices are held in it, as a dub holds them.
      batch: windows (unet, sampler), frames (vae) or clips of 10 s (audio) in a call.
      memory: as a dub has it: with "small" the sampler takes the branches of the guidance in turn.

    Raises:
      UserError: there is no such part.
    """
    makers: dict[str, Callable[[Size, Dtype, int], list[Workload]]] = {
        "unet": _unet,
        "vae": _vae,
        "audio": _audio,
        "sampler": partial(_sampler, in_turn=memory == "small"),
    }
    if part not in makers:
        raise UserError(f"there is nothing named {part} to measure; choose one of {', '.join(makers)}")
    if batch < 1:
        raise UserError(f"a call takes 1 or more, not {batch}")
    return makers[part](size, dtype, batch)


def _unet(size: Size, dtype: Dtype, batch: int) -> list[Workload]:
    config = size.stage
    graphdef, params = _held(lambda rngs: stage(config, dtype=DTYPES[dtype], rngs=rngs), dtype)
    side, t, channels = config.latent_size, config.frames, config.unet.out_channels

    def run(params: Any, x: Any) -> Any:
        return bind(graphdef, params)(x["x"], x["c_noise"], x["audio"], x["reference"])

    inputs = {
        "x": _fp32(batch, t, side, side, channels),
        "c_noise": _fp32(batch),
        "audio": _fp32(batch, t, config.unet.cross_attention_dim),
        "reference": _fp32(batch, 2, side, side, channels),
    }
    return [Workload("unet", run, params, inputs, batch * t, f"{batch} x {t} frames, {side} x {side}", dtype)]


def _vae(size: Size, dtype: Dtype, batch: int) -> list[Workload]:
    config, side = size.vae, size.stage.latent_size
    graphdef, params = _held(lambda rngs: VAE(config, dtype=DTYPES[dtype], rngs=rngs), dtype)
    pixels = side * config.factor

    def encode(params: Any, x: Any) -> Any:
        return bind(graphdef, params).encode(x["frames"]).mean

    def decode(params: Any, x: Any) -> Any:
        return bind(graphdef, params).decode(x["latents"])

    frames = {"frames": _fp32(batch, pixels, pixels, 3)}
    latents = {"latents": _fp32(batch, 1, side, side, config.latent_channels)}
    note = f"{batch} frames of {pixels} x {pixels}"
    return [
        Workload("vae encode", encode, params, frames, batch, note, dtype),
        Workload("vae decode", decode, params, latents, batch, f"{note}, each alone", dtype),
    ]


def _audio(size: Size, dtype: Dtype, batch: int) -> list[Workload]:
    graphdef, params = _held(lambda rngs: SpeechModel(size.speech, dtype=DTYPES[dtype], rngs=rngs), dtype)

    def run(params: Any, x: Any) -> Any:
        return bind(graphdef, params)(x["wave"])

    inputs = {"wave": _fp32(batch, 16_000 * SECONDS_OF_SPEECH)}
    note = f"{batch} x {SECONDS_OF_SPEECH} s at 16 kHz"
    return [Workload("audio", run, params, inputs, batch * 25 * SECONDS_OF_SPEECH, note, dtype)]


def _sampler(size: Size, dtype: Dtype, batch: int, in_turn: bool) -> list[Workload]:
    config = size.stage
    graphdef, params = _held(lambda rngs: stage(config, dtype=DTYPES[dtype], rngs=rngs), dtype)
    side, t, channels = config.latent_size, config.frames, config.unet.out_channels
    sigmas = align_your_steps(10)
    sample = sample_windows_in_turn if in_turn else sample_windows

    def run(params: Any, x: Any) -> Any:
        return sample(graphdef, params, Windows(**x), Separated(), jnp.asarray(sigmas, jnp.float32))

    latents = _fp32(batch, t, side, side, channels)
    inputs = {
        "noise": latents,
        "audio": _fp32(batch, t, 2, config.audio_dim),
        "reference": _fp32(batch, 2, side, side, channels),
        "gt": latents,
        "mask": _fp32(batch, t, side, side, 1),
    }
    steps, branches = len(sigmas) - 1, len(Separated.branches)
    note = f"{batch} windows, {steps} steps x {branches} branches{' in turn' if in_turn else ''}"
    # Of a window's frames the last is the next one's first.
    return [Workload("sampler", run, params, inputs, batch * (t - 1), note, dtype)]


def random_arrays(wanted: Mapping[str, Shape], seed: int = 0) -> dict[str, np.ndarray]:
    """Arrays of these shapes, each a function of its name: normal numbers, kernels scaled by their inputs.

    Scales of norms are about 1, so that no activation runs off to infinity.
    """
    arrays = {}
    for name, shape in wanted.items():
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        values = rng.standard_normal(shape.shape, np.float32)
        if name.endswith("kernel"):
            values *= np.float32(np.prod(shape.shape[:-1]) ** -0.5)
        elif name.endswith("scale"):
            values = 1 + np.float32(0.1) * values
        elif name.endswith(("bias", "mix_factor")):
            values *= np.float32(0.1)
        arrays[name] = values.astype(shape.dtype)
    return arrays


def _held(make: Make, dtype: Dtype) -> tuple[Any, dict[str, Shape]]:
    """Graph, and parameters as `Model.load` holds them: matrices in the compute dtype, the rest in fp32."""
    graphdef, params = shapes(make)
    held = {n: Shape(p.shape, DTYPES[dtype] if len(p.shape) > 1 else jnp.float32) for n, p in params.items()}
    return graphdef, held


def _fp32(*shape: int) -> Shape:
    return jax.ShapeDtypeStruct(shape, jnp.float32)
