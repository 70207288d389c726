"""The embedded model's keyframe stage as a student of 2 steps and one branch (docs/distillation.md).

    keysync distill --teacher MODEL --config configs/distill_keyframe_tiny.py \
        --workdir runs/student_keyframe --config.data.paths=DATASET

MODEL is `keysync_jax/models/tiny`, DATASET is made by `keysync prepare` with it.
"""

from ml_collections import ConfigDict

from keysync_jax.config import GuidanceConfig, to_dict
from keysync_jax.configs import keyframe_tiny
from keysync_jax.train.config import DistillConfig, TrainConfig, train_config_from


def student_config(teacher: ConfigDict, distill: DistillConfig) -> ConfigDict:
    """Steps of 32 windows; AdamW, since the weights are the teacher's already."""
    config = train_config_from(teacher.to_dict(), "teacher")
    assert isinstance(config, TrainConfig)
    values = to_dict(config)
    values["data"]["sample_posterior"] = False
    values["loss"]["pixel"] = "none"
    values["optimizer"] |= {"kind": "adamw", "learning_rate": 2e-4, "warmup": 50, "b2": 0.999}
    values |= {"guidance": to_dict(GuidanceConfig("none")), "distill": to_dict(distill), "steps": 2000}
    return ConfigDict(values)


def get_config() -> ConfigDict:
    """The keyframes."""
    return student_config(keyframe_tiny.get_config(), DistillConfig(clips=2000, windows_per_call=8))
