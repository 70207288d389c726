"""Rows of SVD's VAE in the engine's layout and in diffusers'."""

import itertools
import re
from collections.abc import Mapping

import numpy as np

from keysync_jax.config import VAEConfig
from keysync_jax.convert.table import CONV1X1, CONV2D, CONV_TIME, LINEAR, Op, Row, Table, affine, norm, under
from keysync_jax.convert.unet import CheckpointShapes, Shapes, diffusers_key, present

ENGINE_PREFIX = "first_stage_model."


def _resnet_layers(path: str, names: tuple[str, str, str, str], conv: Op) -> list[Row]:
    norm1, conv1, norm2, conv2 = names
    return [
        *norm(norm1, f"{path}norm1"),
        *affine(conv1, f"{path}conv1", conv),
        *norm(norm2, f"{path}norm2"),
        *affine(conv2, f"{path}conv2", conv),
    ]


def _resnet(path: str = "") -> list[Row]:
    return [
        *_resnet_layers(path, ("norm1", "conv1", "norm2", "conv2"), CONV2D),
        *affine("nin_shortcut", f"{path}conv_shortcut", CONV2D),
    ]


def _temporal_resnet() -> list[Row]:
    stack = ("in_layers.0", "in_layers.2", "out_layers.0", "out_layers.3")
    time = _resnet_layers("temporal_res_block.", stack, CONV_TIME)
    return [
        *_resnet("spatial_res_block."),
        *under("time_stack.", "", time),
        Row("mix_factor", "time_mixer.mix_factor"),
    ]


def _attention(op: Op) -> list[Row]:
    names = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out"}
    rows = [row for torch, path in names.items() for row in affine(torch, path, op)]
    return norm("norm", "group_norm") + rows


def _mid(resnet: list[Row], op: Op) -> list[Row]:
    return [
        *under("mid.block_1.", "mid_block.resnets.0.", resnet),
        *under("mid.attn_1.", "mid_block.attentions.0.", _attention(op)),
        *under("mid.block_2.", "mid_block.resnets.1.", resnet),
    ]


def _encoder(config: VAEConfig, op: Op) -> list[Row]:
    levels = len(config.block_out_channels)
    rows = [*affine("conv_in", "conv_in", CONV2D), *_mid(_resnet(), op)]
    for i, j in itertools.product(range(levels), range(config.layers_per_block)):
        rows += under(f"down.{i}.block.{j}.", f"down_blocks.{i}.resnets.{j}.", _resnet())
    for i in range(levels - 1):
        rows += affine(f"down.{i}.downsample.conv", f"down_blocks.{i}.downsamplers.0.conv", CONV2D)
    return [*rows, *norm("norm_out", "conv_norm_out"), *affine("conv_out", "conv_out", CONV2D)]


def _decoder(config: VAEConfig, op: Op) -> list[Row]:
    levels = len(config.block_out_channels)
    rows = [*affine("conv_in", "conv_in", CONV2D), *_mid(_temporal_resnet(), op)]
    for i, j in itertools.product(range(levels), range(config.layers_per_block + 1)):
        # The engine counts the decoder's levels from the finest, as the encoder's.
        rows += under(f"up.{levels - 1 - i}.block.{j}.", f"up_blocks.{i}.resnets.{j}.", _temporal_resnet())
    for i in range(levels - 1):
        rows += affine(f"up.{levels - 1 - i}.upsample.conv", f"up_blocks.{i}.upsamplers.0.conv", CONV2D)
    return [
        *rows,
        *norm("norm_out", "conv_norm_out"),
        *affine("conv_out", "conv_out", CONV2D),
        *affine("conv_out.time_mix_conv", "time_conv_out", CONV_TIME),
    ]


def _rows(config: VAEConfig, shapes: Shapes, attention: Op) -> list[Row]:
    encoder = under("encoder.", "encoder.", _encoder(config, attention))
    decoder = under("decoder.", "decoder.", _decoder(config, attention))
    quant = affine("quant_conv", "quant_conv", CONV2D) if config.quant_conv else []
    return present([*encoder, *decoder, *quant], shapes)


def engine_vae_table(config: VAEConfig, shapes: Shapes) -> Table:
    """The engine's layout, where the attention's projections are 1x1 convolutions.

    Whatever else the checkpoint holds (SVD's single file has the U-Net too) is not looked at.
    """
    rows = under(ENGINE_PREFIX, "", _rows(config, shapes, CONV1X1))
    return Table(list(rows), ignore=(rf"(?!{re.escape(ENGINE_PREFIX)})",))


def engine_decoder_table(config: VAEConfig, shapes: Shapes) -> Table:
    """The decoder that a stage's checkpoint carries, in the engine's layout; its other tensors are ignored.

    Args:
      shapes: path -> shape of the decoder's parameters in a whole VAE (`decoder.*`).
    """
    prefix = f"{ENGINE_PREFIX}decoder."
    rows = present(list(under(prefix, "decoder.", _decoder(config, CONV1X1))), shapes)
    return Table(rows, ignore=(rf"(?!{re.escape(prefix)})",))


def diffusers_vae_table(config: VAEConfig, shapes: Shapes) -> Table:
    """Diffusers' layout (`AutoencoderKLTemporalDecoder`)."""
    rows = _rows(config, shapes, LINEAR)
    return Table([Row(diffusers_key(r.path), r.path, r.op) for r in rows])


def is_engine_layout(tensors: Mapping[str, np.ndarray]) -> bool:
    """Whether a VAE's checkpoint is in the engine's layout rather than diffusers'."""
    return any(key.startswith(ENGINE_PREFIX) for key in tensors)


def vae_config(tensors: Mapping[str, np.ndarray], source: str) -> VAEConfig:
    """The sizes of a VAE, read from its tensors' shapes, in either layout."""
    engine = is_engine_layout(tensors)
    prefix = ENGINE_PREFIX if engine else ""
    resnet = (
        prefix
        + ("encoder.down.{}.block.{}" if engine else "encoder.down_blocks.{}.resnets.{}")
        + ".conv1.weight"
    )
    shape = CheckpointShapes(tensors, source)
    widths = [shape(resnet.format(0, 0), 4)[0]]
    while (key := resnet.format(len(widths), 0)) in shape:
        widths.append(shape(key, 4)[0])
    layers = sum(resnet.format(0, j) in tensors for j in range(64))
    return VAEConfig(
        block_out_channels=tuple(widths),
        layers_per_block=layers,
        latent_channels=shape(f"{prefix}decoder.conv_in.weight", 4)[1],
        quant_conv=not engine and "quant_conv.weight" in tensors,
    )
