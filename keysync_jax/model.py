"""A model on disk: a directory with `config.json` and one safetensors file a component.

`config.json` holds the sizes, the audio encoder of each stage, mask, guidance, provenance
and the SHA-256 of every file. Opening a model checks all of it before anything is computed.
"""

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from keysync_jax.config import (
    DecoderConfig,
    EncoderKind,
    LogMelConfig,
    ModelConfig,
    SpeechConfig,
    StageConfig,
    VAEConfig,
    encoder_name,
    from_dict,
    to_dict,
)
from keysync_jax.errors import UserError
from keysync_jax.files import fingerprint, new_folder, sha256_once, write_json
from keysync_jax.hub import Address, File, is_address, locate
from keysync_jax.nn.frame_decoder import FrameDecoder
from keysync_jax.nn.functional import shapes
from keysync_jax.nn.speech import SpeechModel
from keysync_jax.nn.stages import stage
from keysync_jax.nn.vae import VAE
from keysync_jax.tensorfile import TensorFile, write_tensors
from keysync_jax.typing import Params

FORMAT = "keysync-model-1"

DTYPES: dict[str, Any] = {"fp32": jnp.float32, "tf32": jnp.float32, "bf16": jnp.bfloat16}
"""Dtype of the arrays of a network, by `config.Dtype`."""

DEFAULT = Path(__file__).parent / "models" / "tiny"
"""The embedded model: small, trained in the synthetic world (docs/default_model.md)."""

Progress = Callable[[int], object]
"""Is told of each block of bytes that was read or written."""


class Network(NamedTuple):
    """A network ready to run: `nn.functional.bind(graphdef, params)` inside jit."""

    graphdef: nnx.GraphDef
    params: Params


def components(config: ModelConfig) -> list[str]:
    """Names of the components; the file of each is `NAME.safetensors`. Log-mel has no weights and no file."""
    speech = sorted(kind for kind, encoder in config.encoders.items() if isinstance(encoder, SpeechConfig))
    small = ["decoder_small"] if config.decoder_small else []
    return ["keyframe", "interpolation", "vae", *small, *(f"audio_{kind}" for kind in speech)]


@dataclass(frozen=True)
class Maker:
    """Builds the module of a component; two of the same sizes are equal.

    Attributes:
      vae: sizes of the VAE whose latents a small decoder takes.
    """

    sizes: StageConfig | VAEConfig | DecoderConfig | SpeechConfig
    dtype: Any
    vae: VAEConfig | None = None

    def __call__(self, rngs: nnx.Rngs) -> nnx.Module:
        if isinstance(self.sizes, StageConfig):
            return stage(self.sizes, dtype=self.dtype, rngs=rngs)
        if isinstance(self.sizes, VAEConfig):
            return VAE(self.sizes, dtype=self.dtype, rngs=rngs)
        if isinstance(self.sizes, DecoderConfig):
            assert self.vae is not None
            return FrameDecoder(self.sizes, self.vae, dtype=self.dtype, rngs=rngs)
        return SpeechModel(self.sizes, dtype=self.dtype, rngs=rngs)


def maker(config: ModelConfig, component: str, dtype: Any = jnp.float32) -> Maker:
    """What builds a component's module."""
    if component in ("keyframe", "interpolation"):
        return Maker(config.keyframe if component == "keyframe" else config.interpolation, dtype)
    if component == "vae":
        return Maker(config.vae, dtype)
    if component == "decoder_small":
        assert config.decoder_small is not None
        return Maker(config.decoder_small, dtype, config.vae)
    encoder = config.encoders[component.removeprefix("audio_")]
    assert isinstance(encoder, SpeechConfig)  # Log-mel is no component.
    return Maker(encoder, dtype)


@lru_cache(maxsize=32)
def _shapes(make: Maker) -> tuple[nnx.GraphDef, Mapping[str, jax.ShapeDtypeStruct]]:
    """A second or two at full size, and asked for at every opening and loading."""
    graphdef, found = shapes(make)
    return graphdef, MappingProxyType(found)


def network_shapes(config: ModelConfig, component: str, dtype: str = "fp32") -> Network:
    """A component as `Model.load` gives it, with the shapes and dtypes of its parameters in their place."""
    graphdef, found = _shapes(maker(config, component, DTYPES[dtype]))
    held = {
        name: jax.ShapeDtypeStruct(x.shape, DTYPES[dtype] if len(x.shape) > 1 else jnp.float32)
        for name, x in found.items()
    }
    return Network(graphdef, held)


