"""Rows of the U-Net and the two stages, in the engine's layout and in diffusers'.

The engine's layout (Stability's, and KeySync's checkpoints) counts blocks through the whole
network; ours carries diffusers' names, so diffusers' rows follow from ours by three renames.
"""

import re
from collections.abc import Iterator, Mapping

import numpy as np

from keysync_jax.config import EncoderKind, StageConfig, StageKind, UNetConfig
from keysync_jax.convert.table import (
    CHW,
    CONV2D,
    CONV_TIME,
    Op,
    Row,
    Table,
    affine,
    norm,
    under,
)
from keysync_jax.errors import UserError

UNET_PREFIX = "model.diffusion_model."

STAGE_SURPLUS = (r"first_stage_model\.", r"conditioner\.embedders\.0\.")
"""What a stage's checkpoint carries beside the stage: a VAE, and an encoder that is not used."""

Shapes = Mapping[str, tuple[int, ...]]


def _resnet_layers(torch: str, path: str, conv: Op) -> list[Row]:
    return [
        *norm(f"{torch}in_layers.0", f"{path}.norm1"),
        *affine(f"{torch}in_layers.2", f"{path}.conv1", conv),
        *affine(f"{torch}emb_layers.1", f"{path}.time_emb_proj"),
        *norm(f"{torch}out_layers.0", f"{path}.norm2"),
        *affine(f"{torch}out_layers.3", f"{path}.conv2", conv),
    ]


def _resnet() -> list[Row]:
    return [
        *_resnet_layers("", "spatial_res_block", CONV2D),
        *affine("skip_connection", "spatial_res_block.conv_shortcut", CONV2D),
        *_resnet_layers("time_stack.", "temporal_res_block", CONV_TIME),
        Row("time_mixer.mix_factor", "time_mixer.mix_factor"),
    ]


def _attention(name: str) -> list[Row]:
    projections = [affine(f"{name}.{p}", f"{name}.{p}", bias=False) for p in ("to_q", "to_k", "to_v")]
    return [row for rows in projections for row in rows] + affine(f"{name}.to_out.0", f"{name}.to_out")


def _feed_forward(name: str) -> list[Row]:
    return [
        *affine(f"{name}.net.0.proj", f"{name}.proj_in"),
        *affine(f"{name}.net.2", f"{name}.proj_out"),
    ]


def _transformer_block() -> list[Row]:
    norms = [row for i in (1, 2, 3) for row in norm(f"norm{i}", f"norm{i}")]
    return [*norms, *_attention("attn1"), *_attention("attn2"), *_feed_forward("ff")]


def _transformer() -> list[Row]:
    return [
        *norm("norm", "norm"),
        *affine("proj_in", "proj_in"),
        *under("transformer_blocks.0.", "transformer_blocks.0.", _transformer_block()),
        *under("time_stack.0.", "temporal_transformer_blocks.0.", _transformer_block()),
        *under("time_stack.0.", "temporal_transformer_blocks.0.", norm("norm_in", "norm_in")),
        *under("time_stack.0.", "temporal_transformer_blocks.0.", _feed_forward("ff_in")),
        *affine("time_pos_embed.0", "time_pos_embed.linear_1"),
        *affine("time_pos_embed.2", "time_pos_embed.linear_2"),
        Row("time_mixer.mix_factor", "time_mixer.mix_factor"),
        *affine("proj_out", "proj_out"),
    ]


def _parts(config: UNetConfig) -> Iterator[tuple[str, str, list[Row]]]:
    """(engine prefix, our prefix, rows) of every resnet, transformer and resampler, in order."""
    levels, layers = len(config.block_out_channels), config.layers_per_block
    block = 1
    for i in range(levels):
        for j in range(layers):
            yield f"input_blocks.{block}.0.", f"down_blocks.{i}.resnets.{j}.", _resnet()
            if i in config.attention_levels:
                yield f"input_blocks.{block}.1.", f"down_blocks.{i}.attentions.{j}.", _transformer()
            block += 1
        if i < levels - 1:
            yield f"input_blocks.{block}.0.", f"down_blocks.{i}.downsamplers.0.", affine("op", "conv", CONV2D)
            block += 1
    yield "middle_block.0.", "mid_block.resnets.0.", _resnet()
    yield "middle_block.1.", "mid_block.attentions.0.", _transformer()
    yield "middle_block.2.", "mid_block.resnets.1.", _resnet()
    for i in range(levels):
        attends = levels - 1 - i in config.attention_levels
        for j in range(layers + 1):
            block = i * (layers + 1) + j
            yield f"output_blocks.{block}.0.", f"up_blocks.{i}.resnets.{j}.", _resnet()
            if attends:
                yield f"output_blocks.{block}.1.", f"up_blocks.{i}.attentions.{j}.", _transformer()
        if i < levels - 1:
            engine = f"output_blocks.{block}.{2 if attends else 1}."
            yield engine, f"up_blocks.{i}.upsamplers.0.", affine("conv", "conv", CONV2D)


def unet_rows(config: UNetConfig, shapes: Shapes) -> list[Row]:
    """Every tensor of the U-Net in the engine's layout, prefixes taken off."""
    rows = [
        *affine("time_embed.0", "time_embedding.linear_1"),
        *affine("time_embed.2", "time_embedding.linear_2"),
        *affine("label_emb.0.0", "add_embedding.linear_1"),
        *affine("label_emb.0.2", "add_embedding.linear_2"),
        *affine("input_blocks.0.0", "conv_in", CONV2D),
        *norm("out.0", "conv_norm_out"),
        *affine("out.2", "conv_out", CONV2D),
    ]
    for torch, path, part in _parts(config):
        rows += under(torch, path, part)
    return present(rows, shapes)


