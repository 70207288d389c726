"""The interpolation stage of the embedded model, which is trained in the synthetic world.

    keysync train --config configs/interpolation_tiny.py --workdir runs/interpolation \
        --config.data.paths=DATASET --config.init.path=MODEL --config.init.vae=MODEL

MODEL is made by `keysync init` from a run of `vae_tiny.py`, DATASET by `keysync prepare` with it. Time and
figures: docs/default_model.md.
"""

from ml_collections import ConfigDict

from keysync_jax.config import GuidanceConfig, LogMelConfig, StageConfig, UNetConfig, VAEConfig, to_dict
from keysync_jax.train.config import (
    CheckpointConfig,
    InitConfig,
    LogConfig,
    LossConfig,
    OptimizerConfig,
    TrainConfig,
)

UNET = UNetConfig(
    in_channels=9,
    block_out_channels=(32, 64, 96),
    layers_per_block=1,
    attention_levels=(1, 2),
    head_dim=32,
    cross_attention_dim=128,
    addition_embed_dim=128,
    norm_groups=8,
)
VAE = VAEConfig(block_out_channels=(16, 32, 64, 64), layers_per_block=1, norm_groups=8, scale_factor=1.0)


def get_config() -> ConfigDict:
    """Steps of 4 clips in fp32; every parameter is trained, temporal layers included."""
    config = TrainConfig(
        stage=StageConfig(
            "interpolation", "logmel", UNET, audio_dim=LogMelConfig().hidden_size, latent_size=12
        ),
        vae=VAE,
        init=InitConfig(kind="keysync"),
        loss=LossConfig(p_mean=0.5, p_std=1.4),
        optimizer=OptimizerConfig(
            kind="muon",
            learning_rate=2e-3,
            warmup=200,
            b2=0.99,
            weight_decay=0.0,
            ema=0.998,
            frozen=(),
        ),
        checkpoint=CheckpointConfig(every=500, keep=2, keep_every=0),
        log=LogConfig(every=50),
        guidance=GuidanceConfig(audio=3.0, identity=1.5),
        batch_size=4,
        steps=4000,
        dtype="fp32",
        remat="none",
    )
    return ConfigDict(to_dict(config))
