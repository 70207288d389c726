"""`keysync convert`: from PyTorch checkpoints to a model directory."""

import dataclasses
import logging
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from keysync_jax.config import MaskKind, ModelConfig, SpeechConfig, SpeechKind, StageConfig, StageKind
from keysync_jax.convert import released
from keysync_jax.convert.containers import Container, Tensors, open_tensors
from keysync_jax.convert.decoder import Choice, choose
from keysync_jax.convert.sources import gather
from keysync_jax.convert.speech import (
    speech_config_from_microsoft,
    speech_config_from_transformers,
    speech_table,
)
from keysync_jax.convert.table import Table
from keysync_jax.convert.unet import stage_config, stage_table
from keysync_jax.convert.vae import diffusers_vae_table, engine_vae_table, is_engine_layout, vae_config
from keysync_jax.errors import UserError
from keysync_jax.files import check_new_folder
from keysync_jax.hub import Say
from keysync_jax.model import Progress, components, maker, save_model
from keysync_jax.nn.functional import shapes

log = logging.getLogger(__name__)

RELEASED: dict[str, SpeechKind] = {"keyframe_dub.pt": "hubert", "interpolation_dub.pt": "wavlm"}
"""Files of the release and the encoder each was trained on, which nothing in them tells."""


@dataclass(frozen=True)
class AudioSource:
    """An audio encoder as the user names it: its kind, and its checkpoint as in `Checkpoints`."""

    kind: SpeechKind
    path: str | Path

    @classmethod
    def parse(cls, text: str) -> "AudioSource":
        """`"hubert=DIR"`."""
        kind, equals, path = text.partition("=")
        if kind == "logmel":
            raise UserError(
                f"{text!r} is in no PyTorch checkpoint: stages that take log-mel features are trained here; "
                "name the encoder that this one was trained on"
            )
        if kind not in typing.get_args(SpeechKind) or not equals or not path:
            kinds = ", ".join(typing.get_args(SpeechKind))
            raise UserError(
                f"{text!r} does not name an audio encoder; write KIND=PATH with KIND one of {kinds}"
            )
        return cls(typing.cast(SpeechKind, kind), path)


@dataclass(frozen=True)
class Checkpoints:
    """What a model is converted from: files or folders, or files on the hub (`hub:OWNER/NAME[@REV]/FILE`)."""

    keyframe: str | Path
    interpolation: str | Path
    vae: str | Path
    audio: Mapping[StageKind, AudioSource]

    @classmethod
    def released(cls) -> "Checkpoints":
        """The files of the PyTorch release on the hub, as `convert.released` pins them."""
        return cls(
            str(released.KEYFRAME.address),
            str(released.INTERPOLATION.address),
            str(released.VAE.address),
            {
                "keyframe": AudioSource("hubert", str(released.HUBERT.address)),
                "interpolation": AudioSource("wavlm", str(released.WAVLM.address)),
            },
        )

    def inputs(self) -> dict[str, str | Path]:
        """Component -> what it is converted from."""
        stages = {"keyframe": self.keyframe, "interpolation": self.interpolation, "vae": self.vae}
        return stages | _encoder_paths(self.audio)


