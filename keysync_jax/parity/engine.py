"""The release's engine under our configs: settings of its YAML, and its modules beside ours."""

import math
from collections.abc import Iterable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from keysync_jax.config import Remat, StageConfig, VAEConfig
from keysync_jax.convert.table import Table
from keysync_jax.convert.unet import stage_table
from keysync_jax.convert.vae import engine_vae_table
from keysync_jax.errors import UserError
from keysync_jax.nn.functional import Make, bind, shapes
from keysync_jax.nn.layers import Record
from keysync_jax.nn.stages import stage
from keysync_jax.nn.vae import VAE

NORM_GROUPS, SCALE_FACTOR, LATENT_CHANNELS = 32, 0.18215, 4
"""What the release's code fixes, whatever its YAML says."""

FEW = 200_000_000
"""Parameters up to which a backward pass fits in memory whatever it keeps."""

AnyConfig = StageConfig | VAEConfig


def check(config: AnyConfig) -> None:
    """Refuses sizes that the release's code cannot have.

    Raises:
      UserError: one of these.
    """
    net, what = (config.unet, config.kind) if isinstance(config, StageConfig) else (config, "vae")
    widths, groups = net.block_out_channels, net.norm_groups
    channels = config.unet.out_channels if isinstance(config, StageConfig) else config.latent_channels
    if groups != NORM_GROUPS:
        raise UserError(f"{what}: the release's norms have {NORM_GROUPS} groups, this model's {groups}")
    if channels != LATENT_CHANNELS:
        raise UserError(
            f"{what}: the release's latents have {LATENT_CHANNELS} channels, this model's {channels}"
        )
    if any(width % widths[0] for width in widths):
        raise UserError(f"{what}: the release's widths are multiples of the first, this model's are {widths}")
    if isinstance(config, StageConfig):
        if config.unet.addition_embed_dim != config.unet.cross_attention_dim:
            raise UserError(
                f"{what}: in the release the time embedding takes the vectors that attention takes"
            )
    elif config.scale_factor != SCALE_FACTOR:
        raise UserError(
            f"vae: the release's latents are scaled by {SCALE_FACTOR}, this model's by {config.scale_factor}"
        )


