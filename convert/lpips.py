"""LPIPS from its two files: torchvision's classifier, and the heads of the `lpips` package (v0.1)."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np

from keysync_jax.config import Dtype
from keysync_jax.convert.containers import Tensors, open_tensors
from keysync_jax.convert.table import CONV1X1, CONV2D, Table, affine
from keysync_jax.errors import UserError
from keysync_jax.model import DTYPES, Network
from keysync_jax.nn.functional import shapes
from keysync_jax.nn.lpips import LPIPS, TRUNKS, LPIPSConfig, TrunkKind
from keysync_jax.typing import Array


def load_lpips(trunk: str | Path, heads: str | Path, dtype: Dtype = "fp32") -> Network:
    """Loads LPIPS onto the default device.

    Args:
      trunk: state dict of torchvision's `vgg16` or `alexnet`, in any container that `open_tensors` reads.
      heads: the file of the `lpips` package for that trunk, `weights/v0.1/vgg.pth` or `alex.pth`.
      dtype: of the trunk's computation. Parameters are fp32.

    Raises:
      UserError: a file cannot be read, a tensor is missing, surplus or of another shape (so the files
        do not belong together), or a head has a negative weight.
    """
    classifier, learned = open_tensors(trunk), open_tensors(heads)
    config = lpips_config(classifier)
    graphdef, abstract = lpips_shapes(config, dtype)
    params: dict[str, Array] = {}
    for table, tensors in ((trunk_table(config), classifier), (heads_table(config), learned)):
        wanted = {row.path: abstract[row.path].shape for row in table.rows}
        params |= table.to_jax(tensors, wanted, str(tensors.path), _place)
    _check_sign(learned)
    return Network(graphdef, params)


def lpips_shapes(config: LPIPSConfig, dtype: Dtype = "fp32") -> Network:
    """The network of these sizes, from shapes alone."""
    return Network(*shapes(lambda rngs: LPIPS(config, dtype=DTYPES[dtype], rngs=rngs)))


def lpips_config(trunk: Tensors) -> LPIPSConfig:
    """Which classifier it is, and its widths, from the shapes of its tensors."""
    kernel = trunk.shapes.get("features.0.weight", ())[2:]
    kind: TrunkKind = "alexnet" if kernel == (11, 11) else "vgg16"
    widths = []
    for first, *_ in feature_indices(kind):
        key = f"features.{first}.weight"
        shape = trunk.shapes.get(key)
        if not shape:
            raise UserError(f"{trunk.path}: tensor {key!r} is missing (is it torchvision's {kind}?)")
        widths.append(shape[0])
    return LPIPSConfig(kind, tuple(widths))


def feature_indices(kind: TrunkKind) -> list[list[int]]:
    """For each slice, where its convolutions are among torchvision's `features`."""
    indices, index = [], 0
    for pool, convs in TRUNKS[kind]:
        index += pool > 0
        end = index + 2 * len(convs)
        indices.append(list(range(index, end, 2)))  # a ReLU follows each
        index = end
    return indices


def trunk_table(config: LPIPSConfig) -> Table:
    """torchvision's layout; the layers of classification are not used."""
    rows = [
        row
        for i, indices in enumerate(feature_indices(config.trunk))
        for j, index in enumerate(indices)
        for row in affine(f"features.{index}", f"slices.{i}.{j}", CONV2D)
    ]
    return Table(rows, ignore=(r"classifier\.",))


def heads_table(config: LPIPSConfig) -> Table:
    """The `lpips` package's layout (its `model.0` is dropout)."""
    rows = [
        row
        for i in range(len(config.widths))
        for row in affine(f"lin{i}.model.1", f"heads.{i}", CONV1X1, bias=False)
    ]
    return Table(rows)


def _place(x: np.ndarray) -> Array:
    return jnp.asarray(x.astype(np.float32))


def _check_sign(heads: Tensors) -> None:
    for key, tensor in heads.items():
        if not np.all(tensor >= 0):
            raise UserError(f"{heads.path}: tensor {key!r} has a weight below 0, which no distance has")
