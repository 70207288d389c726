"""The keyframe stage at full size as a student of 2 steps and one branch (docs/distillation.md).

    keysync distill --teacher MODEL --config configs/distill_keyframe.py --workdir runs/student_keyframe \
        --config.data.paths=DATASET

MODEL has the released weights, DATASET is made by `keysync prepare` with it. `--dry-run --devices N` prints
what it takes. Not trained yet, so nothing is known of what it reaches.
"""

from ml_collections import ConfigDict

from keysync_jax.config import GuidanceConfig, StageConfig, UNetConfig, to_dict
from keysync_jax.train.config import (
    DataConfig,
    DistillConfig,
    InitConfig,
    LossConfig,
    OptimizerConfig,
    TrainConfig,
)


def get_config() -> ConfigDict:
    """All parameters are trained, at 1e-5 after warm-up, on 10,000 dubbed stretches."""
    config = TrainConfig(
        stage=StageConfig("keyframe", "hubert", UNetConfig(in_channels=8)),
        init=InitConfig("keysync"),
        data=DataConfig(sample_posterior=False),
        loss=LossConfig(pixel="none"),
        optimizer=OptimizerConfig(learning_rate=1e-5, warmup=200, ema=0.998, frozen=()),
        guidance=GuidanceConfig("none"),
        distill=DistillConfig(clips=10_000),
        batch_size=32,
        steps=5000,
    )
    return ConfigDict(to_dict(config))
