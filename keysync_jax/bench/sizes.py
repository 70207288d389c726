"""Sizes to measure at: the full networks, and two that are quick on a CPU. Weights are random; speed does
not depend on their values.
"""

from dataclasses import dataclass

from keysync_jax.config import SpeechConfig, StageConfig, UNetConfig, VAEConfig
from keysync_jax.errors import UserError


@dataclass(frozen=True)
class Size:
    """Networks of one size; the interpolation stage, which does 13 of 14 of a long dub's calls."""

    stage: StageConfig
    vae: VAEConfig
    speech: SpeechConfig


def _size(
    widths: tuple[int, ...], head: int, context: int, latent: int, vae: tuple[int, ...], speech: SpeechConfig
) -> Size:
    unet = UNetConfig(
        in_channels=9,
        block_out_channels=widths,
        head_dim=head,
        cross_attention_dim=context,
        addition_embed_dim=context,
    )
    stage = StageConfig(
        "interpolation", "hubert", unet, audio_dim=speech.hidden_size, frames=14, latent_size=latent
    )
    # With the quant convolution of diffusers' layout, which the weights are compared in.
    return Size(stage, VAEConfig(block_out_channels=vae, quant_conv=True), speech)


SIZES: dict[str, Size] = {
    "tiny": _size(
        (32, 64, 64, 64),
        16,
        64,
        8,
        (32, 32, 64, 64),
        SpeechConfig(
            "hubert",
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=128,
            conv_dim=(32,) * 7,
        ),
    ),
    "mid": _size(
        (64, 128, 256, 256),
        32,
        256,
        32,
        (64, 128, 256, 256),
        SpeechConfig(
            "hubert",
            hidden_size=384,
            num_hidden_layers=6,
            num_attention_heads=6,
            intermediate_size=1536,
            conv_dim=(256,) * 7,
        ),
    ),
    "full": _size((320, 640, 1280, 1280), 64, 1024, 64, (128, 256, 512, 512), SpeechConfig("hubert")),
}


def size_of(name: str) -> Size:
    """The size of that name.

    Raises:
      UserError: there is none.
    """
    if name not in SIZES:
        raise UserError(f"there is no size {name}; choose one of {', '.join(SIZES)}")
    return SIZES[name]
