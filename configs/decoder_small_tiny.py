"""The embedded model's small decoder, distilled from its VAE's (docs/distillation.md).

    keysync train --config configs/decoder_small_tiny.py --workdir runs/decoder --config.data.paths=DATASET \
        --config.teacher=keysync_jax/models/tiny

DATASET is that of the VAE, made by `keysync prepare CLIPS --crop 128`.
"""

from dataclasses import replace

from ml_collections import ConfigDict

from keysync_jax.config import DecoderConfig, to_dict
from keysync_jax.configs import vae_tiny
from keysync_jax.train.config import VAETrainConfig, train_config_from


def get_config() -> ConfigDict:
    """Steps of 32 frames, as the VAE was trained; the squared error alone makes it crisp where the VAE is."""
    config = train_config_from(vae_tiny.get_config().to_dict(), "vae_tiny")
    assert isinstance(config, VAETrainConfig)
    small = DecoderConfig(block_out_channels=(16, 32, 48, 48), layers_per_block=1, norm_groups=8)
    return ConfigDict(to_dict(replace(config, decoder=small, steps=5000)))
