"""The VAE of the embedded model: 96-pixel crops of the synthetic world to latents of 12 x 12 x 4.

    keysync train --config configs/vae_tiny.py --workdir runs/vae --config.data.paths=DATASET

DATASET is made by `keysync prepare CLIPS --crop 96`. Time and figures: docs/default_model.md.
"""

from ml_collections import ConfigDict

from keysync_jax.config import VAEConfig, to_dict
from keysync_jax.train.config import CheckpointConfig, LogConfig, OptimizerConfig, VAETrainConfig

CROP = 96

VAE = VAEConfig(block_out_channels=(16, 32, 64, 64), layers_per_block=1, norm_groups=8, scale_factor=1.0)


def get_config() -> ConfigDict:
    """Steps of 4 frames in fp32, from random weights."""
    config = VAETrainConfig(
        vae=VAE,
        crop_size=CROP,
        optimizer=OptimizerConfig(
            kind="muon",
            learning_rate=2e-3,
            warmup=100,
            b2=0.99,
            weight_decay=0.0,
            ema=0.997,
            frozen=(),
        ),
        checkpoint=CheckpointConfig(every=250, keep=2, keep_every=0),
        log=LogConfig(every=50),
        batch_size=4,
        steps=5000,
    )
    return ConfigDict(to_dict(config))
