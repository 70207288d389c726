"""From a finished run to a model directory."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from keysync_jax.config import ModelConfig, StageConfig, StageKind
from keysync_jax.data.records import MANIFEST, Dataset
from keysync_jax.errors import UserError
from keysync_jax.files import check_new_folder, is_remote
from keysync_jax.model import DTYPES, Model, components, open_model, save_model
from keysync_jax.tensorfile import TensorFile
from keysync_jax.train.checkpoint import Checkpoints, read_config
from keysync_jax.train.config import AnyTrainConfig, TrainConfig, VAETrainConfig
from keysync_jax.train.fits import check_fits
from keysync_jax.train.inputs import read_inputs
from keysync_jax.train.places import run_folder

Tensors = Mapping[str, Any]
"""Path -> array: in memory, in a mapped file, or a `StoredArray`; they are written one by one."""


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
    configs, decoder = _run_configs([run_folder(run) for run in runs])
    rest = open_model(base)
    model = _model_config(rest, configs)
    provenance, trained = dict(rest.config.provenance), dict[str, Tensors]()
    for kind, (folder, config) in configs.items():
        _check_fits_base(folder, config, rest)
        step, trained[kind] = _weights(folder, config, average)
        provenance[kind] = _made(folder, step, average) + _teacher(folder, config)
    if decoder is not None:
        folder, small = decoder
        _check_decoder_fits_base(folder, small, rest)
        step, trained["decoder_small"] = _weights(folder, small, average)
        provenance["decoder_small"] = _made(folder, step, average)
        model = dataclasses.replace(model, decoder_small=small.decoder)
    names = components(model)
    model = dataclasses.replace(model, provenance={n: s for n, s in provenance.items() if n in names})
    untrained = {n: TensorFile(rest.folder / f"{n}.safetensors") for n in names if n not in trained}
    tensors: dict[str, Tensors] = {**untrained, **trained}
    save_model(output, model, {name: _rounded(part, dtype) for name, part in tensors.items()})
    return model


def _name(folder: Path) -> str:
    return folder.name if is_remote(folder) else folder.absolute().name


def _rounded(tensors: Tensors, dtype: str) -> Tensors:
    if dtype == "fp32":
        return tensors
    return {path: x.astype(DTYPES[dtype]) if x.ndim > 1 else x for path, x in tensors.items()}


def _made(folder: Path, step: int, average: bool) -> str:
    return f"{_name(folder)} step {step}{' moving average' if average else ''}"


def _run_configs(
    runs: Sequence[Path],
) -> tuple[dict[StageKind, tuple[Path, TrainConfig]], tuple[Path, VAETrainConfig] | None]:
    """The runs of stages, and that of a small decoder where there is one."""
    configs: dict[StageKind, tuple[Path, TrainConfig]] = {}
    decoder: tuple[Path, VAETrainConfig] | None = None
    for folder in runs:
        config = read_config(folder)
        if not isinstance(config, TrainConfig):
            if config.decoder is None:
                raise UserError(f"{folder}: is the run of a VAE; keysync init makes a model of it")
            if decoder is not None:
                raise UserError(f"{folder}: a second run of a small decoder; a model has one")
            decoder = folder, config
            continue
        kind = config.stage.kind
        if kind in configs:
            raise UserError(f"{folder}: a second run of the {kind} stage; give one run of each stage")
        configs[kind] = folder, config
    return configs, decoder


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
    guidances = {config.guidance for _, config in configs.values()} or {rest.config.guidance}
    if len(guidances) != 1:
        raise UserError("the two runs have different settings of guidance; a model has one")
    grids = {() if config.distill is None else config.distill.grid for _, config in configs.values()}
    if len(configs) < len(stages):
        grids.add(rest.config.sigmas)
    if len(grids) != 1:
        raise UserError(
            "the two stages are not for the same noise levels; a model has one table: export the runs "
            "of both stages' students together, or with a base that has the other one"
        )
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
        sigmas=grids.pop(),
    )


def _teacher(folder: Path, config: TrainConfig) -> str:
    """What is said of a student's teacher: the fingerprint of its model directory."""
    inputs = read_inputs(folder)
    if config.distill is None or inputs is None:
        return ""
    return f", student of {inputs.networks['teacher']}"


def _check_fits_base(folder: Path, config: TrainConfig, rest: Model) -> None:
    sizes = dataclasses.replace(rest.config.vae, quant_conv=config.vae.quant_conv)
    if sizes != config.vae:
        raise UserError(f"{folder}: was trained for a VAE of other sizes than that of {rest.folder}")
    if (inputs := read_inputs(folder)) is None:
        _check_data_fits_base(config, rest)
        return
    for data in inputs.data:
        for file, sha256 in data.prepared_with.items():
            if rest.hashes.get(file, sha256) != sha256:
                raise UserError(
                    f"{folder}: its data was prepared with another {file} than that of {rest.folder}"
                )


def _check_data_fits_base(config: TrainConfig, rest: Model) -> None:
    """The same of a run that did not note what it read: what lies in `data.paths` now is asked."""
    for path in map(Path, config.data.paths):
        # A dataset that is not here any more cannot be asked which files it was prepared with.
        if (path / MANIFEST).is_file():
            check_fits(Dataset(path), config, rest.hashes)


def _check_decoder_fits_base(folder: Path, config: VAETrainConfig, rest: Model) -> None:
    inputs = read_inputs(folder)
    known = None if inputs is None else inputs.networks.get("VAE")
    if known != rest.hashes["vae.safetensors"]:
        raise UserError(
            f"{folder}: this small decoder was distilled from another VAE than that of {rest.folder}; its "
            "pictures would be wrong"
        )


def _weights(folder: Path, config: AnyTrainConfig, average: bool) -> tuple[int, Tensors]:
    if not (folder / "checkpoints").is_dir():
        raise UserError(f"{folder}: the run has no checkpoint yet")
    with Checkpoints(folder / "checkpoints", config.checkpoint, read_only=True) as checkpoints:
        return checkpoints.stored_weights(average)
