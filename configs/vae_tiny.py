"""The VAE of the embedded model: 128-pixel crops of the synthetic world to latents of 16 x 16 x 8.

    keysync train --config configs/vae_tiny.py --workdir runs/vae --config.data.paths=DATASET

DATASET is made by `keysync prepare CLIPS --crop 128`. Time and figures: docs/default_model.md.
"""

from ml_collections import ConfigDict

from keysync_jax.config import VAEConfig, to_dict
from keysync_jax.train.config import (
    CheckpointConfig,
    LogConfig,
    OptimizerConfig,
    VAELossConfig,
    VAETrainConfig,
)

CROP = 128

VAE = VAEConfig(
    latent_channels=8,
    block_out_channels=(32, 64, 96, 96),
    layers_per_block=1,
    norm_groups=8,
    scale_factor=1.0,
)


def get_config() -> ConfigDict:
    """Steps of 32 frames, from random weights."""
    config = VAETrainConfig(
        vae=VAE,
        crop_size=CROP,
        # The squared error, which PSNR counts, is far smaller than the absolute one.
        loss=VAELossConfig(l1=1.0, l2=8.0, kl=3e-4, mouth=3.0),
        optimizer=OptimizerConfig(
            kind="muon",
            learning_rate=2e-3,
            warmup=100,
            b2=0.99,
            weight_decay=0.0,
            ema=0.998,
            frozen=(),
        ),
        checkpoint=CheckpointConfig(every=1000, keep=2, keep_every=0),
        log=LogConfig(every=50),
        batch_size=32,
        steps=10_000,
        dtype="tf32",
    )
    return ConfigDict(to_dict(config))
