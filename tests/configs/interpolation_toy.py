"""The interpolation stage in a toy size: every part of the full run, in a minute on one CPU core.

    keysync train --config tests/configs/interpolation_toy.py --workdir runs/tiny --config.data.paths=DATASET

Sizes are those of `keyframe_toy.py`, with the same remarks.
"""

from ml_collections import ConfigDict

from keysync_jax.config import StageConfig, UNetConfig, VAEConfig, to_dict
from keysync_jax.train.config import CheckpointConfig, LogConfig, OptimizerConfig, TrainConfig

UNET = UNetConfig(
    in_channels=9,
    block_out_channels=(32, 64),
    layers_per_block=1,
    attention_levels=(0, 1),
    head_dim=16,
    cross_attention_dim=48,
    addition_embed_dim=48,
)


def get_config() -> ConfigDict:
    """30 steps of 2 clips in fp32, from random weights."""
    config = TrainConfig(
        stage=StageConfig("interpolation", "hubert", UNET, latent_size=8),
        vae=VAEConfig(block_out_channels=(32, 64), layers_per_block=1),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup=5),
        checkpoint=CheckpointConfig(every=10, keep=2, keep_every=0),
        log=LogConfig(every=1),
        batch_size=2,
        steps=30,
        dtype="fp32",
        remat="none",
    )
    return ConfigDict(to_dict(config))
