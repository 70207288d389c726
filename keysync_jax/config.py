"""Typed sizes and settings; every one is stored with the weights and checked when they are loaded.

A config is a frozen dataclass. `to_dict` and `from_dict` are its JSON form; `from_dict` refuses an
unknown, missing or mistyped key and names the nearest one it knows.
"""

import dataclasses
import difflib
import hashlib
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from keysync_jax.errors import UserError

SpeechKind = Literal["hubert", "wav2vec2", "wavlm"]
EncoderKind = Literal[SpeechKind, "logmel"]
StageKind = Literal["keyframe", "interpolation"]
MaskKind = Literal["box", "full", "heart", "mouth"]
Dtype = Literal["fp32", "tf32", "bf16"]
"""What a network computes in. fp32: full precision on every device. tf32: fp32 numbers, of which an
accelerator may round those that enter a product (to TF32 on NVIDIA's; a TPU splits them into three bf16
parts). bf16: matrices and activations in bf16, at the precision of the device."""
Remat = Literal["none", "block", "layer"]
"""What a backward pass computes again instead of keeping it: nothing; the inside of each resnet and
transformer; that, and of each layer of a transformer once more (least memory, one more forward pass)."""

LARGEST_SIZE = 1 << 20
"""Of a width, a kernel or a number of frames."""
MOST_LAYERS = 256
"""Of a network, of a level, or levels."""


