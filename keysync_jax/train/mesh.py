"""Devices as a mesh of `data` x `fsdp` x `height`, in the order of their topology.

Clips are split over `data` and `fsdp`, the rows of a clip's pictures over `height`, parameters over `fsdp`.
Between slices, groups of chips that only the data centre's network joins, lies nothing but `data`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from keysync_jax.backend import HEIGHT
from keysync_jax.errors import UserError
from keysync_jax.train.config import AnyTrainConfig, MeshConfig, TrainConfig

BATCH = ("data", "fsdp")
"""Axes that the samples of a batch are split over."""

AXES = (*BATCH, HEIGHT)

HEIGHTS = (1, 2, 4)


def mesh_of(config: AnyTrainConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of a run, as `make_mesh` makes it.

    Raises:
      UserError: also where `mesh.height` does not divide the rows of the network's smallest pictures.
    """
    mesh = make_mesh(config.mesh, config.batch_size, devices)
    if isinstance(config, TrainConfig):
        levels = len(config.stage.unet.block_out_channels)
        rows, where = config.stage.latent_size / 2 ** (levels - 1), "the last level's"
    else:
        rows, where = config.crop_size / config.vae.factor, "the latents'"
    if config.mesh.height > 1 and rows % config.mesh.height:
        raise UserError(f"mesh.height={config.mesh.height}: does not divide {where} {rows:g} rows")
    return mesh


def make_mesh(config: MeshConfig, batch_size: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of a run.

    TPUs are laid out so that neighbours on an axis are neighbours in the machine, those of `height` first;
    others in process order.

    Args:
      batch_size: samples of a step, clips or a VAE's frames, over all devices.
      devices: all of all processes by default.

    Raises:
      UserError: the sizes do not give the number of devices, or do not fit the batch or the slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = _sizes(config, len(devices))
    data, fsdp, height = sizes
    split = f"{data} (mesh.data) x {fsdp} (mesh.fsdp)"
    if batch_size % (data * fsdp):
        more = "; mesh.height=2 or 4 splits a clip" if batch_size < data * fsdp else ""
        raise UserError(f"batch_size: {batch_size} samples cannot be split evenly over {split} devices{more}")
    if height > 1 and batch_size != data * fsdp:
        raise UserError(
            f"mesh.height={height} is for one sample a device of {split}, not {batch_size // (data * fsdp)}; "
            "split the batch first, with mesh.data"
        )
    return Mesh(_laid_out(sizes, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def rows_of(mesh: Mesh, batch_size: int, process: int | None = None) -> list[int]:
    """Numbers of the rows of a global batch that the devices of a process hold, ascending.

    Two processes hold the same row where devices of both split its pictures; a process's rows need not lie
    together, since the order of devices is the topology's.

    Args:
      process: this one by default.
    """
    process = jax.process_index() if process is None else process
    places: Any = NamedSharding(mesh, PartitionSpec(BATCH)).devices_indices_map((batch_size,))
    of_process = (index[0] for device, index in places.items() if device.process_index == process)
    return sorted({row for part in of_process for row in range(batch_size)[part]})


def in_words(sizes: Mapping[str, int]) -> str:
    """`data 4 x fsdp 8`; `height` where rows are split."""
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items() if axis != HEIGHT or size > 1)


def _sizes(config: MeshConfig, devices: int) -> tuple[int, int, int]:
    """Of every axis, -1 filled in."""
    asked = f"mesh.data={config.data}, mesh.fsdp={config.fsdp}"
    if config.height not in HEIGHTS:
        raise UserError(f"mesh.height must be 1, 2 or 4, not {config.height}")
    sizes = [config.data, config.fsdp]
    if any(size < 1 and size != -1 for size in sizes) or sizes == [-1, -1]:
        raise UserError(f"{asked}: each must be 1 or more, and one of them may be -1 for what is left")
    if -1 in sizes:
        sizes[sizes.index(-1)] = devices // (-math.prod(sizes) * config.height)
    if math.prod(sizes) * config.height != devices:
        asked += f", mesh.height={config.height}" if config.height > 1 else ""
        raise UserError(f"{asked}: such a mesh does not fit the {devices} devices that are here")
    return sizes[0], sizes[1], config.height


def _laid_out(sizes: tuple[int, int, int], devices: Sequence[Any]) -> np.ndarray:
    """Devices `[data, fsdp, height]`."""
    # Every GPU host is a slice of its own to JAX; that of a TPU is what its links join.
    if devices[0].platform != "tpu":
        in_order = sorted(devices, key=lambda device: (device.process_index, device.id))
        return np.array(in_order).reshape(sizes)
    slices = len({getattr(device, "slice_index", None) for device in devices})
    data, *within = sizes
    if data % slices:
        raise UserError(
            f"mesh.data={data}: is no multiple of the {slices} slices, between which only the batch is split"
        )
    inside = (data // slices, *within)
    if slices == 1:
        # Devices of one slice need not say which it is.
        return mesh_utils.create_device_mesh(inside, devices, allow_split_physical_axes=True)
    return mesh_utils.create_hybrid_device_mesh(
        inside, (slices, 1, 1), devices, allow_split_physical_axes=True
    )
