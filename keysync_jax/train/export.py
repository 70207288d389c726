"""From a finished run to a model directory, and from a model directory to PyTorch's layouts.

The way to PyTorch is that of the conversion tables backwards, so what `keysync convert` reads from an
exported file is the model directory again, bit for bit.
"""

import dataclasses
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from keysync_jax.config import ModelConfig, StageConfig, StageKind, UNetConfig, VAEConfig
from keysync_jax.convert.containers import write_deepspeed
from keysync_jax.convert.table import Table
from keysync_jax.convert.unet import diffusers_unet_table, stage_table
from keysync_jax.convert.vae import diffusers_vae_table, engine_vae_table
from keysync_jax.data.records import MANIFEST, Dataset, check_fits
from keysync_jax.errors import UserError
from keysync_jax.files import check_new_folder
from keysync_jax.model import DTYPES, Model, components, maker, open_model, save_model
from keysync_jax.nn.functional import shapes
from keysync_jax.tensorfile import TensorFile, write_tensors
from keysync_jax.train.checkpoint import Checkpoints, read_config
from keysync_jax.train.config import TrainConfig

Layout = Literal["reference", "diffusers"]
Tensors = Mapping[str, np.ndarray]


def export(
    runs: Sequence[str | Path],
    output: str | Path,
    base: str | Path,
    average: bool = False,
    dtype: str = "fp32",
) -> ModelConfig:
    """Makes a model directory of one or two training runs.

    Args:
      runs: folders of runs; the last checkpoint of each is taken.
      output: the model directory, must not exist yet.
      base: a model directory; what was not trained (VAE, audio encoders, the other stage) is its.
      average: take the moving averages of the weights instead of the weights.
      dtype: "fp32": as they were trained; "bf16": matrices and kernels of every component are rounded to
        bf16, as a run in bf16 holds them, in half the size.

    Raises:
      UserError: a run or the base cannot be read, they do not fit each other, or the audio encoder is not
        the one whose features the run was trained on.
    """
    output = Path(output)
    check_new_folder(output)
    configs = _run_configs([Path(run) for run in runs])
    rest = open_model(base)
    model = _model_config(rest, configs)
    provenance, trained = dict(rest.config.provenance), dict[str, Tensors]()
    for kind, (folder, config) in configs.items():
        _check_fits_base(folder, config, rest)
        step, trained[kind] = _weights(folder, config, average)
        provenance[kind] = f"{folder.absolute().name} step {step}{' moving average' if average else ''}"
    names = components(model)
    model = dataclasses.replace(model, provenance={n: s for n, s in provenance.items() if n in names})
    untrained = {n: TensorFile(rest.folder / f"{n}.safetensors") for n in names if n not in trained}
    tensors: dict[str, Tensors] = {**untrained, **trained}
    save_model(output, model, {name: _rounded(part, dtype) for name, part in tensors.items()})
    return model


def _rounded(tensors: Tensors, dtype: str) -> Tensors:
    if dtype == "fp32":
        return tensors
    return {path: x.astype(DTYPES[dtype]) if x.ndim > 1 else x for path, x in tensors.items()}


def _run_configs(runs: Sequence[Path]) -> dict[StageKind, tuple[Path, TrainConfig]]:
    configs: dict[StageKind, tuple[Path, TrainConfig]] = {}
    for folder in runs:
        config = read_config(folder)
        if not isinstance(config, TrainConfig):
            raise UserError(f"{folder}: is the run of a VAE; keysync init makes a model of it")
        kind = config.stage.kind
        if kind in configs:
            raise UserError(f"{folder}: a second run of the {kind} stage; give one run of each stage")
        configs[kind] = folder, config
    return configs


def _model_config(rest: Model, configs: Mapping[StageKind, tuple[Path, TrainConfig]]) -> ModelConfig:
    """The base's config with the trained stages; encoders that no stage asks for are left out."""
    stages: dict[StageKind, StageConfig] = {"keyframe": rest.config.keyframe}
    stages["interpolation"] = rest.config.interpolation
    stages |= {kind: config.stage for kind, (_, config) in configs.items()}
    masks = {config.data.mask for _, config in configs.values()}
    if len(configs) < len(stages):
        masks.add(rest.config.mask)
    if len(masks) != 1:
        raise UserError(f"the two stages were trained with different masks ({', '.join(sorted(masks))})")
    guidances = {config.guidance for _, config in configs.values()}
    if len(guidances) != 1:
        raise UserError("the two runs have different settings of guidance; a model has one")
    used = {s.audio_encoder for s in stages.values()}
    for kind in used - rest.config.encoders.keys():
        raise UserError(f"{rest.folder}: has no {kind} encoder, whose features a stage was trained on")
    return dataclasses.replace(
        rest.config,
        keyframe=stages["keyframe"],
        interpolation=stages["interpolation"],
        encoders={kind: e for kind, e in rest.config.encoders.items() if kind in used},
        mask=masks.pop(),
        guidance=guidances.pop(),
    )


def _check_fits_base(folder: Path, config: TrainConfig, rest: Model) -> None:
    sizes = dataclasses.replace(rest.config.vae, quant_conv=config.vae.quant_conv)
    if sizes != config.vae:
        raise UserError(f"{folder}: was trained for a VAE of other sizes than that of {rest.folder}")
    for path in map(Path, config.data.paths):
        # A dataset that is not here any more cannot be asked which files it was prepared with.
        if (path / MANIFEST).is_file():
            check_fits(Dataset(path), config, rest.hashes)


def _weights(folder: Path, config: TrainConfig, average: bool) -> tuple[int, Tensors]:
    if not (folder / "checkpoints").is_dir():
        raise UserError(f"{folder}: the run has no checkpoint yet")
    with Checkpoints(folder / "checkpoints", config.checkpoint, read_only=True) as checkpoints:
        return checkpoints.restore_weights(average)


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
    check_new_folder(output)
    if pickled and layout == "diffusers":
        raise UserError("diffusers' folders hold safetensors files; .pt is for the reference's layout")
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as partial:
        inner = Path(partial) / output.name
        inner.mkdir()
        if layout == "reference":
            _write_reference(model, inner, pickled)
        else:
            _write_diffusers(model, inner)
        os.rename(inner, output)
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
        _write_folder(target, diffusers_unet_table(config.unet, inner).to_torch(unet), _unet_config(config))
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
    _write_folder(folder, tensors, _vae_config(config))


def _write_folder(folder: Path, tensors: Tensors, config: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    write_tensors(folder / "diffusion_pytorch_model.safetensors", tensors, {"format": "pt"})


def _unet_config(stage: StageConfig) -> dict[str, Any]:
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


def _vae_config(vae: VAEConfig) -> dict[str, Any]:
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
