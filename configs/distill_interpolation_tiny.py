"""The embedded model's interpolation stage as a student of 2 steps and one branch (docs/distillation.md).

    keysync distill --teacher MODEL --config configs/distill_interpolation_tiny.py \
        --workdir runs/student_interpolation --config.data.paths=DATASET \
        --config.distill.student=runs/student_keyframe

MODEL is `keysync_jax/models/tiny`, DATASET is made by `keysync prepare` with it.
"""

from ml_collections import ConfigDict

from keysync_jax.configs import interpolation_tiny
from keysync_jax.configs.distill_keyframe_tiny import student_config
from keysync_jax.train.config import DistillConfig


def get_config() -> ConfigDict:
    """The 14 frames from one keyframe to the next."""
    return student_config(interpolation_tiny.get_config(), DistillConfig(clips=500, windows_per_call=8))
