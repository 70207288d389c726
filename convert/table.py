"""The conversion table: rows of (torch key, our path, operation), each operation with its inverse.

One table converts both ways. `to_jax` is total: a tensor that is missing, surplus, doubled or
misshapen stops it with that tensor's name. `to_torch` is generated from the same rows, so
`to_torch(to_jax(sd))` equals `sd` bit for bit; dtypes are kept.

Arrays are numpy arrays in host memory throughout; nothing here imports torch or Flax.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from keysync_jax.errors import UserError
from keysync_jax.typing import Array


@dataclass(frozen=True)
class Op:
    """How one tensor changes its layout.

    Attributes:
      axes: our axes in terms of torch's, as `numpy.transpose` takes them.
      drop: torch axes of length 1 that we do not have; removed before the transpose.
    """

    axes: tuple[int, ...] | None = None
    drop: tuple[int, ...] = ()

    def to_jax(self, x: np.ndarray) -> np.ndarray:
        x = np.squeeze(x, self.drop) if self.drop else x
        return x if self.axes is None else np.transpose(x, self.axes)

    def to_torch(self, x: np.ndarray) -> np.ndarray:
        x = x if self.axes is None else np.transpose(x, np.argsort(self.axes))
        return np.expand_dims(x, self.drop) if self.drop else x


KEEP = Op()
LINEAR = Op((1, 0))
"""[out, in] -> [in, out]."""
CONV1D = Op((2, 1, 0))
"""[out, in, k] -> [k, in, out]."""
CONV2D = Op((2, 3, 1, 0))
"""[out, in, kh, kw] -> [kh, kw, in, out]."""
CONV_TIME = Op((2, 3, 1, 0), drop=(4,))
"""A (3, 1, 1) kernel, [out, in, kt, 1, 1] -> [kt, 1, in, out]: we convolve [T, H * W] maps."""
CONV3D = Op((2, 3, 4, 1, 0))
"""[out, in, kt, kh, kw] -> [kt, kh, kw, in, out]."""
CONV_SPACE = Op((2, 3, 1, 0), drop=(2,))
"""A (1, kh, kw) kernel, [out, in, 1, kh, kw] -> [kh, kw, in, out]: we convolve frames."""
CONV1X1 = Op((1, 0), drop=(2, 3))
"""A 1x1 convolution that we write as a linear map, [out, in, 1, 1] -> [in, out]."""
CHW = Op((1, 2, 0))
"""A feature map, [C, H, W] -> [H, W, C]."""


@dataclass(frozen=True)
class Row:
    """One tensor: its key in the PyTorch checkpoint, its path in ours, and the operation."""

    torch: str
    path: str
    op: Op = KEEP


def under(torch_prefix: str, path_prefix: str, rows: Iterable[Row]) -> Iterator[Row]:
    """The same rows below a torch prefix and a path prefix (each with its own last dot, or empty)."""
    return (Row(torch_prefix + r.torch, path_prefix + r.path, r.op) for r in rows)


def norm(torch: str, path: str) -> list[Row]:
    """Rows of a group or layer normalisation."""
    return [Row(f"{torch}.weight", f"{path}.scale"), Row(f"{torch}.bias", f"{path}.bias")]


def batch_norm(torch: str, path: str) -> list[Row]:
    """Rows of a batch normalisation; `BATCHES` matches its count of batches, which nothing uses."""
    parts = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
    return [Row(f"{torch}.{theirs}", f"{path}.{ours}") for theirs, ours in parts.items()]


BATCHES = r".*\.num_batches_tracked$"


def affine(torch: str, path: str, op: Op = LINEAR, bias: bool = True) -> list[Row]:
    """Rows of a linear map or a convolution: kernel, and bias if it has one."""
    rows = [Row(f"{torch}.weight", f"{path}.kernel", op)]
    return [*rows, Row(f"{torch}.bias", f"{path}.bias")] if bias else rows


@dataclass(frozen=True)
class Table:
    """All rows of one network in one checkpoint layout.

    Attributes:
      rows: one for every tensor of the network; keys and paths are unique.
      ignore: regular expressions (matched at the start of a torch key) of surplus tensors that such
        checkpoints are known to carry and that the network does not use.
    """

    rows: Sequence[Row]
    ignore: Sequence[str] = field(default=())

    def __post_init__(self) -> None:
        for what, names in (
            ("torch key", [r.torch for r in self.rows]),
            ("path", [r.path for r in self.rows]),
        ):
            doubled = {n for n in names if names.count(n) > 1} if len(set(names)) < len(names) else ()
            if doubled:
                raise ValueError(f"the conversion table names the {what} {sorted(doubled)[0]!r} twice")

    def to_jax(
        self,
        tensors: Mapping[str, np.ndarray],
        shapes: Mapping[str, tuple[int, ...]],
        source: str = "the checkpoint",
        place: Callable[[np.ndarray], Array] = np.asarray,
    ) -> dict[str, Array]:
        """Converts a whole state dict; tensors are read one at a time, in the order of the rows.

        Args:
          tensors: torch key -> array; may read lazily from a file.
          shapes: path -> shape of every parameter that the network has (`nn.functional.shapes`).
          source: what the message of an error calls the checkpoint.
          place: where each array goes as soon as it is converted, e.g. onto a device.

        Raises:
          UserError: a tensor is missing, surplus or of another shape than the network's.
        """
        self._check_keys(tensors, source)
        unset = set(shapes) - {r.path for r in self.rows}
        unknown = {r.path for r in self.rows} - set(shapes)
        if unset or unknown:
            raise ValueError(f"table and network differ: {sorted(unset | unknown)[0]!r}")
        params = {}
        for row in self.rows:
            torch_shape = row.op.to_torch(np.broadcast_to(np.int8(0), shapes[row.path])).shape
            tensor = tensors[row.torch]
            if tuple(tensor.shape) != torch_shape:
                raise UserError(
                    f"{source}: tensor {row.torch!r} has shape {list(tensor.shape)}, "
                    f"the network needs {list(torch_shape)}"
                )
            params[row.path] = place(row.op.to_jax(tensor))
        return params

    def to_torch(self, params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The inverse: path -> array back to torch key -> array, bit for bit."""
        return {r.torch: np.ascontiguousarray(r.op.to_torch(np.asarray(params[r.path]))) for r in self.rows}

    def _check_keys(self, tensors: Mapping[str, np.ndarray], source: str) -> None:
        known = {r.torch for r in self.rows}
        missing = [r.torch for r in self.rows if r.torch not in tensors]
        if missing:
            raise UserError(f"{source}: tensor {missing[0]!r} is missing{_and_more(missing)}")
        ignore = re.compile("|".join(f"(?:{p})" for p in self.ignore)) if self.ignore else None
        surplus = [k for k in tensors if k not in known and not (ignore and ignore.match(k))]
        if surplus:
            raise UserError(
                f"{source}: tensor {surplus[0]!r} is not part of this network{_and_more(surplus)}"
            )


def _and_more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
