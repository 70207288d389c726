"""The interpolation stage at full size (paper, table 7; the release's learning rate), from SVD's weights.

    keysync train --config configs/interpolation.py --workdir runs/interpolation \
        --config.data.paths=DATASET --config.init.path=svd.safetensors --config.init.vae=svd.safetensors

`--dry-run --devices N` prints what it takes. 120,000 steps of 32 clips; hours: not measured. Expected of both
stages together (paper, table 1, cross-sync): LipScore 0.48, LipLeak 0.22, FVD 206.3.
"""

from ml_collections import ConfigDict

from keysync_jax.config import StageConfig, UNetConfig, to_dict
from keysync_jax.train.config import InitConfig, OptimizerConfig, TrainConfig


def get_config() -> ConfigDict:
    """The 14 frames from one keyframe to the next, HuBERT features, AdamW at 3e-5 after warm-up."""
    config = TrainConfig(
        stage=StageConfig("interpolation", "hubert", UNetConfig(in_channels=9)),
        init=InitConfig("svd"),
        optimizer=OptimizerConfig(learning_rate=3e-5, warmup=1000),
        batch_size=32,
        steps=120_000,
    )
    return ConfigDict(to_dict(config))