def convert(
    checkpoints: Checkpoints,
    output: str | Path,
    head_dim: int = 64,
    mask: MaskKind = "box",
    progress: Progress | None = None,
    *,
    decoder: Choice = "stage",
    allow_download: bool = False,
    say: Say = log.info,
) -> ModelConfig:
    """Converts two stages, a VAE and their audio encoders to a model directory.

    Every tensor is accounted for before anything is written; dtypes are kept. A decoder that a stage's
    checkpoint carries is compared with the VAE's. The release decodes with the interpolation stage's, so that
    one becomes the model's where the two differ.

    Args:
      checkpoints: in any layout that `convert.containers` reads.
      output: the model directory, must not exist yet.
      head_dim: width of an attention head, which no checkpoint tells; 64 at full size.
      mask: strategy that the weights were trained with.
      progress: is told of bytes written.
      decoder: "vae" takes the VAE's decoder whatever the stages carry.
      allow_download: fetch what is on the hub and not in its client's cache.
      say: is told, a line each, of files to fetch and of the decoders.

    Raises:
      UserError: a file cannot be had or read, a tensor is missing, surplus or misshapen, parts do not fit.
    """
    output = Path(output)
    check_new_folder(output)
    _check_encoders(checkpoints)
    sources = gather(checkpoints.inputs(), allow_download, say)
    tensors = {component: open_tensors(source.path) for component, source in sources.items()}
    keyframe, interpolation = _stages(checkpoints, tensors, head_dim)
    config = ModelConfig(
        keyframe,
        interpolation,
        vae=vae_config(tensors["vae"], str(checkpoints.vae)),
        encoders={
            c.removeprefix("audio_"): _speech_config(c, tensors[c]) for c in tensors if c.startswith("audio_")
        },
        mask=mask,
        provenance={component: source.provenance() for component, source in sources.items()},
    )
    converted = {c: _converted(config, c, tensors[c]) for c in components(config)}
    chosen = choose(config.vae, converted["vae"], tensors["keyframe"], tensors["interpolation"], decoder)
    converted["vae"] |= chosen.weights
    if chosen.said:
        say(f"decoder: {chosen.said}")
        origins = config.provenance
        config = dataclasses.replace(
            config, provenance=origins | {"vae": f"{origins['vae']}; decoder: {chosen.said}"}
        )
    save_model(output, config, converted, progress)
    return config


def _encoder_paths(audio: Mapping[StageKind, AudioSource]) -> dict[str, str | Path]:
    paths: dict[str, str | Path] = {}
    for source in audio.values():
        if paths.setdefault(f"audio_{source.kind}", source.path) != source.path:
            raise UserError(
                f"both stages use {source.kind}, but from two checkpoints; give them the same one"
            )
    return paths


def _check_encoders(checkpoints: Checkpoints) -> None:
    """Refuses a file of the release with an encoder that it was not trained on."""
    stages: dict[StageKind, str | Path] = {"keyframe": checkpoints.keyframe}
    stages["interpolation"] = checkpoints.interpolation
    for kind, path in stages.items():
        encoder = checkpoints.audio[kind].kind
        trained_on = RELEASED.get(Path(path).name, encoder)
        if trained_on != encoder:
            raise UserError(
                f"{path}: the released weights of this name were trained on {trained_on} features, "
                f"not {encoder} (rename the file if these are your own)"
            )


def _stages(
    checkpoints: Checkpoints, tensors: Mapping[str, Tensors], head_dim: int
) -> tuple[StageConfig, StageConfig]:
    def config(kind: StageKind, path: str | Path) -> StageConfig:
        return stage_config(kind, tensors[kind], checkpoints.audio[kind].kind, head_dim, str(path))

    between = config("interpolation", checkpoints.interpolation)
    keys = config("keyframe", checkpoints.keyframe)
    # Only z_m has the latent's size; a keyframe network runs at any.
    return dataclasses.replace(keys, latent_size=between.latent_size), between


def _speech_config(component: str, tensors: Tensors) -> SpeechConfig:
    kind, source = component.removeprefix("audio_"), str(tensors.path)
    if tensors.container is Container.MICROSOFT:
        config = speech_config_from_microsoft(tensors.config, source)
    elif tensors.config:
        config = speech_config_from_transformers(tensors.config, source)
    else:
        raise UserError(
            f"{source}: the sizes of the encoder are not in it; give the folder with its config.json"
        )
    if config.kind != kind:
        raise UserError(f"{source}: this is a {config.kind} encoder, not {kind}")
    return config


def _converted(config: ModelConfig, component: str, tensors: Tensors) -> dict[str, np.ndarray]:
    _, abstract = shapes(maker(config, component))
    wanted = {name: leaf.shape for name, leaf in abstract.items()}
    return _table(config, component, tensors, wanted).to_jax(tensors, wanted, str(tensors.path))


def _table(
    config: ModelConfig, component: str, tensors: Tensors, wanted: dict[str, tuple[int, ...]]
) -> Table:
    if component == "vae":
        layout = engine_vae_table if is_engine_layout(tensors) else diffusers_vae_table
        return layout(config.vae, wanted)
    if component.startswith("audio_"):
        encoder = config.encoders[component.removeprefix("audio_")]
        assert isinstance(encoder, SpeechConfig)
        return speech_table(encoder, tensors.keys())
    return stage_table(config.keyframe if component == "keyframe" else config.interpolation, wanted)
