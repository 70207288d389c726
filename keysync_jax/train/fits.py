"""Whether datasets were prepared for a training run, and alike."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from keysync_jax.config import EncoderKind, encoder_name
from keysync_jax.data.records import Dataset
from keysync_jax.errors import UserError
from keysync_jax.train.config import TrainConfig


def check_fits(dataset: Dataset, config: TrainConfig, hashes: Mapping[str, str] | None = None) -> None:
    """Refuses a dataset that was not prepared for this training run.

    Args:
      hashes: SHA-256 by file name of the model directory that the run uses (`Model.hashes`); its VAE and
        encoder must be those the dataset was made with. A hash that either side does not know is not
        compared: features and latents that were imported say only which kind they are.

    Raises:
      UserError: other audio features, another VAE, another size, no pixels for the pixel loss, or no
        shifted voices for `data.pitch`.
    """
    folder, settings, stage = dataset.folder, dataset.settings, config.stage
    if settings.latents == "none":
        raise UserError(f"{folder}: holds frames for training a VAE, no latents; prepare it with --model")
    encoder = settings.encoders.get(stage.audio_encoder)
    if encoder is None:
        found = ", ".join(sorted(settings.encoders)) or "no"
        raise UserError(
            f"{folder}: was prepared with {found} features, the config asks for {stage.audio_encoder}; "
            "sync would be lost"
        )
    sizes = {
        "audio vectors of": (encoder.dim, stage.audio_dim),
        "latents of side": (settings.latent_size, stage.latent_size),
        "latents with a channel count of": (settings.latent_channels, config.vae.latent_channels),
        "crops of side": (settings.crop_size, stage.latent_size * config.vae.factor),
    }
    for what, (found_size, wanted) in sizes.items():
        if found_size not in (None, wanted):
            raise UserError(f"{folder}: holds {what} {found_size}, the config asks for {wanted}")
    for file, sha256 in prepared_with(dataset, stage.audio_encoder).items():
        if hashes and hashes.get(file, sha256) != sha256:
            raise UserError(f"{folder}: was prepared with another {file} than the model of this run has")
    if config.loss.pixel != "none" and not settings.frames:
        raise UserError(f"{folder}: has no pixels, which the pixel loss needs; set loss.pixel=none")
    if config.data.pitch and not settings.pitch:
        raise UserError(
            f"{folder}: has no pitch-shifted voices, which data.pitch needs; prepare it anew with --pitch or "
            "set data.pitch=0"
        )


def check_alike(datasets: Sequence[Dataset], kind: EncoderKind) -> None:
    """Refuses datasets that were prepared with different VAEs or different encoders of this kind.

    Raises:
      UserError: two of them were; a hash that is not known is not compared.
    """
    first: dict[str, tuple[Path, str]] = {}
    for dataset in datasets:
        for file, sha256 in prepared_with(dataset, kind).items():
            folder, wanted = first.setdefault(file, (dataset.folder, sha256))
            if sha256 != wanted:
                raise UserError(
                    f"{folder} and {dataset.folder}: were prepared with different {file}; "
                    "prepare them with the same model"
                )


def prepared_with(dataset: Dataset, kind: EncoderKind) -> dict[str, str]:
    """SHA-256 by file name of the VAE and the encoder of this kind, where the dataset knows them."""
    settings = dataset.settings
    files = {"vae.safetensors": settings.vae, encoder_name(kind): settings.encoders[kind].sha256}
    return {file: sha256 for file, sha256 in files.items() if sha256 is not None}
