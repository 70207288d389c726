"""From a model directory to PyTorch's layouts.

It is the conversion tables backwards, so what `keysync convert` reads from an exported file is the model
directory again, bit for bit.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from keysync_jax.config import StageConfig, UNetConfig, VAEConfig
from keysync_jax.convert.containers import write_deepspeed
from keysync_jax.convert.table import Table
from keysync_jax.convert.unet import diffusers_unet_table, stage_table
from keysync_jax.convert.vae import diffusers_vae_table, engine_vae_table
from keysync_jax.errors import UserError
from keysync_jax.extras import needed_for, require
from keysync_jax.files import new_folder, write_json
from keysync_jax.model import Model, maker, open_model
from keysync_jax.nn.functional import shapes
from keysync_jax.tensorfile import TensorFile, write_tensors

Layout = Literal["reference", "diffusers"]
Tensors = Mapping[str, np.ndarray]


def export_torch(
    folder: str | Path, output: str | Path, layout: Layout = "reference", pickled: bool = False
) -> list[Path]:
    """Writes a model directory's networks in a PyTorch layout; dtypes and bits are kept.

    `reference`: `keyframe`, `interpolation` and `vae` under the release's names, one file each. A VAE with a
    quant convolution, which those names have no place for, is written as diffusers' folder instead.
    `diffusers`: `keyframe/unet`, `interpolation/unet` and `vae` as folders that diffusers loads; what it has
    no names for (audio projection, z_m) is in `STAGE/keysync.safetensors`, under the release's names. A VAE
    without a quant convolution gets one that changes nothing.

    Args:
      output: a new folder.
      pickled: `reference` only: `.pt` files, as the release's, instead of `.safetensors`; needs torch.

    Returns:
      The files that were written.

    Raises:
      UserError: the model cannot be read, the folder exists, or torch is not there to write `.pt`.
    """
    model, output = open_model(folder), Path(output)
    if pickled and layout == "diffusers":
        raise UserError("diffusers' folders hold safetensors files; .pt is for the reference's layout")
    if pickled:
        with needed_for(f"{output}: writing .pt files"):
            require("torch")
    with new_folder(output) as partial:
        if layout == "reference":
            _write_reference(model, partial, pickled)
        else:
            _write_diffusers(model, partial)
    return sorted(path for path in output.rglob("*") if path.is_file())


def _write_reference(model: Model, folder: Path, pickled: bool) -> None:
    for kind in ("keyframe", "interpolation"):
        config = model.config.stage(kind)
        tensors = stage_table(config, _shapes(model, kind)).to_torch(_params(model, kind))
        _write(folder / kind, tensors, pickled)
    if model.config.vae.quant_conv:
        _write_diffusers_vae(model, folder / "vae")
    else:
        table = engine_vae_table(model.config.vae, _shapes(model, "vae"))
        _write(folder / "vae", table.to_torch(_params(model, "vae")), pickled)


def _write(stem: Path, tensors: Tensors, pickled: bool) -> None:
    if pickled:
        write_deepspeed(stem.with_suffix(".pt"), tensors)
    else:
        write_tensors(stem.with_suffix(".safetensors"), tensors)


def _write_diffusers(model: Model, folder: Path) -> None:
    for kind in ("keyframe", "interpolation"):
        config, params = model.config.stage(kind), _params(model, kind)
        wanted = _shapes(model, kind)
        inner = {p.removeprefix("unet."): s for p, s in wanted.items() if p.startswith("unet.")}
        unet = {p: params[f"unet.{p}"] for p in inner}
        target = folder / kind / "unet"
        _write_folder(target, diffusers_unet_table(config.unet, inner).to_torch(unet), unet_config(config))
        rows = [r for r in stage_table(config, wanted).rows if not r.path.startswith("unet.")]
        write_tensors(folder / kind / "keysync.safetensors", Table(rows).to_torch(params))
    _write_diffusers_vae(model, folder / "vae")


def _write_diffusers_vae(model: Model, folder: Path) -> None:
    config = model.config.vae
    tensors = diffusers_vae_table(config, _shapes(model, "vae")).to_torch(_params(model, "vae"))
    if not config.quant_conv:
        moments = 2 * config.latent_channels
        dtype = tensors["encoder.conv_out.weight"].dtype
        tensors["quant_conv.weight"] = np.eye(moments, dtype=dtype)[:, :, None, None]
        tensors["quant_conv.bias"] = np.zeros(moments, dtype)
    _write_folder(folder, tensors, vae_config(config))


def _write_folder(folder: Path, tensors: Tensors, config: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    write_json(folder / "config.json", config, indent=2)
    write_tensors(folder / "diffusion_pytorch_model.safetensors", tensors, {"format": "pt"})


def unet_config(stage: StageConfig) -> dict[str, Any]:
    """`config.json` of diffusers' `UNetSpatioTemporalConditionModel` for a stage's U-Net."""
    unet: UNetConfig = stage.unet
    levels = range(len(unet.block_out_channels))
    down = [
        "CrossAttnDownBlockSpatioTemporal" if i in unet.attention_levels else "DownBlockSpatioTemporal"
        for i in levels
    ]
    return {
        "_class_name": "UNetSpatioTemporalConditionModel",
        "in_channels": unet.in_channels,
        "out_channels": unet.out_channels,
        "down_block_types": down,
        "up_block_types": [name.replace("Down", "Up") for name in reversed(down)],
        "block_out_channels": list(unet.block_out_channels),
        # Diffusers makes this many sinusoids of each number; here the vector comes from the audio.
        "addition_time_embed_dim": unet.addition_embed_dim,
        "projection_class_embeddings_input_dim": unet.addition_embed_dim,
        "layers_per_block": unet.layers_per_block,
        "cross_attention_dim": unet.cross_attention_dim,
        "transformer_layers_per_block": 1,
        "num_attention_heads": [width // unet.head_dim for width in unet.block_out_channels],
        "num_frames": stage.frames,
        "sample_size": stage.latent_size,
    }


def vae_config(vae: VAEConfig) -> dict[str, Any]:
    """`config.json` of diffusers' `AutoencoderKLTemporalDecoder`."""
    return {
        "_class_name": "AutoencoderKLTemporalDecoder",
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * len(vae.block_out_channels),
        "block_out_channels": list(vae.block_out_channels),
        "layers_per_block": vae.layers_per_block,
        "latent_channels": vae.latent_channels,
        "scaling_factor": vae.scale_factor,
        "force_upcast": True,
    }


def _shapes(model: Model, component: str) -> dict[str, tuple[int, ...]]:
    return {path: leaf.shape for path, leaf in shapes(maker(model.config, component))[1].items()}


def _params(model: Model, component: str) -> TensorFile:
    return TensorFile(model.folder / f"{component}.safetensors")