def _check_sizes(config: Any, what: str, zero: tuple[str, ...] = ()) -> None:
    """Refuses whole numbers that no network has, before one is built of them: a file may say anything.

    Args:
      what: begins the sentence, e.g. `"the U-Net"`.
      zero: attributes that may be 0, or an empty tuple.

    Raises:
      UserError: names the attribute.
    """
    for spec in dataclasses.fields(config):
        if spec.type not in (int, tuple[int, ...]):
            continue
        name, value = spec.name, getattr(config, spec.name)
        numbers = value if isinstance(value, tuple) else (value,)
        least, most = 0 if name in zero else 1, MOST_LAYERS if "layers" in name else LARGEST_SIZE
        if not least <= len(numbers) <= MOST_LAYERS:
            raise UserError(f"{what}: {name} has {len(numbers)} entries, not {least} to {MOST_LAYERS}")
        for number in numbers:
            if not least <= number <= most:
                raise UserError(f"{what}: {name} is {number}, not {least} to {most}")


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of the video U-Net F_theta (SVD's; section 3.3 of the paper). Defaults: full size.

    Attributes:
      in_channels: noisy latent and condition together: 8 (keyframe) or 9 (interpolation).
      out_channels: channels of a latent.
      block_out_channels: width of each level.
      layers_per_block: resnets of a down block; an up block has one more.
      attention_levels: levels that have attention, by index.
      head_dim: width of an attention head; cannot be read from a checkpoint's shapes.
      cross_attention_dim: width of a context vector.
      addition_embed_dim: width of the per-frame vector that is added to the time embedding.
      norm_groups: groups of every group normalisation.
    """

    in_channels: int = 8
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    attention_levels: tuple[int, ...] = (0, 1, 2)
    head_dim: int = 64
    cross_attention_dim: int = 1024
    addition_embed_dim: int = 1024
    norm_groups: int = 32

    def __post_init__(self) -> None:
        _check_sizes(self, "a U-Net", zero=("attention_levels",))
        attended = [w for i, w in enumerate(self.block_out_channels) if i in self.attention_levels]
        # The middle block, at the last level's width, always has attention.
        for width in [*attended, self.block_out_channels[-1]]:
            if width % self.head_dim:
                raise UserError(
                    f"a U-Net width of {width} is not a multiple of the head size {self.head_dim}"
                )
        for width in self.block_out_channels:
            if width % self.norm_groups:
                raise UserError(
                    f"a U-Net width of {width} is not a multiple of the {self.norm_groups} norm groups"
                )

    @property
    def time_embed_dim(self) -> int:
        return 4 * self.block_out_channels[0]


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of SVD's VAE: the KL encoder and the temporal decoder. Defaults: full size.

    Attributes:
      quant_conv: whether a 1x1 convolution follows the encoder (diffusers' layout has one; the
        engine layout has none).
      scale_factor: stored latents are the posterior's values times this.
    """

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    norm_groups: int = 32
    quant_conv: bool = False
    scale_factor: float = 0.18215

    def __post_init__(self) -> None:
        _check_sizes(self, "a VAE")

    @property
    def factor(self) -> int:
        """Pixels to a latent cell, along each side."""
        return 2 ** (len(self.block_out_channels) - 1)


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of the small decoder, which is distilled from a VAE's. Defaults: full size.

    Attributes:
      block_out_channels: width of each level, as many as the VAE has.
      layers_per_block: resnets of a level.
    """

    block_out_channels: tuple[int, ...] = (64, 128, 256, 256)
    layers_per_block: int = 1
    norm_groups: int = 32

    def __post_init__(self) -> None:
        _check_sizes(self, "a small decoder")


@dataclass(frozen=True)
class StageConfig:
    """One of the two diffusion stages (section 3.3 of the paper).

    Attributes:
      audio_encoder: the encoder whose features these weights were trained on.
      audio_dim: width of that encoder's vectors.
      frames: T, frames of a network call.
      latent_size: side of the square latent.
    """

    kind: StageKind
    audio_encoder: EncoderKind
    unet: UNetConfig
    audio_dim: int = 768
    frames: int = 14
    latent_size: int = 64

    def __post_init__(self) -> None:
        _check_sizes(self, f"the {self.kind} stage")


Interval = tuple[float, float]
"""Lowest and highest noise level (sigma), both within."""


@dataclass(frozen=True)
class GuidanceConfig:
    """How samples are guided.

    Attributes:
      kind: "separated" (paper, eq. 9), "cfg" (the paper's baseline: both conditions dropped together)
        or "none".
      audio, identity: scales of the separated guidance.
      scale: of plain classifier-free guidance.
      audio_interval, identity_interval, scale_interval: noise levels at which each scale holds; at others it
        is 1, and branches that cancel are not computed. None: at all, as the paper does.
    """

    kind: Literal["separated", "cfg", "none"] = "separated"
    audio: float = 5.0
    identity: float = 2.0
    scale: float = 2.0
    audio_interval: Interval | None = None
    identity_interval: Interval | None = None
    scale_interval: Interval | None = None

    def __post_init__(self) -> None:
        for name in ("audio_interval", "identity_interval", "scale_interval"):
            interval = getattr(self, name)
            if interval is not None and not 0 <= interval[0] <= interval[1]:
                raise UserError(
                    f"guidance.{name} is {interval[0]:g} to {interval[1]:g}, not from a noise level up to "
                    "one as high or higher"
                )

    def within(self, audio: Interval | None, identity: Interval | None) -> "GuidanceConfig":
        """The same in intervals of the noise level; plain guidance, of one scale, takes the audio's."""
        return dataclasses.replace(
            self, audio_interval=audio, identity_interval=identity, scale_interval=audio
        )


@dataclass(frozen=True)
class SpeechConfig:
    """Sizes of one pretrained speech encoder, under transformers' names. Defaults: HuBERT-base.

    Attributes:
      kind: which encoder; WavLM alone has a relative position bias.
      hidden_size: D, width of an output vector.
      intermediate_size: width inside the feed-forward part of a layer.
      conv_dim, conv_kernel, conv_stride: channels, kernel and stride of every front-end convolution.
      num_conv_pos_embeddings: kernel of the convolution that encodes positions.
      num_conv_pos_embedding_groups: its groups.
      num_buckets, max_bucket_distance: of the relative position bias, in buckets and in vectors.
      normalise_wave: the encoder expects a wave of zero mean and unit variance over the whole clip.
      layer_norm_eps: of every layer normalisation.
    """

    kind: SpeechKind
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    conv_dim: tuple[int, ...] = (512, 512, 512, 512, 512, 512, 512)
    conv_kernel: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    conv_stride: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    conv_bias: bool = False
    num_conv_pos_embeddings: int = 128
    num_conv_pos_embedding_groups: int = 16
    num_buckets: int = 320
    max_bucket_distance: int = 800
    normalise_wave: bool = True
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        _check_sizes(self, self.kind, zero=("num_hidden_layers",))
        if not len(self.conv_dim) == len(self.conv_kernel) == len(self.conv_stride) >= 1:
            raise UserError(f"{self.kind}: conv_dim, conv_kernel and conv_stride must have one entry a layer")
        for what, parts in (
            ("heads", self.num_attention_heads),
            ("groups", self.num_conv_pos_embedding_groups),
        ):
            if self.hidden_size % parts:
                raise UserError(
                    f"{self.kind}: the width {self.hidden_size} is not a multiple of its {parts} {what}"
                )

    @property
    def hop(self) -> int:
        """Samples from one output vector to the next."""
        return math.prod(self.conv_stride)

    @property
    def receptive_field(self) -> int:
        """Samples that the front end reads for one output vector."""
        field, hop = 1, 1
        for kernel, stride in zip(self.conv_kernel, self.conv_stride, strict=True):
            field += (kernel - 1) * hop
            hop *= stride
        return field

    def vectors(self, samples: int) -> int:
        """Output vectors of a wave of this many samples."""
        return max(0, (samples - self.receptive_field) // self.hop + 1)


FFT_SPACING_HZ = 31.25
"""From one frequency to the next of the spectra under log-mel: 512 samples at 16 kHz."""


@dataclass(frozen=True)
class LogMelConfig:
    """The audio encoder without weights: log-mel spectra (`pipeline.log_mel`), for stages trained on them.

    Attributes:
      bands: mel bands of a vector; HTK's mel scale.
      context: vectors on each side that are stacked onto a vector.
      lowest_hz, highest_hz: outer edges of the first and the last band.
      floor: power that is added before the logarithm. White noise has its variance as power in every band.
      mean, std: of the log power of speech, about; vectors are (log power - mean) / std. Constants, not a
        clip's own moments: silence stays recognisable as silence.
    """

    kind: Literal["logmel"] = "logmel"
    bands: int = 32
    context: int = 5
    lowest_hz: float = 60.0
    highest_hz: float = 7600.0
    floor: float = 1e-8
    mean: float = -10.0
    std: float = 5.0

    def __post_init__(self) -> None:
        if self.bands < 1 or self.context < 0:
            raise UserError(f"logmel: {self.bands} bands with a context of {self.context} are no vector")
        _check_sizes(self, "logmel", zero=("context",))
        if not 0 <= self.lowest_hz < self.highest_hz <= 8000:
            raise UserError(
                f"logmel: bands from {self.lowest_hz:g} to {self.highest_hz:g} Hz do not lie within 0 to 8000"
            )
        if not (self.floor > 0 and self.std > 0 and math.isfinite(self.mean)):
            raise UserError("logmel: floor and std must be positive, and mean a number")
        if self.edges_hz[2] - self.edges_hz[0] <= FFT_SPACING_HZ:
            raise UserError(
                f"logmel: {self.bands} bands are too many; the first would be narrower than the "
                f"{FFT_SPACING_HZ} Hz that the spectrum resolves"
            )

    @property
    def edges_hz(self) -> tuple[float, ...]:
        """Edges of the bands, `bands` + 2; band b rises from edge b to b + 1 and falls to b + 2.

        They are equally far apart on HTK's mel scale, 2595 log10(1 + f / 700).
        """
        lowest, highest = (math.log10(1 + f / 700) for f in (self.lowest_hz, self.highest_hz))
        step = (highest - lowest) / (self.bands + 1)
        return tuple(700 * (10 ** (lowest + i * step) - 1) for i in range(self.bands + 2))

    @property
    def hidden_size(self) -> int:
        """D, width of an output vector."""
        return self.bands * (2 * self.context + 1)

    @property
    def sha256(self) -> str:
        """Stands for the SHA-256 of the file that this encoder does not have: that of its settings."""
        settings = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        numbers = {name: float(value) for name, value in settings.items() if name != "kind"}
        return hashlib.sha256(repr(numbers).encode()).hexdigest()


def check_levels(decoder: DecoderConfig, vae: VAEConfig) -> None:
    """Refuses a small decoder that makes pictures of another size than the VAE does.

    Raises:
      UserError: it has another number of levels.
    """
    own, whole = len(decoder.block_out_channels), len(vae.block_out_channels)
    if own != whole:
        raise UserError(
            f"the small decoder has {own} levels, the VAE {whole}; its pictures would differ in size"
        )


def check_sigmas(sigmas: tuple[float, ...], what: str) -> None:
    """Refuses noise levels that do not fall towards 0.

    Raises:
      UserError: names `what` they are.
    """
    if any(not sigma > 0 for sigma in sigmas) or list(sigmas) != sorted(set(sigmas), reverse=True):
        levels = ", ".join(f"{sigma:g}" for sigma in sigmas)
        raise UserError(f"{what}: {levels} are not noise levels above 0, the highest first")


EncoderConfig = SpeechConfig | LogMelConfig


def encoder_name(kind: EncoderKind) -> str:
    """Key in `Model.hashes` of what an audio encoder is: its file, or `audio_logmel` for its settings."""
    return f"audio_{kind}" if kind == "logmel" else f"audio_{kind}.safetensors"


@dataclass(frozen=True)
class ModelConfig:
    """Everything that a model directory's `config.json` says, the files' hashes apart.

    Attributes:
      encoders: sizes of every audio encoder in the directory, by kind; each stage names its own.
      mask: strategy of the masks that the weights were trained with.
      guidance: scales to sample with.
      steps: number that the align-your-steps schedule is asked for (10 takes 11 Euler steps).
      decoder_small: sizes of the small decoder; None: the model has none.
      sigmas: noise levels that the stages were distilled for, highest first, without a last 0; empty: those
        of the schedule.
      provenance: where each component came from, for the reader.
    """

    keyframe: StageConfig
    interpolation: StageConfig
    vae: VAEConfig
    encoders: dict[str, EncoderConfig]
    mask: MaskKind = "box"
    guidance: GuidanceConfig = GuidanceConfig()
    steps: int = 10
    decoder_small: DecoderConfig | None = None
    sigmas: tuple[float, ...] = ()
    provenance: dict[str, str] = field(default_factory=dict)

    def stage(self, kind: StageKind) -> StageConfig:
        return self.keyframe if kind == "keyframe" else self.interpolation

    def __post_init__(self) -> None:
        """Refuses parts that do not fit each other."""
        check_sigmas(self.sigmas, "sigmas")
        if self.decoder_small is not None:
            check_levels(self.decoder_small, self.vae)
        for name, encoder in self.encoders.items():
            if encoder.kind != name:
                raise UserError(f"the {name} encoder holds the settings of a {encoder.kind} encoder")
        for kind in typing.get_args(StageKind):
            stage = self.stage(kind)
            if stage.kind != kind:
                raise UserError(f"the {kind} stage holds the sizes of the {stage.kind} stage")
            if stage.audio_encoder not in self.encoders:
                raise UserError(
                    f"the {kind} stage was trained on {stage.audio_encoder} features, but the model has only "
                    f"{', '.join(sorted(self.encoders)) or 'no audio encoder'}"
                )
            width = self.encoders[stage.audio_encoder].hidden_size
            if stage.audio_dim != width:
                raise UserError(
                    f"the {kind} stage takes audio vectors of {stage.audio_dim}, "
                    f"the {stage.audio_encoder} encoder makes {width}"
                )
            if stage.unet.out_channels != self.vae.latent_channels:
                raise UserError(
                    f"the {kind} stage makes {stage.unet.out_channels} latent channels, "
                    f"the VAE takes {self.vae.latent_channels}"
                )
        for name in ("latent_size", "frames"):
            pair = getattr(self.keyframe, name), getattr(self.interpolation, name)
            if pair[0] != pair[1]:
                raise UserError(f"the stages differ in {name}: keyframe {pair[0]}, interpolation {pair[1]}")

    @property
    def crop_size(self) -> int:
        """Side of the square face crop in pixels."""
        return self.keyframe.latent_size * self.vae.factor


T = TypeVar("T")


def to_dict(config: Any) -> dict[str, Any]:
    """The JSON form of a config; tuples become lists."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def from_dict(cls: type[T], values: Any, where: str) -> T:
    """A config from its JSON form.

    Args:
      where: what an error calls this place, e.g. `"config.json: keyframe"`.

    Raises:
      UserError: an unknown key (the nearest known one is named), a missing key, a wrong type.
    """
    return typing.cast(T, _value(cls, values, where))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return value


def _dataclass(cls: Any, values: dict[str, Any], where: str) -> Any:
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            raise UserError(f"{where}: unknown key {key!r}{nearest(key, fields)}")
    for name, spec in fields.items():
        required = spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise UserError(f"{where}: key {name!r} is missing")
    return cls(**{k: _value(hints[k], v, f"{where}.{k}") for k, v in values.items()})


def _value(kind: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return _dataclass(kind, value, where)
    if origin is Literal and value in args:
        return value
    if origin is tuple and isinstance(value, list | tuple):
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else args
        if len(kinds) == len(value):
            return tuple(_value(k, v, where) for k, v in zip(kinds, value, strict=True))
    if origin is dict and isinstance(value, dict):
        return {k: _value(args[1], v, f"{where}.{k}") for k, v in value.items()}
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _value(_chosen(args, value, where), value, where)
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(kind, type) and isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    wanted = " or ".join(map(repr, args)) if origin is Literal else getattr(kind, "__name__", str(kind))
    raise UserError(f"{where}: {value!r} is not {wanted}")


def _chosen(union: tuple[Any, ...], value: Any, where: str) -> Any:
    """The member of a union that a value is read as: of several dataclasses, that of the value's `kind`."""
    members = [member for member in union if member is not type(None)]
    if len(members) == 1:
        return members[0]
    if not isinstance(value, dict):
        raise UserError(f"{where}: {value!r} is not {' or '.join(member.__name__ for member in members)}")
    if "kind" not in value:
        raise UserError(f"{where}: key 'kind' is missing")
    kinds = {kind: m for m in members for kind in typing.get_args(typing.get_type_hints(m)["kind"])}
    if value["kind"] not in tuple(kinds):
        known = " or ".join(map(repr, kinds))
        raise UserError(f"{where}.kind: {value['kind']!r} is not {known}{nearest(str(value['kind']), kinds)}")
    return kinds[value["kind"]]


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """`", did you mean 'x'?"` for the nearest known name, or nothing."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f", did you mean {found[0]!r}?" if found else ""