def _trained_on(config: ModelConfig, component: str, hashes: Mapping[str, str]) -> dict[str, str]:
    """What a component's own file says of it, so that an edited `config.json` is noticed.

    Args:
      hashes: of the components that come before it.
    """
    metadata = {"component": component}
    if component == "decoder_small":
        metadata["vae"] = hashes["vae.safetensors"]
    if component in ("keyframe", "interpolation"):
        kind = config.keyframe if component == "keyframe" else config.interpolation
        metadata["audio_encoder"] = kind.audio_encoder
        encoder = config.encoders[kind.audio_encoder]
        if isinstance(encoder, LogMelConfig):
            metadata["audio_settings"] = encoder.sha256
    return metadata


@dataclass(frozen=True)
class Model:
    """An opened and checked model directory; components are loaded when asked for.

    Attributes:
      hashes: SHA-256 of each component by file name, as `config.json` has it; of a log-mel encoder's settings
        by `encoder_name`.
    """

    folder: Path
    config: ModelConfig
    hashes: Mapping[str, str]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over what the model computes: every setting but the provenance, and every component.

        Settings that no file's hash covers change it too (`vae.scale_factor`, `head_dim`, the guidance).
        """
        settings = to_dict(self.config)
        del settings["provenance"]
        return fingerprint({"settings": settings, "files": dict(self.hashes)})

    def load(self, component: str, dtype: str = "fp32") -> Network:
        """Loads a component onto the default device.

        Args:
          component: one of `components(config)`.
          dtype: of the computation, whose precision is the caller's to set (`backend.computing`). In bf16 the
            matrices are held in bf16 too; norms, biases and mixing factors stay fp32, so the result is that
            of casting at each use.

        Raises:
          UserError: the file has changed since the model was opened.
        """
        _check_bytes(self.folder / f"{component}.safetensors", self.hashes)
        graphdef, wanted = network_shapes(self.config, component, dtype)
        file = TensorFile(self.folder / f"{component}.safetensors")
        return Network(
            graphdef, {n: jax.device_put(np.asarray(file[n]).astype(x.dtype)) for n, x in wanted.items()}
        )

    def kept(self) -> "Model":
        """The same model, whose components stay loaded once they are; for many runs in one process."""
        return _KeptModel(self.folder, self.config, self.hashes)

    def load_encoder(self, kind: EncoderKind) -> Params:
        """Parameters of an audio encoder, fp32, for `audio_features`; log-mel has none."""
        has_weights = isinstance(self.config.encoders[kind], SpeechConfig)
        return self.load(f"audio_{kind}").params if has_weights else {}


class _KeptModel(Model):
    """Loads each component once."""

    @cached_property
    def _loaded(self) -> dict[tuple[str, str], Network]:
        return {}

    def load(self, component: str, dtype: str = "fp32") -> Network:
        if (component, dtype) not in self._loaded:
            self._loaded[component, dtype] = super().load(component, dtype)
        return self._loaded[component, dtype]


def open_model(
    folder: str | Path,
    progress: Progress | None = None,
    only: Collection[str] | None = None,
    allow_download: bool = False,
) -> Model:
    """Opens a model directory and checks all of it.

    Checked: the config (unknown keys, parts that do not fit each other), that every component is
    there, its bytes (SHA-256), its tensors' names and shapes, and the audio encoder that it was
    trained on. Bytes that this process has hashed already are not read again.

    Args:
      folder: the directory, or one on the hub, as `model_folder` takes it.
      progress: is told of each block of bytes that was hashed.
      only: the components that will be used; the files of the others are not looked at.
      allow_download: fetch what is on the hub and not in its client's cache.

    Raises:
      UserError: anything of that fails; the sentence names the file.
    """
    folder = model_folder(folder, allow_download)
    config, hashes = _read_config(folder / "config.json")
    for component in components(config) if only is None else only:
        path = folder / f"{component}.safetensors"
        if path.name not in hashes:
            raise UserError(f"{folder / 'config.json'}: has no hash of {path.name}")
        if not path.is_file():
            raise UserError(f"{path}: this component of the model is missing")
        _check_component(config, component, TensorFile(path), hashes)
        _check_bytes(path, hashes, progress)
    return Model(folder, config, hashes | _settings_hashes(config))


def model_folder(folder: str | Path, allow_download: bool = False) -> Path:
    """Where a model directory lies: the path itself, or that of the hub's copy in its client's cache.

    Args:
      folder: a path, or `hub:OWNER/NAME[@REVISION][/FOLDER]`. Of a model on the hub its config and components
        are fetched, all of one commit, and nothing else.
      allow_download: fetch what is not in the cache; without it, a file that is not there is an error.

    Raises:
      UserError: it is on the hub and cannot be had.
    """
    if not is_address(folder):
        return Path(folder)
    (found,) = locate([File(Address.parse(folder).below("config.json"), "config of a model")], allow_download)
    config, hashes = _read_config(found.path)
    names = [f"{component}.safetensors" for component in components(config)]
    locate([File(found.address.beside(n), n, sha256=hashes.get(n)) for n in names], allow_download)
    return found.path.parent


def model_bytes(folder: Path) -> int:
    """Bytes of the components, the total of `open_model`'s progress."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def save_model(
    folder: str | Path,
    config: ModelConfig,
    tensors: Mapping[str, Mapping[str, np.ndarray]],
    progress: Progress | None = None,
) -> None:
    """Writes a model directory; it appears under its name only when it is complete.

    Args:
      folder: must not exist yet.
      tensors: component -> path -> array. Dtypes are kept; arrays that are views of a mapped file are
        read one at a time.
      progress: is told of each component's bytes once they are written.
    """
    hashes: dict[str, str] = {}
    with new_folder(folder) as inner:
        for component in components(config):
            name = f"{component}.safetensors"
            hashes[name] = write_tensors(
                inner / name, tensors[component], _trained_on(config, component, hashes)
            )
            if progress is not None:
                progress((inner / name).stat().st_size)
        content = {"format": FORMAT, **to_dict(config), "files": hashes}
        write_json(inner / "config.json", content, indent=2)


