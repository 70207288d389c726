"""The interpolation stage of the embedded model, which is trained in the synthetic world.

    keysync train --config configs/interpolation_tiny.py --workdir runs/interpolation \
        --config.data.paths=DATASET --config.init.path=MODEL --config.init.vae=MODEL

All but its name and its input, which has a channel for the mask, is as in `keyframe_tiny.py`.
"""

from dataclasses import replace

from ml_collections import ConfigDict

from keysync_jax.configs.keyframe_tiny import UNET, stage_config


def get_config() -> ConfigDict:
    """The 14 frames from one keyframe to the next."""
    return stage_config("interpolation", replace(UNET, in_channels=UNET.in_channels + 1))
