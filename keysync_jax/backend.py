"""What programs are compiled for and with: precision of products, mesh, and a store of what was compiled.

A dtype names what is computed, on every device. Accelerators round the numbers that enter an fp32 product to
fewer bits unless they are told otherwise, so everything that computes networks does so within `computing`.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import jax
from jax.sharding import Mesh, PartitionSpec

from keysync_jax.config import Dtype
from keysync_jax.typing import Array

PRECISIONS: dict[Dtype, str | None] = {"fp32": "highest", "tf32": "tensorfloat32", "bf16": None}
"""JAX's name of the precision of products, by dtype; None: the device's own."""

HEIGHT = "height"
"""Axis of a mesh that rows of pictures are split over. All others split the batch."""

_FOLDER = "jax_compilation_cache_dir"
_JAX_MIN_SECONDS = 1.0
_MIN_SECONDS = "jax_persistent_cache_min_compile_time_secs"
_NO_POINTERS = "jax_remove_custom_partitioning_ptr_from_cache_key"


@contextmanager
def computing(dtype: Dtype) -> Iterator[None]:
    """Programs that are traced in the block have products as this dtype says.

    Not for a generator that yields within the block: its caller would compute so too.
    """
    with jax.default_matmul_precision(PRECISIONS[dtype]):
        yield


@contextmanager
def tracing_for(mesh: Mesh) -> Iterator[None]:
    """In a function under jit: what is traced in the block runs on this mesh, its batch split over it.

    The devices need not be here: with those of a topology, a program is compiled for an absent machine.
    """
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        yield


def batch_shards() -> int:
    """Parts that the batch of the program being traced is split into, its clips and their rows together.

    1 outside of `tracing_for`. Within a `jax.shard_map` the program sees the share of one device already.
    """
    return math.prod(_axes().values())


def row_shards() -> int:
    """Parts that the rows of every picture are split into, likewise."""
    return _axes().get(HEIGHT, 1)


def _axes() -> dict[str, int]:
    """Sizes of the mesh's axes that the compiler splits arrays over."""
    mesh = jax.sharding.get_abstract_mesh()
    return {name: size for name, size in mesh.shape.items() if name not in mesh.manual_axes}


def on_shards(run: Callable[..., Array], *arrays: Array, rows: Sequence[int | None] = ()) -> Array:
    """`run(*arrays)`, on every device with its part of the batch, which the arrays and the result begin with.

    For kernels, which the compiler cannot split by itself.

    Args:
      rows: the axis of each array that the rows of pictures are on, which are split over `HEIGHT`; None: each
        device takes all of that array's clip. The result is split as the first array is. Not needed where
        the mesh splits no rows.
    """
    if batch_shards() == 1:
        return run(*arrays)
    # No axis of the mesh is left for the compiler to use inside.
    names = jax.sharding.get_abstract_mesh().axis_names
    batch = tuple(name for name in names if name != HEIGHT)
    specs = tuple(
        PartitionSpec(batch) if axis is None else PartitionSpec(batch, *(None,) * (axis - 1), HEIGHT)
        for axis in rows or (None,) * len(arrays)
    )
    return jax.shard_map(run, in_specs=specs, out_specs=specs[0], check_vma=False)(*arrays)


def axis_size(name: str) -> int:
    """Devices along an axis of the mesh that the program is traced for; 1 where there is no such axis."""
    return dict(jax.sharding.get_abstract_mesh().shape).get(name, 1)


def platform() -> str:
    """Of the program being traced, "cpu", "gpu" or "tpu": its mesh's, else that of the default device."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def keep_compiled(folder: Path) -> None:
    """Lets JAX keep compiled programs in a folder, so that the next process compiles nothing.

    All of them are kept: a dub has some hundred programs, most of which compile in less than the second from
    which JAX keeps them by itself. A folder or a least time that the user has set, in the environment
    (`JAX_COMPILATION_CACHE_DIR`, `JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS`) or in JAX's settings, stays.
    Where the folder cannot be made nothing is kept.

    Args:
      folder: its path is in the programs' keys, so another folder has none of them. Of several processes of a
        run only the first one writes, so they need one that all of them see.
    """
    if getattr(jax.config, _FOLDER) is None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            return
        jax.config.update(_FOLDER, str(folder.absolute()))
    if _MIN_SECONDS.upper() not in os.environ and getattr(jax.config, _MIN_SECONDS) == _JAX_MIN_SECONDS:
        jax.config.update(_MIN_SECONDS, 0.0)
    # cuDNN's attention is partitioned by a Python function, whose address is another one in every process.
    jax.config.update(_NO_POINTERS, True)
