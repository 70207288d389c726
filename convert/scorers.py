"""Networks that judge clips: their published checkpoints to files of ours, and these loaded.

A file of ours is one safetensors file that says which network it is of. The checkpoints are the user's to
get, docs/metrics.md says where.
"""

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import jax.numpy as jnp
import numpy as np
from flax import nnx

from keysync_jax.convert.containers import Tensors, open_tensors
from keysync_jax.convert.sources import gather
from keysync_jax.convert.table import (
    BATCHES,
    CONV1D,
    CONV1X1,
    CONV2D,
    CONV3D,
    CONV_SPACE,
    CONV_TIME,
    LINEAR,
    Op,
    Row,
    Table,
    affine,
    batch_norm,
    norm,
    under,
)
from keysync_jax.errors import UserError
from keysync_jax.files import make_folder
from keysync_jax.hub import Say
from keysync_jax.model import Network
from keysync_jax.nn.functional import Make, shapes
from keysync_jax.nn.light_asd import KERNELS, WIDTHS, make_light_asd
from keysync_jax.nn.lip_reader import LipReaderConfig, make_lip_reader
from keysync_jax.nn.syncnet import make_syncnet
from keysync_jax.tensorfile import TensorFile, write_tensors

log = logging.getLogger(__name__)

ScorerKind = Literal["syncnet", "light-asd", "lip-reader"]

NETWORK = "network"
"""What a file's metadata calls the network that it is of."""


@dataclass(frozen=True)
class Scorer:
    """A network that judges clips.

    Attributes:
      title: its name.
      make: builds its module.
      table: the rows of a checkpoint, whose layout its keys tell.
    """

    title: str
    make: Make
    table: Callable[[Tensors], Table]


_CONVS = (0, 4, 8, 11, 14, 18)
"""Where SyncNet's convolutions are in both of its sequences; a normalisation follows each."""


def syncnet_table(_: Mapping[str, np.ndarray] | None = None) -> Table:
    """The plain state dict of `syncnet_v2.model`."""
    rows: list[Row] = []
    for i, index in enumerate(_CONVS):
        of_lips = CONV3D if i == 0 else CONV_SPACE
        rows += affine(f"netcnnlip.{index}", f"lip_convs.{i}.conv", of_lips)
        rows += batch_norm(f"netcnnlip.{index + 1}", f"lip_convs.{i}.norm")
        rows += affine(f"netcnnaud.{index}", f"voice_convs.{i}.conv", CONV2D)
        rows += batch_norm(f"netcnnaud.{index + 1}", f"voice_convs.{i}.norm")
    for theirs, ours in (("netfclip", "lip_out"), ("netfcaud", "voice_out")):
        rows += affine(f"{theirs}.0", f"{ours}.hidden")
        rows += batch_norm(f"{theirs}.1", f"{ours}.norm")
        rows += affine(f"{theirs}.3", f"{ours}.out")
    return Table(rows, ignore=(BATCHES,))


_POINTWISE_3D = Op((1, 0), drop=(2, 3, 4))
"""A 1x1x1 convolution that we write as a linear map, [out, in, 1, 1, 1] -> [in, out]."""


def light_asd_table(_: Mapping[str, np.ndarray] | None = None) -> Table:
    """The state dict of Light-ASD's training; the visual stream's own classifier is not used."""
    rows: list[Row] = []
    for i in range(len(WIDTHS)):
        streams = (
            ("audioEncoder", "audio_blocks", ("m", CONV2D), ("t", CONV2D), CONV1X1),
            ("visualEncoder", "visual_blocks", ("s", CONV_SPACE), ("t", CONV_TIME), _POINTWISE_3D),
        )
        for theirs, ours, first, second, pointwise in streams:
            block, path = f"model.{theirs}.block{i + 1}", f"{ours}.{i}"
            for j, size in enumerate(KERNELS):
                for (letter, op), name in ((first, "first"), (second, "second")):
                    branch = f"{path}.branches.{j}.{name}"
                    rows += affine(f"{block}.{letter}_{size}", branch, op, bias=False)
                    rows += batch_norm(f"{block}.bn_{letter}_{size}", f"{branch}_norm")
            rows += affine(f"{block}.last", f"{path}.last", pointwise, bias=False)
            rows += batch_norm(f"{block}.bn_last", f"{path}.last_norm")
    for theirs, ours in (("gru_forward", "forwards"), ("gru_backward", "backwards")):
        for letters, part in (("ih", "input"), ("hh", "hidden")):
            rows.append(Row(f"model.GRU.{theirs}.weight_{letters}_l0", f"{ours}.{part}.kernel", LINEAR))
            rows.append(Row(f"model.GRU.{theirs}.bias_{letters}_l0", f"{ours}.{part}.bias"))
    rows += affine("lossAV.FC", "classes")
    return Table(rows, ignore=(BATCHES, r"lossV\."))


_POINTWISE_1D = Op((1, 0), drop=(2,))
"""A convolution of one tap that we write as a linear map, [out, in, 1] -> [in, out]."""