def _read_config(path: Path) -> tuple[ModelConfig, dict[str, str]]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path.parent}: not a model directory (it has no config.json)") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise UserError(f"{path}: not the config of a model in the format {FORMAT}")
    hashes = content.pop("files", None)
    if not isinstance(hashes, dict):
        raise UserError(f"{path}: has no list of files")
    content.pop("fps", None)  # Models made before November 2026 name a rate, which nothing reads.
    try:
        return from_dict(ModelConfig, content, "config"), hashes
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _settings_hashes(config: ModelConfig) -> dict[str, str]:
    encoders = [encoder for encoder in config.encoders.values() if isinstance(encoder, LogMelConfig)]
    return {encoder_name(encoder.kind): encoder.sha256 for encoder in encoders}


def _check_bytes(path: Path, hashes: Mapping[str, str], progress: Progress | None = None) -> None:
    if sha256_once(path, progress) != hashes[path.name]:
        raise UserError(f"{path}: was altered after the model was made (its SHA-256 is not config.json's)")


def _check_component(
    config: ModelConfig, component: str, file: TensorFile, hashes: Mapping[str, str]
) -> None:
    for key, value in _trained_on(config, component, hashes).items():
        found = file.metadata.get(key)
        if key == "vae" and found != value:
            raise UserError(
                f"{file.path}: was distilled from another VAE than vae.safetensors; pictures would be wrong"
            )
        if key == "audio_encoder" and found != value:
            raise UserError(
                f"{file.path}: these weights were trained on {found} features, "
                f"config.json would feed them {value}; sync would be lost"
            )
        if key == "audio_settings" and found != value:
            raise UserError(
                f"{file.path}: these weights were trained on logmel features of other settings than "
                "config.json's; sync would be lost"
            )
        if found != value:
            raise UserError(f"{file.path}: holds the component {found!r}, not {value!r}")
    _, wanted = _shapes(maker(config, component))
    for name, shape in wanted.items():
        if name not in file.shapes:
            raise UserError(f"{file.path}: tensor {name!r} is missing")
        if tuple(file.shapes[name]) != shape.shape:
            raise UserError(
                f"{file.path}: tensor {name!r} has shape {list(file.shapes[name])}, "
                f"config.json says {list(shape.shape)}"
            )
    for name in file.shapes:
        if name not in wanted:
            raise UserError(f"{file.path}: tensor {name!r} is not part of this network")
