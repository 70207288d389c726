"""Networks that `keysync parity --size` compares, their weights by the rule of their names."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keysync_jax.config import StageConfig, StageKind, UNetConfig, VAEConfig
from keysync_jax.model import open_model

STAGES: tuple[StageKind, StageKind] = ("keyframe", "interpolation")


@dataclass(frozen=True)
class Networks:
    """Both stages and the VAE.

    Attributes:
      size: what tables call them: tiny, mid, full, or a model's folder.
      model: the directory that their weights are of; None for weights by the rule.
      clips: windows of a batch.
    """

    size: str
    keyframe: StageConfig
    interpolation: StageConfig
    vae: VAEConfig
    model: Path | None = None
    clips: int = 1

    def __getitem__(self, network: str) -> StageConfig | VAEConfig:
        configs: dict[str, StageConfig | VAEConfig] = {
            "keyframe": self.keyframe,
            "interpolation": self.interpolation,
            "vae": self.vae,
        }
        return configs[network]


def _stages(unet: dict[str, Any], latent_size: int) -> tuple[StageConfig, StageConfig]:
    def config(kind: StageKind, channels: int) -> StageConfig:
        return StageConfig(kind, "hubert", UNetConfig(channels, **unet), latent_size=latent_size)

    return config("keyframe", 8), config("interpolation", 9)


def tiny() -> Networks:
    """The networks of the golden files: two levels, 8 x 8 latents."""
    unet: dict[str, Any] = {"block_out_channels": (32, 64), "layers_per_block": 1, "head_dim": 16}
    unet |= {"attention_levels": (0, 1), "cross_attention_dim": 48, "addition_embed_dim": 48}
    return Networks("tiny", *_stages(unet, 8), VAEConfig((32, 64), layers_per_block=1), clips=2)


def mid() -> Networks:
    """Every level and layer of the full networks at a fifth of their widths; 16 x 16 latents."""
    unet: dict[str, Any] = {"block_out_channels": (64, 128, 256, 256), "head_dim": 32}
    unet |= {"cross_attention_dim": 128, "addition_embed_dim": 128}
    return Networks("mid", *_stages(unet, 16), VAEConfig((32, 64, 128, 128)))


def full() -> Networks:
    """The released sizes."""
    return Networks("full", *_stages({}, 64), VAEConfig())


SIZES = {"tiny": tiny, "mid": mid, "full": full}


def of_model(folder: Path) -> Networks:
    """The networks of a model directory.

    Raises:
      UserError: as `open_model`.
    """
    config = open_model(folder).config
    return Networks(str(folder), config.keyframe, config.interpolation, config.vae, folder.resolve())
