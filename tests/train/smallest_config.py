"""A config, as configs/*.py are, of the smallest network that has every kind of part."""

from pathlib import Path

from ml_collections import ConfigDict

from keysync_jax.config import StageConfig, UNetConfig, VAEConfig, to_dict
from keysync_jax.train.config import (
    CheckpointConfig,
    DataConfig,
    LogConfig,
    LossConfig,
    OptimizerConfig,
    TrainConfig,
)

UNET = UNetConfig(
    in_channels=8,
    block_out_channels=(16,),
    layers_per_block=1,
    attention_levels=(),
    head_dim=16,
    cross_attention_dim=8,
    addition_embed_dim=8,
    norm_groups=4,
)


def smallest() -> TrainConfig:
    return TrainConfig(
        stage=StageConfig("keyframe", "hubert", UNET, frames=3, latent_size=8),
        vae=VAEConfig(block_out_channels=(8, 8), layers_per_block=1, norm_groups=4),
        data=DataConfig(keyframe_stride=2),
        loss=LossConfig(pixel="none"),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup=3),
        checkpoint=CheckpointConfig(every=5, keep=2, keep_every=0),
        log=LogConfig(every=1),
        batch_size=2,
        steps=30,
        dtype="fp32",
        remat="none",
    )


def get_config() -> ConfigDict:
    return ConfigDict(to_dict(smallest()))


def pretend_checkpoint(folder: Path) -> None:
    """What a complete checkpoint is known by, and nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "commit_success.txt").touch()
