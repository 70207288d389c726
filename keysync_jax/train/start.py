"""Where the weights of a new run come from: SVD's or KeySync's checkpoint, or random numbers."""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from keysync_jax.config import StageConfig, VAEConfig, to_dict
from keysync_jax.convert.containers import Tensors, open_tensors
from keysync_jax.convert.lpips import load_lpips, lpips_config, lpips_shapes
from keysync_jax.convert.table import Row, Table, under
from keysync_jax.convert.unet import UNET_PREFIX, diffusers_key, unet_rows
from keysync_jax.convert.vae import diffusers_vae_table, engine_vae_table, is_engine_layout, vae_config
from keysync_jax.errors import UserError
from keysync_jax.model import DTYPES, Network, model_folder, open_model
from keysync_jax.nn.functional import shapes
from keysync_jax.nn.lpips import LPIPSConfig
from keysync_jax.nn.stages import stage
from keysync_jax.nn.vae import VAE
from keysync_jax.tensorfile import TensorFile
from keysync_jax.train.config import AnyTrainConfig, TrainConfig
from keysync_jax.train.hosts import decided

Weights = dict[str, np.ndarray]
"""Parameters of a network, path -> float array in memory, or in a mapped file that is read later."""


def first_weights(config: TrainConfig) -> Weights:
    """The stage's weights before the first step, as `config.init` says; random ones follow from the seed.

    Raises:
      UserError: the checkpoint cannot be read, or is not of this network.
    """
    kind = config.init.kind
    if kind == "none":
        return random_weights(shapes(lambda rngs: stage(config.stage, rngs=rngs))[1], config.seed)
    if not config.init.path:
        raise UserError(
            f"init.path is empty: init.kind={kind} needs a checkpoint; give --config.init.path=PATH"
        )
    if kind == "svd":
        return _from_svd(config, Path(config.init.path))
    return _from_keysync(config.stage, model_folder(config.init.path))


def random_weights(wanted: Mapping[str, jax.ShapeDtypeStruct], seed: int) -> Weights:
    """Parameters of a network that nobody trained, a function of the seed."""
    rng = np.random.default_rng(seed)
    return {path: _random(path, leaf.shape, rng) for path, leaf in wanted.items()}


def load_vae(config: TrainConfig) -> Network:
    """The frozen VAE of the pixel loss and the previews, in the run's compute dtype (numpy arrays).

    Raises:
      UserError: its checkpoint cannot be read, or is of other sizes than `config.vae`.
    """
    sizes, weights = _vae_weights(config)
    graphdef, wanted = shapes(
        lambda rngs: VAE(sizes, dtype=DTYPES[config.dtype], remat=config.remat, rngs=rngs)
    )
    held = {path: _held(config, leaf) for path, leaf in wanted.items()}
    return Network(graphdef, {p: np.asarray(weights[p]).astype(held[p].dtype) for p in wanted})


def load_perceptual(config: TrainConfig) -> Network | None:
    """The frozen LPIPS network, where it is the pixel loss (numpy arrays).

    Raises:
      UserError: the files of its weights are not given, or cannot be read.
    """
    if config.loss.pixel != "lpips":
        return None
    if not config.init.lpips_trunk or not config.init.lpips_heads:
        raise UserError("loss.pixel=lpips needs its weights: give init.lpips_trunk and init.lpips_heads")
    network = load_lpips(config.init.lpips_trunk, config.init.lpips_heads, config.dtype)
    return Network(network.graphdef, {path: np.asarray(x) for path, x in network.params.items()})


def vae_shapes(config: AnyTrainConfig) -> Network:
    """The same VAE from shapes alone."""
    graphdef, wanted = shapes(
        lambda rngs: VAE(config.vae, dtype=DTYPES[config.dtype], remat=config.remat, rngs=rngs)
    )
    return Network(graphdef, {path: _held(config, leaf) for path, leaf in wanted.items()})


def perceptual_shapes(config: TrainConfig) -> Network | None:
    """The same LPIPS from shapes alone: that of the trunk's file where one is given, else VGG16's.

    Raises:
      UserError: the trunk's file cannot be read.
    """
    if config.loss.pixel != "lpips":
        return None
    trunk = config.init.lpips_trunk
    return lpips_shapes(lpips_config(open_tensors(trunk)) if trunk else LPIPSConfig(), config.dtype)


