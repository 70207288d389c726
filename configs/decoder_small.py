"""A small decoder at full size, distilled from SVD's VAE (docs/distillation.md).

    keysync train --config configs/decoder_small.py --workdir runs/decoder --config.data.paths=DATASET \
        --config.teacher=MODEL

MODEL has the released weights, DATASET is made by `keysync prepare` with it. Not trained yet, so nothing is
known of what it reaches.
"""

from ml_collections import ConfigDict

from keysync_jax.config import DecoderConfig, VAEConfig, to_dict
from keysync_jax.train.config import OptimizerConfig, VAELossConfig, VAETrainConfig


def get_config() -> ConfigDict:
    """Steps of 32 frames, AdamW at 1e-4 after warm-up, from random weights."""
    config = VAETrainConfig(
        vae=VAEConfig(),
        crop_size=512,
        decoder=DecoderConfig(),
        loss=VAELossConfig(l1=1.0, l2=1.0, mouth=4.0),
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup=500, ema=0.999, frozen=()),
        batch_size=32,
        steps=20_000,
        dtype="bf16",
        remat="none",
    )
    return ConfigDict(to_dict(config))
