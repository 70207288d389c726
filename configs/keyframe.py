"""The keyframe stage at full size (paper, table 7), from SVD's weights.

    keysync train --config configs/keyframe.py --workdir runs/keyframe \
        --config.data.paths=DATASET --config.init.path=svd.safetensors --config.init.vae=svd.safetensors

`--dry-run --devices N` prints what it takes. 60,000 steps of 32 clips; hours: not measured. Expected of both
stages together (paper, table 1, cross-sync): LipScore 0.48, LipLeak 0.22, FVD 206.3.
"""

from ml_collections import ConfigDict

from keysync_jax.config import StageConfig, UNetConfig, to_dict
from keysync_jax.train.config import InitConfig, OptimizerConfig, TrainConfig


def get_config() -> ConfigDict:
    """Keyframes 13 frames apart, HuBERT features, AdamW at 1e-5 after warm-up."""
    config = TrainConfig(
        stage=StageConfig("keyframe", "hubert", UNetConfig(in_channels=8)),
        init=InitConfig("svd"),
        optimizer=OptimizerConfig(learning_rate=1e-5, warmup=1000),
        batch_size=32,
        steps=60_000,
    )
    return ConfigDict(to_dict(config))