def _held(config: AnyTrainConfig, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """As `Model.load` holds a parameter: matrices in the compute dtype, everything else in fp32."""
    return jax.ShapeDtypeStruct(leaf.shape, DTYPES[config.dtype] if len(leaf.shape) > 1 else jnp.float32)


def stage_shapes(config: StageConfig) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every parameter of a stage."""
    return {path: leaf.shape for path, leaf in shapes(lambda rngs: stage(config, rngs=rngs))[1].items()}


def _from_keysync(config: StageConfig, folder: Path) -> Weights:
    # Its hash is checked by one process for all: each would read the whole file.
    decided(lambda: bool(open_model(folder, only=[config.kind])))
    model = open_model(folder, only=())
    _check_same_sizes(to_dict(model.config.stage(config.kind)), to_dict(config), f"{folder}: {config.kind}")
    file = TensorFile(folder / f"{config.kind}.safetensors")
    return dict(file)


def _check_same_sizes(found: dict[str, object], wanted: dict[str, object], where: str) -> None:
    """Names the first setting in which a checkpoint and the config differ."""
    for key, value in wanted.items():
        there = found[key]
        if isinstance(value, dict) and isinstance(there, dict):
            _check_same_sizes(there, value, f"{where}.{key}")
        elif there != value:
            lost = "; sync would be lost" if key == "audio_encoder" else ""
            raise UserError(f"{where}.{key} is {there!r} there, the config says {value!r}{lost}")


def _from_svd(config: TrainConfig, path: Path) -> Weights:
    """SVD's U-Net, and new tensors for what it does not have.

    New are the first layer of the per-frame embedding (SVD's takes three numbers in its place), for
    interpolation the 9-channel input convolution, and what lies outside the U-Net: the audio
    projection, and z_m, which is zero.
    """
    tensors = open_tensors(_component_folder(path, "unet"))
    wanted = stage_shapes(config.stage)
    inner = {p.removeprefix("unet."): s for p, s in wanted.items() if p.startswith("unet.")}
    new = {"add_embedding.linear_1.kernel"} | (
        {"conv_in.kernel"} if config.stage.kind == "interpolation" else set()
    )
    kept = {p: s for p, s in inner.items() if p not in new}
    table = _svd_table(config.stage, tensors, inner, new)
    weights = {f"unet.{p}": x.astype(np.float32) for p, x in table.to_jax(tensors, kept, str(path)).items()}
    rng = np.random.default_rng(config.seed)
    added = {p: _torch_default(p, wanted, rng) for p in sorted(wanted) if p not in weights}
    return {p: weights[p] if p in weights else added[p] for p in wanted}


def _svd_table(
    config: StageConfig, tensors: Tensors, inner: dict[str, tuple[int, ...]], new: set[str]
) -> Table:
    """SVD's rows in the layout at hand; its own versions of the new tensors are surplus, as are its VAE's."""
    rows = unet_rows(config.unet, inner)
    if any(key.startswith(UNET_PREFIX) for key in tensors):
        rows, other = list(under(UNET_PREFIX, "", rows)), [rf"(?!{re.escape(UNET_PREFIX)})"]
    else:
        rows, other = [Row(diffusers_key(r.path), r.path, r.op) for r in rows], []
    own = [re.escape(r.torch) + "$" for r in rows if r.path in new]
    return Table([r for r in rows if r.path not in new], ignore=(*other, *own))


def _torch_default(path: str, wanted: dict[str, tuple[int, ...]], rng: np.random.Generator) -> np.ndarray:
    """A new tensor as PyTorch makes it: uniform within 1 / sqrt(fan-in); z_m zero.

    Args:
      wanted: path -> shape; a bias takes the fan-in of its kernel.
    """
    shape = wanted[path]
    if path == "z_m":
        return np.zeros(shape, np.float32)
    bound = 1 / math.sqrt(math.prod(wanted[path.replace(".bias", ".kernel")][:-1]))
    return rng.uniform(-bound, bound, shape).astype(np.float32)


def _vae_weights(config: TrainConfig) -> tuple[VAEConfig, Weights]:
    """The VAE's sizes and weights; its quant convolution is as the checkpoint has it."""
    if not config.init.vae:
        if config.init.kind != "none":
            raise UserError(
                "init.vae is empty: the pixel loss and the previews need the VAE's weights; "
                "give --config.init.vae=PATH, or set loss.pixel=none"
            )
        return config.vae, random_weights(vae_shapes(config).params, config.seed)
    path = model_folder(config.init.vae)
    if (path / "vae.safetensors").is_file():
        model = open_model(path, only=["vae"])
        _check_same_vae(path, model.config.vae, config.vae)
        return model.config.vae, dict(TensorFile(path / "vae.safetensors"))
    tensors = open_tensors(_component_folder(path, "vae"))
    sizes = vae_config(tensors, str(path))
    _check_same_vae(path, sizes, config.vae)
    wanted = {p: leaf.shape for p, leaf in shapes(lambda rngs: VAE(sizes, rngs=rngs))[1].items()}
    layout = engine_vae_table if is_engine_layout(tensors) else diffusers_vae_table
    return sizes, layout(sizes, wanted).to_jax(tensors, wanted, str(path))


def _random(path: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """A parameter of a network that nobody trained: scale 1, bias 0, kernels of variance 1 / fan-in.

    Made without JAX: compiling the modules' own initialisers takes longer than a short run does.
    """
    if path.endswith(".kernel"):
        return rng.standard_normal(shape, np.float32) / np.float32(math.sqrt(math.prod(shape[:-1])))
    return np.ones(shape, np.float32) if path.endswith(".scale") else np.zeros(shape, np.float32)


def _check_same_vae(path: Path, found: VAEConfig, wanted: VAEConfig) -> None:
    # Only the encoder has a quant convolution, and training decodes alone.
    same = dataclasses.replace(found, quant_conv=wanted.quant_conv)
    _check_same_sizes(to_dict(same), to_dict(wanted), f"{path}: vae")


def _component_folder(path: Path, name: str) -> Path:
    """A model of a pipeline's folder, where the path is that of a whole pipeline."""
    return path / name if (path / "model_index.json").is_file() else path
