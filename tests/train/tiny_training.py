"""A training run that is small enough to compile in seconds."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from keysync_jax.config import StageConfig, StageKind, UNetConfig, VAEConfig
from keysync_jax.model import Network
from keysync_jax.nn.functional import shapes
from keysync_jax.nn.vae import VAE
from keysync_jax.train.batch import Batch
from keysync_jax.train.config import TrainConfig
from keysync_jax.train.flops import batch_shapes
from keysync_jax.train.step import Step, make_stage, make_step

WIDTH = 64
QUICK_COMPILATION: dict[str, Any] = {"xla_backend_optimization_level": 0}
"""Options of jit for functions that are compiled for longer than they run."""
if jax.__version_info__ < (0, 11, 1):  # Later ones have no other emitters.
    QUICK_COMPILATION["xla_cpu_use_fusion_emitters"] = False
CPU_FLAGS = " ".join(f"--{name}={str(value).lower()}" for name, value in QUICK_COMPILATION.items())
"""The same as XLA_FLAGS, for processes that tests start."""

VAE_SIZES = VAEConfig(block_out_channels=(32,), layers_per_block=1)


def train_config(kind: StageKind = "keyframe", batch_size: int = 8, **settings: Any) -> TrainConfig:
    """One level, no attention but the middle block's; 4 frames of 4 x 4 latents, one pixel a cell."""
    unet = UNetConfig(
        in_channels=8 if kind == "keyframe" else 9,
        block_out_channels=(WIDTH,),
        layers_per_block=1,
        attention_levels=(),
        head_dim=WIDTH // 2,
        cross_attention_dim=32,
        addition_embed_dim=32,
    )
    stage = StageConfig(kind, "hubert", unet, audio_dim=16, frames=4, latent_size=4)
    common: dict[str, Any] = {"dtype": "fp32", "remat": "none", "batch_size": batch_size}
    return TrainConfig(stage, VAE_SIZES, **(common | settings))


def batch(config: TrainConfig, seed: int = 0) -> Batch:
    """A batch that is a function of the seed."""
    rng = np.random.default_rng(seed)
    wanted = batch_shapes(config)

    def normal(x: jax.ShapeDtypeStruct) -> np.ndarray:
        return rng.standard_normal(x.shape, dtype=np.float32)

    return Batch(
        mean=5 * normal(wanted.mean),
        logvar=normal(wanted.logvar) - 3,
        reference_mean=5 * normal(wanted.reference_mean),
        reference_logvar=normal(wanted.reference_logvar) - 3,
        audio=normal(wanted.audio),
        mask=rng.integers(0, 2, wanted.mask.shape).astype(np.uint8),
        frame=rng.integers(0, 256, wanted.frame.shape).astype(np.uint8),
        frame_index=rng.integers(0, config.stage.frames, wanted.frame_index.shape).astype(np.int32),
    )


def parameters(abstract: Mapping[str, jax.ShapeDtypeStruct], seed: int = 0) -> dict[str, np.ndarray]:
    """Numbers of a sensible size; the initialisers themselves would be compiled one by one."""
    rng = np.random.default_rng(seed)

    def made(shape: tuple[int, ...]) -> np.ndarray:
        x = rng.standard_normal(shape, dtype=np.float32)
        return x * np.float32(math.prod(shape[:-1]) ** -0.5 if len(shape) > 1 else 0.1)

    return {k: made(v.shape) + np.float32(k.endswith(".scale")) for k, v in abstract.items()}


def vae() -> Network:
    graphdef, abstract = shapes(lambda rngs: VAE(VAE_SIZES, rngs=rngs))
    return Network(graphdef, parameters(abstract))


def train_step(config: TrainConfig) -> Step:
    graphdef, _ = shapes(make_stage(config))
    return make_step(config, graphdef, vae() if config.loss.pixel != "none" else None)