def stage_settings(config: StageConfig, device: str, checkpointed: bool) -> dict[str, Any]:
    """Dotted paths below `model.params` of a sampling YAML -> values, for a stage of these sizes."""
    unet, first = config.unet, config.unet.block_out_channels[0]
    network = {
        "in_channels": unet.in_channels,
        "out_channels": unet.out_channels,
        "model_channels": first,
        "channel_mult": [width // first for width in unet.block_out_channels],
        "num_res_blocks": unet.layers_per_block,
        "attention_resolutions": [2**level for level in unet.attention_levels],
        "num_head_channels": unet.head_dim,
        "context_dim": unet.cross_attention_dim,
        "audio_dim": unet.addition_embed_dim,
        "use_checkpoint": checkpointed,
    }
    settings: dict[str, Any] = {f"network_config.params.{k}": v for k, v in network.items()}
    if config.kind == "interpolation":
        settings["network_wrapper.params.im_size"] = [8 * config.latent_size] * 2
    return settings | {
        "input_key": "latents",
        "sampler_config.params.device": device,
        **conditioner_settings(config),
    }


def conditioner_settings(config: StageConfig) -> dict[str, Any]:
    """The part that a training YAML's conditioner needs as well."""
    embedder = "conditioner_config.params.emb_models.{}.params.{}".format
    return {
        embedder(0, "load_encoder"): False,
        embedder(2, "linear_dim"): config.unet.cross_attention_dim,
        embedder(2, "audio_dim"): config.audio_dim,
    }


def training_settings(config: StageConfig) -> dict[str, Any]:
    """The same of a training YAML, its loss with the RGB term as in train_keyframe.sh."""
    loss = {"weight_pixel": 1.0, "what_pixel_losses": ["l2"], "lambda_lower": 1.0}
    settings = {f"loss_fn_config.params.{k}": v for k, v in loss.items()}
    return settings | conditioner_settings(config)


def vae_settings(config: VAEConfig) -> dict[str, Any]:
    """The same of the first stage."""
    first = config.block_out_channels[0]
    sizes = {
        "ch": first,
        "ch_mult": [width // first for width in config.block_out_channels],
        "num_res_blocks": config.layers_per_block,
        "z_channels": config.latent_channels,
    }
    halves = ("encoder_config", "decoder_config")
    return {f"first_stage_config.params.{half}.params.{k}": v for half in halves for k, v in sizes.items()}


@cache
def table_of(config: AnyConfig) -> tuple[Table, dict[str, tuple[int, ...]]]:
    """Rows of a network in the engine's layout, and the shapes of its parameters in ours."""
    _, abstract = shapes(make(config))
    wanted = {path: leaf.shape for path, leaf in abstract.items()}
    if isinstance(config, StageConfig):
        return stage_table(config, wanted), wanted
    return engine_vae_table(config, wanted), wanted


@cache
def torch_shapes(config: AnyConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a network's tensors in the engine's layout."""
    table, wanted = table_of(config)
    empty = np.int8(0)
    return {r.torch: r.op.to_torch(np.broadcast_to(empty, wanted[r.path])).shape for r in table.rows}


@cache
def is_large(config: AnyConfig) -> bool:
    """Whether a backward pass must compute parts again instead of keeping them, and be asked for less."""
    return sum(math.prod(shape) for shape in torch_shapes(config).values()) > FEW


def make(config: AnyConfig, dtype: Any = jnp.float32, remat: Remat = "none") -> Make:
    """Builds our network."""
    if isinstance(config, StageConfig):
        return lambda rngs: stage(config, dtype=dtype, remat=remat, rngs=rngs)
    return lambda rngs: VAE(config, dtype=dtype, remat=remat, rngs=rngs)


@cache
def blocks(config: AnyConfig) -> dict[str, str]:
    """Entry of each named intermediate of our network -> the release's module that computes it."""
    table, _ = table_of(config)
    inside = "unet." if isinstance(config, StageConfig) else ""
    modules = {}
    for name in _recorded(config):
        keys = [r.torch for r in table.rows if r.path.startswith(f"{inside}{name}.")]
        modules[f"block/{name}"] = _common(keys)
    found = list(modules.values())
    # The decoder's last convolution holds the one over time: its module's output is after both.
    return {k: m for k, m in modules.items() if not any(other.startswith(f"{m}.") for other in found)}


@cache
def layers(config: AnyConfig) -> dict[str, str]:
    """Entry of every layer that has parameters of its own -> the release's module; paths are ours.

    Of the VAE without the quant convolution: the release's engine has none, its inputs went through it.
    """
    rows = [r for r in table_of(config)[0].rows if not r.path.startswith("quant_conv.")]
    held = {r.torch.rpartition(".")[0] for r in rows}
    modules = {
        f"layer/{r.path.rpartition('.')[0]}": r.torch.rpartition(".")[0] for r in rows if "." in r.path
    }
    return {k: m for k, m in modules.items() if not any(other.startswith(f"{m}.") for other in held)}


def outside(config: AnyConfig) -> dict[str, str]:
    """The layers that are part of no block."""
    inside = [f"layer/{e.removeprefix('block/')}." for e in blocks(config)]
    inside += [f"layer/unet.{e.removeprefix('block/')}." for e in blocks(config)]
    return {k: m for k, m in layers(config).items() if not any(f"{k}.".startswith(b) for b in inside)}


def _recorded(config: AnyConfig) -> list[str]:
    """Names of the intermediates that our network records."""
    graphdef, abstract = shapes(make(config))

    def run(params: Any) -> Record:
        model, record = bind(graphdef, params), {}  # type: tuple[Any, Record]
        if isinstance(config, StageConfig):
            c, s, t = config.unet.out_channels, config.latent_size, config.frames
            audio = jnp.zeros((1, t, config.unet.cross_attention_dim))
            reference = jnp.zeros((1, 1 if config.kind == "keyframe" else 2, s, s, c))
            model(jnp.zeros((1, t, s, s, c)), jnp.zeros(1), audio, reference, record=record)
        else:
            side = 4 * config.factor
            model.encode(jnp.zeros((1, side, side, 3)), record)
            model.decode(jnp.zeros((1, 1, 4, 4, config.latent_channels)), record)
        return record

    return list(jax.eval_shape(run, abstract))


def _common(keys: Iterable[str]) -> str:
    """The longest dotted name that all keys are below of."""
    parts = [key.split(".")[:-1] for key in keys]
    alike = [column[0] for column in zip(*parts, strict=False) if len(set(column)) == 1]
    return ".".join(alike)