def lip_reader_table(config: LipReaderConfig, keys: Collection[str]) -> Table:
    """The encoder in a checkpoint of Auto-AVSR; its decoder and CTC are not used.

    Two layouts are known, told by `keys`: that of the repository, and the one before it, which KeySync's
    LipScore reads, with front end and projection below `encoder`.
    """
    old = any(key.startswith("encoder.frontend.") for key in keys)
    frontend = "encoder.frontend" if old else "frontend"
    rows = affine(f"{frontend}.frontend3D.0", "frontend.conv", CONV3D, bias=False)
    rows += batch_norm(f"{frontend}.frontend3D.1", "frontend.norm")
    dim = config.stem
    for stage, width in enumerate(config.trunk):
        for i in range(2):
            block, path = f"{frontend}.trunk.layer{stage + 1}.{i}", f"frontend.blocks.{2 * stage + i}"
            for part in ("1", "2"):
                rows += affine(f"{block}.conv{part}", f"{path}.conv{part}", CONV2D, bias=False)
                rows += batch_norm(f"{block}.bn{part}", f"{path}.bn{part}")
            if i == 0 and (stage or dim != width):
                rows += affine(f"{block}.downsample.0", f"{path}.shortcut", CONV2D, bias=False)
                rows += batch_norm(f"{block}.downsample.1", f"{path}.shortcut_bn")
    rows += affine("encoder.embed.0" if old else "proj_encoder", "proj_encoder")
    for i in range(config.layers):
        rows += under(f"encoder.encoders.{i}.", f"encoders.{i}.", _conformer_rows())
    return Table([*rows, *norm("encoder.after_norm", "after_norm")], ignore=(BATCHES, r"decoder\.", r"ctc\."))


def _conformer_rows() -> list[Row]:
    rows: list[Row] = []
    for part in ("norm_ff_macaron", "norm_mha", "norm_conv", "norm_ff", "norm_final"):
        rows += norm(part, part)
    for part in ("feed_forward_macaron", "feed_forward"):
        rows += [*affine(f"{part}.w_1", f"{part}.w_1"), *affine(f"{part}.w_2", f"{part}.w_2")]
    for part in ("linear_q", "linear_k", "linear_v", "linear_out", "linear_pos"):
        rows += affine(f"self_attn.{part}", f"self_attn.{part}", bias=part != "linear_pos")
    rows += [Row(f"self_attn.{part}", f"self_attn.{part}") for part in ("pos_bias_u", "pos_bias_v")]
    for part in ("pointwise_cov1", "pointwise_cov2"):
        rows += affine(f"conv_module.{part}", f"conv_module.{part}", _POINTWISE_1D)
    rows += affine("conv_module.depthwise_conv", "conv_module.depthwise_conv", CONV1D)
    return [*rows, *batch_norm("conv_module.norm", "conv_module.norm")]


SCORERS: Mapping[ScorerKind, Scorer] = {
    "syncnet": Scorer("SyncNet", make_syncnet, syncnet_table),
    "light-asd": Scorer("Light-ASD", make_light_asd, light_asd_table),
    "lip-reader": Scorer(
        "LipScore's encoder",
        make_lip_reader,
        lambda tensors: lip_reader_table(LipReaderConfig(), tensors.keys()),
    ),
}


def convert_scorer(
    kind: ScorerKind,
    checkpoint: str | Path,
    output: str | Path,
    *,
    allow_download: bool = False,
    say: Say = log.info,
) -> None:
    """Writes a network's checkpoint as a file of ours.

    Args:
      checkpoint: as it is published, in any container that `open_tensors` reads; it may be on the hub.
      output: the `.safetensors` file; one that is there is replaced.
      allow_download, say: as `convert.checkpoint.convert` takes them.

    Raises:
      UserError: the checkpoint cannot be read, a tensor is missing, surplus or of another shape, or the file
        cannot be written.
    """
    output = Path(output)
    if output.suffix != ".safetensors":
        raise UserError(f"{output}: weights of {SCORERS[kind].title} are written as a .safetensors file")
    source = gather({kind: checkpoint}, allow_download, say)[kind]
    tensors = open_tensors(source.path)
    _, wanted = scorer_shapes(kind)
    params = SCORERS[kind].table(tensors).to_jax(tensors, wanted, str(checkpoint))
    make_folder(output.parent)
    write_tensors(output, params, {NETWORK: kind, "converted_from": source.provenance()})


def scorer_shapes(kind: ScorerKind) -> tuple[nnx.GraphDef, dict[str, tuple[int, ...]]]:
    """Graph of a network, and the shape of each parameter."""
    graphdef, abstract = shapes(SCORERS[kind].make)
    return graphdef, {path: leaf.shape for path, leaf in abstract.items()}


def load_scorer(kind: ScorerKind, path: str | Path) -> Network:
    """Loads a file of `convert_scorer`, in fp32.

    Raises:
      UserError: it cannot be read, or is another network's.
    """
    file = TensorFile(path)
    graphdef, wanted = scorer_shapes(kind)
    if file.metadata.get(NETWORK) != kind or file.shapes != wanted:
        known = " or ".join(get_args(ScorerKind))
        found = file.metadata.get(NETWORK)
        said = f"those of {found}" if found in SCORERS else f"no weights that convert wrote ({known})"
        raise UserError(f"{path}: the weights of {SCORERS[kind].title} are needed here, it holds {said}")
    return Network(graphdef, {p: jnp.asarray(x, jnp.float32) for p, x in file.items()})