def present(rows: list[Row], shapes: Shapes) -> list[Row]:
    """Without the rows of skip convolutions that blocks of equal widths do not have."""
    return [r for r in rows if "conv_shortcut" not in r.path or r.path in shapes]


def stage_table(config: StageConfig, shapes: Shapes) -> Table:
    """A stage in the engine's layout: U-Net, audio projection and, for interpolation, z_m.

    Args:
      shapes: path -> shape of the stage's parameters.
    """
    inner = {k.removeprefix("unet."): v for k, v in shapes.items()}
    rows = list(under(UNET_PREFIX, "unet.", unet_rows(config.unet, inner)))
    rows += affine("conditioner.embedders.2.linear", "audio_projection")
    if config.kind == "interpolation":
        rows.append(Row("model.learned_mask", "z_m", CHW))
    return Table(rows, ignore=STAGE_SURPLUS)


def diffusers_unet_table(config: UNetConfig, shapes: Shapes) -> Table:
    """SVD's plain U-Net in diffusers' layout (`UNetSpatioTemporalConditionModel`)."""
    rows = unet_rows(config, shapes)
    return Table([Row(diffusers_key(r.path), r.path, r.op) for r in rows])


def diffusers_key(path: str) -> str:
    """Diffusers' name of one of our paths."""
    path = re.sub(r"\.(ff|ff_in)\.proj_in\.", r".\1.net.0.proj.", path)
    path = re.sub(r"\.(ff|ff_in)\.proj_out\.", r".\1.net.2.", path)
    path = path.replace(".to_out.", ".to_out.0.")
    return re.sub(r"\.(kernel|scale)$", ".weight", path)


def stage_config(
    kind: StageKind, tensors: Mapping[str, np.ndarray], encoder: EncoderKind, head_dim: int, source: str
) -> StageConfig:
    """The sizes of a stage, read from its tensors' shapes.

    Args:
      tensors: a checkpoint in the engine's layout.
      encoder: the audio encoder that the weights were trained on.
      head_dim: width of an attention head, which no shape tells.
      source: what an error calls the checkpoint.
    """
    shape = CheckpointShapes(tensors, source)
    unet = _unet_config(shape, head_dim)
    expected = {"keyframe": 2 * unet.out_channels, "interpolation": 2 * unet.out_channels + 1}[kind]
    if unet.in_channels != expected:
        raise UserError(
            f"{source}: its U-Net takes {unet.in_channels} channels, the {kind} stage takes {expected}; "
            "are the two stages' checkpoints swapped?"
        )
    sizes = {"latent_size": shape("model.learned_mask", 3)[1]} if kind == "interpolation" else {}
    audio_dim = shape("conditioner.embedders.2.linear.weight", 2)[1]
    return StageConfig(kind, encoder, unet, audio_dim=audio_dim, **sizes)


class CheckpointShapes:
    """Shapes of a checkpoint's tensors by name; a sentence for one that is missing or has other axes."""

    def __init__(self, tensors: Mapping[str, np.ndarray], source: str):
        self.tensors, self.source = tensors, source

    def __call__(self, key: str, rank: int) -> tuple[int, ...]:
        if key not in self.tensors:
            raise UserError(f"{self.source}: tensor {key!r} is missing")
        shape = tuple(self.tensors[key].shape)
        if len(shape) != rank:
            raise UserError(f"{self.source}: tensor {key!r} has shape {list(shape)}, not {rank} axes")
        return shape

    def __contains__(self, key: str) -> bool:
        return key in self.tensors


def _unet_config(shape: CheckpointShapes, head_dim: int) -> UNetConfig:
    name = UNET_PREFIX + "{}"
    conv_in = shape(name.format("input_blocks.0.0.weight"), 4)
    widths: list[int] = []
    attention_levels: list[int] = []
    layers, block = 0, 1
    while True:
        resnet = name.format(f"input_blocks.{block}.0.in_layers.2.weight")
        if resnet in shape:
            layers += 1 if not widths else 0
            width, level = shape(resnet, 4)[0], len(widths)
            attends = name.format(f"input_blocks.{block}.1.norm.weight") in shape
            block += 1
            last_of_level = name.format(f"input_blocks.{block}.0.in_layers.2.weight") not in shape
            if attends and level not in attention_levels:
                attention_levels.append(level)
            if last_of_level:
                widths.append(width)
        elif name.format(f"input_blocks.{block}.0.op.weight") in shape:
            block += 1
        else:
            break
    if not widths:
        shape(name.format("input_blocks.1.0.in_layers.2.weight"), 4)  # Says that it is missing.
    return UNetConfig(
        in_channels=conv_in[1],
        out_channels=shape(name.format("out.2.weight"), 4)[0],
        block_out_channels=tuple(widths),
        layers_per_block=layers,
        attention_levels=tuple(attention_levels),
        head_dim=head_dim,
        cross_attention_dim=shape(name.format("middle_block.1.transformer_blocks.0.attn2.to_k.weight"), 2)[1],
        addition_embed_dim=shape(name.format("label_emb.0.0.weight"), 2)[1],
    )
