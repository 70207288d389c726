"""A model directory to start training from: a VAE that was trained here, and untrained stages."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from keysync_jax.backend import computing
from keysync_jax.config import LogMelConfig, ModelConfig
from keysync_jax.data.records import Dataset
from keysync_jax.errors import UserError
from keysync_jax.files import check_new_folder
from keysync_jax.model import Network, model_folder, open_model, save_model
from keysync_jax.nn.functional import shapes
from keysync_jax.nn.vae import VAE
from keysync_jax.pipeline.latents import encode_posterior
from keysync_jax.tensorfile import TensorFile
from keysync_jax.train.autoencoder import FrameSamples
from keysync_jax.train.checkpoint import Checkpoints, read_config
from keysync_jax.train.config import TrainConfig, VAETrainConfig
from keysync_jax.train.inputs import check_data, read_inputs
from keysync_jax.train.start import Weights, random_weights
from keysync_jax.train.step import make_stage

SAMPLES = 256
"""Frames from which the spread of the latents is measured."""


def new_model(
    vae_run: str | Path,
    keyframe: TrainConfig,
    interpolation: TrainConfig,
    output: str | Path,
    average: bool = False,
    stages_from: str | Path | None = None,
) -> ModelConfig:
    """Makes a model directory of a VAE's run and two stages that know nothing of its latents yet.

    The stages' weights are random, or those of another model as far as the sizes agree: what a stage has
    learned of sound and movement serves it with another VAE too, and only the layers that read and write
    latents begin anew.

    Latents are given a standard deviation of 1 in each channel by a change of the VAE's own weights (see
    `normalised`), so its scale factor is 1.

    Args:
      vae_run: folder of a finished run of a `VAETrainConfig`; its last checkpoint is taken.
      keyframe, interpolation: settings of the stages' runs; their sizes, mask and guidance become the
        model's.
      output: must not exist yet.
      average: take the moving average of the VAE's weights instead of the weights.
      stages_from: the other model's directory.

    Raises:
      UserError: the run cannot be read, is not a VAE's, or the parts do not fit each other.
    """
    output, run = Path(output), Path(vae_run)
    check_new_folder(output)
    stages = {"keyframe": keyframe, "interpolation": interpolation}
    _check(stages)
    origins = {kind: "untrained" for kind in stages}
    tensors = {kind: random_weights(shapes(make_stage(c))[1], c.seed) for kind, c in stages.items()}
    if stages_from is not None:
        tensors, origins = _warm(tensors, model_folder(stages_from))
    config = read_config(run)
    if not isinstance(config, VAETrainConfig):
        raise UserError(f"{run}: is the run of a stage, not of a VAE")
    if config.decoder is not None:
        raise UserError(f"{run}: is the run of a small decoder; keysync export makes it a model's")
    with Checkpoints(run / "checkpoints", config.checkpoint, read_only=True) as checkpoints:
        step, weights = checkpoints.restore_weights(average)
    vae = dataclasses.replace(config.vae, scale_factor=1.0)
    weights = normalised(weights, latent_std(config, weights, _datasets(run, config)))
    model = ModelConfig(
        keyframe=keyframe.stage,
        interpolation=interpolation.stage,
        vae=vae,
        encoders={"logmel": LogMelConfig()},
        mask=keyframe.data.mask,
        guidance=keyframe.guidance,
        provenance={
            **origins,
            "vae": f"{run.absolute().name} step {step}{' moving average' if average else ''}",
        },
    )
    save_model(output, model, {**tensors, "vae": weights})
    return model


def _warm(tensors: dict[str, Weights], folder: Path) -> tuple[dict[str, Weights], dict[str, str]]:
    """Another model's stages where names and shapes agree, and what is said of each stage's origin."""
    model = open_model(folder, only=tensors)
    mixed, origins = {}, {}
    for kind, weights in tensors.items():
        file = TensorFile(folder / f"{kind}.safetensors")
        fitting = [path for path, x in weights.items() if path in file and file[path].shape == x.shape]
        if not fitting:
            raise UserError(f"{folder}: no tensor of its {kind} stage has the size that the config asks for")
        mixed[kind] = {**weights, **{path: np.asarray(file[path], np.float32) for path in fitting}}
        before = model.config.provenance.get(kind, "unknown")
        origins[kind] = f"untrained with this VAE, {len(fitting)} of {len(weights)} tensors from: {before}"
    return mixed, origins


def _check(stages: dict[str, TrainConfig]) -> None:
    for kind, config in stages.items():
        if config.stage.kind != kind:
            raise UserError(f"the config of the {kind} stage is that of a {config.stage.kind} stage")
        if config.audio_encoder != "logmel":
            raise UserError(
                f"the config of the {kind} stage asks for {config.audio_encoder} features, whose weights "
                "only keysync convert brings; a new model hears log-mel"
            )
        if config.init.kind == "svd":
            raise UserError(f"the config of the {kind} stage starts from SVD; a new model is random")
    first, second = stages.values()
    if first.data.mask != second.data.mask or first.guidance != second.guidance:
        raise UserError("the two stages' configs differ in mask or guidance; a model has one of each")


def _datasets(run: Path, config: VAETrainConfig) -> list[Dataset]:
    """The data of a VAE's run, which must still be what it was, as far as the run noted that."""
    datasets = [Dataset(path) for path in config.data.paths]
    if (inputs := read_inputs(run)) is not None:
        check_data(run, inputs, [dataset.sha256 for dataset in datasets], config.data.paths)
    return datasets


def latent_std(config: VAETrainConfig, weights: Weights, datasets: Sequence[Dataset]) -> np.ndarray:
    """Standard deviation of each latent channel over frames of the run's data, fp32 `[C]`."""
    samples = FrameSamples(config, datasets)
    frames = (samples(number).frame for number in range(min(SAMPLES, config.steps * config.batch_size)))
    graphdef, _ = shapes(lambda rngs: VAE(config.vae, rngs=rngs))
    with computing("fp32"):
        means = [posterior.mean for posterior in encode_posterior(Network(graphdef, weights), frames)]
    return np.concatenate(means).std(axis=(0, 1, 2))


def normalised(weights: Weights, std: np.ndarray) -> Weights:
    """A VAE whose latents are divided by `std`, channel by channel; what it decodes is unchanged.

    The encoder's last convolution is divided, the posterior's log-variance shifted with it, and the
    decoder's first convolution multiplied.

    Raises:
      UserError: the VAE has a quant convolution, whose place the change would have to take.
    """
    if any(path.startswith("quant_conv") for path in weights):
        raise UserError("a VAE with a quant convolution cannot be made into a new model here")
    kernel, bias = _names(weights, "encoder.conv_out")
    inner, _ = _names(weights, "decoder.conv_in")
    channels = len(std)
    moments = np.concatenate([1 / std, np.ones(channels)]).astype(np.float32)
    shift = np.concatenate([np.zeros(channels), -2 * np.log(std)]).astype(np.float32)
    return {
        **weights,
        kernel: weights[kernel] * moments,
        bias: weights[bias] * moments + shift,
        inner: weights[inner] * std[:, None].astype(np.float32),
    }


def _names(weights: Weights, layer: str) -> tuple[str, str]:
    """Paths of a convolution's kernel and bias."""
    found = sorted(path for path in weights if path.startswith(f"{layer}."))
    bias, kernel = (next(p for p in found if p.endswith(end)) for end in (".bias", ".kernel"))
    return kernel, bias
