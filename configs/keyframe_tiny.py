"""The keyframe stage of the embedded model, which is trained in the synthetic world.

    keysync train --config configs/keyframe_tiny.py --workdir runs/keyframe \
        --config.data.paths=DATASET --config.init.path=MODEL --config.init.vae=MODEL

MODEL is made by `keysync init` from a run of `vae_tiny.py`, DATASET by `keysync prepare` with it. Time and
figures: docs/default_model.md.
"""

from ml_collections import ConfigDict

from keysync_jax.config import GuidanceConfig, LogMelConfig, StageConfig, StageKind, UNetConfig, to_dict
from keysync_jax.configs.vae_tiny import CROP, VAE
from keysync_jax.train.config import (
    CheckpointConfig,
    InitConfig,
    LogConfig,
    LossConfig,
    OptimizerConfig,
    TrainConfig,
)

UNET = UNetConfig(
    in_channels=2 * VAE.latent_channels,
    out_channels=VAE.latent_channels,
    block_out_channels=(32, 64, 96),
    layers_per_block=1,
    attention_levels=(1, 2),
    head_dim=32,
    cross_attention_dim=128,
    addition_embed_dim=128,
    norm_groups=8,
)


def stage_config(kind: StageKind, unet: UNetConfig) -> ConfigDict:
    """Steps of 32 clips; every parameter is trained, temporal layers included."""
    config = TrainConfig(
        stage=StageConfig(
            kind, "logmel", unet, audio_dim=LogMelConfig().hidden_size, latent_size=CROP // VAE.factor
        ),
        vae=VAE,
        init=InitConfig(kind="keysync"),
        loss=LossConfig(p_mean=0.5, p_std=1.4, drop_reference_by="clip"),
        optimizer=OptimizerConfig(
            kind="muon",
            learning_rate=2e-3,
            warmup=200,
            b2=0.99,
            weight_decay=0.0,
            ema=0.998,
            frozen=(),
        ),
        checkpoint=CheckpointConfig(every=1000, keep=2, keep_every=0),
        log=LogConfig(every=50),
        guidance=GuidanceConfig(audio=2.0, identity=1.5),
        batch_size=32,
        steps=5000,
        dtype="tf32",
        remat="none",
    )
    return ConfigDict(to_dict(config))


def get_config() -> ConfigDict:
    """The keyframes."""
    return stage_config("keyframe", UNET)
