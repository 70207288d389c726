"""Which device lies where on a mesh, and which rows a process reads; for machines that are not here."""

import dataclasses
import functools
import random
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
from jax.sharding import Mesh

from keysync_jax.errors import UserError
from keysync_jax.train.config import MeshConfig
from keysync_jax.train.mesh import make_mesh, mesh_of, rows_of
from tests.train.smallest_config import smallest


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a mesh asks a TPU of a single slice for, which does not say that it has one."""

    id: int
    process_index: int
    coords: tuple[int, int, int]
    core_on_chip: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"


@dataclasses.dataclass(frozen=True)
class SliceChip(Chip):
    """One of several slices."""

    slice_index: int = 0


def chips(rows: int, columns: int, slices: int = 1) -> list[Any]:
    """Slices of `rows` x `columns` chips, hosts of 2 x 2, in no order."""
    found = []
    for number in range(slices):
        for place in range(rows * columns):
            x, y = place // columns, place % columns
            host = (number * rows + 2 * (x // 2)) * columns // 4 + y // 2
            chip: Any = functools.partial(SliceChip, slice_index=number) if slices > 1 else Chip
            found.append(chip(number * rows * columns + place, host, (x, y, 0)))
    random.Random(0).shuffle(found)
    return found


def hops(mesh: Mesh, axis: str) -> int:
    """Links between neighbours of a ring over an axis, at most."""
    places = np.array([d.coords for d in mesh.devices.flat]).reshape(*mesh.devices.shape, 3)
    number = mesh.axis_names.index(axis)
    return int(np.abs(places - np.roll(places, 1, number)).sum(-1).max())


def test_neighbours_on_an_axis_are_neighbours_in_the_machine() -> None:
    mesh = make_mesh(MeshConfig(4, 4), 16, chips(4, 4))
    # A ring over 4 chips in a row without a link from the last to the first.
    assert (hops(mesh, "data"), hops(mesh, "fsdp")) == (3, 3)
    tall = make_mesh(MeshConfig(8, 4, height=2), 32, chips(8, 8))
    assert hops(tall, "height") == 1


@pytest.mark.parametrize(
    ("config", "clips", "devices"),
    [
        (MeshConfig(), 16, chips(4, 4)),
        (MeshConfig(fsdp=4), 32, chips(4, 4)),
        (MeshConfig(height=2), 32, chips(8, 8)),
        (MeshConfig(height=4), 32, chips(8, 16)),
        (MeshConfig(fsdp=2, height=2), 32, chips(4, 8, slices=2)),
    ],
)
def test_every_process_reads_the_rows_of_its_devices(config: MeshConfig, clips: int, devices: Any) -> None:
    mesh = make_mesh(config, clips, devices)
    parts = mesh.devices.reshape(-1, config.height)
    each, seen = clips // len(parts), set()
    for process in {device.process_index for device in devices}:
        rows = rows_of(mesh, clips, process)
        assert rows == sorted(set(rows))
        for part, holders in enumerate(parts):
            held = any(device.process_index == process for device in holders)
            assert held == (part * each in rows)
        seen |= set(rows)
    assert seen == set(range(clips))


def test_rows_of_the_order_of_processes() -> None:
    """Devices of hosts without a topology lie in process order, whatever order they are given in."""
    devices: list[Any] = [
        SliceChip(i, i // 8, (0, 0, 0), platform="gpu", slice_index=i // 8) for i in range(64)
    ]
    random.Random(1).shuffle(devices)
    assert rows_of(make_mesh(MeshConfig(fsdp=16, height=2), 32, devices), 32, 3) == [12, 13, 14, 15]
    mesh = make_mesh(MeshConfig(2, 8, height=4), 16, devices)
    assert [rows_of(mesh, 16, process) for process in (0, 7)] == [[0, 1], [14, 15]]
    # Three hosts do not divide 32 clips, and two of them hold the same one.
    some: list[Any] = [Chip(i, i // 6, (0, 0, 0), platform="cpu") for i in range(16)]
    mesh = make_mesh(MeshConfig(height=4), 4, some)
    assert [rows_of(mesh, 4, process) for process in range(3)] == [[0, 1], [1, 2], [3]]


def test_only_data_lies_between_slices() -> None:
    mesh = make_mesh(MeshConfig(fsdp=4), 32, chips(4, 4, slices=2))
    numbers = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    assert mesh.devices.shape == (8, 4, 1)
    assert (numbers == np.repeat([0, 1], 4)[:, None, None]).all()
    with pytest.raises(UserError, match=r"mesh\.data=1: is no multiple of the 2 slices"):
        make_mesh(MeshConfig(1, 32), 32, chips(4, 4, slices=2))


def test_height_divides_the_rows_of_the_last_level() -> None:
    config = dataclasses.replace(smallest(), batch_size=1, mesh=MeshConfig(height=4))
    levels = dataclasses.replace(config.stage.unet, block_out_channels=(16, 16, 16))
    deep = dataclasses.replace(config.stage, unet=levels)
    devices: list[Any] = [Chip(i, 0, (0, 0, 0), platform="cpu") for i in range(4)]
    assert mesh_of(config, devices).shape["height"] == 4
    odd = dataclasses.replace(config, stage=dataclasses.replace(deep, latent_size=6), mesh=MeshConfig())
    assert mesh_of(odd, devices[:1]).shape["height"] == 1
    with pytest.raises(UserError, match=r"mesh\.height=4: does not divide the last level's 2 rows"):
        mesh_of(dataclasses.replace(config, stage=deep), devices)


@pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu (the extra tpu) is not installed")
@pytest.mark.parametrize(("name", "slices"), [("v5e:8x8", 1), ("v5e:4x8", 2), ("v5p:2x2x4", 4)])
def test_rows_on_topologies_of_libtpu(name: str, slices: int) -> None:
    from keysync_jax.ahead.chips import topology

    devices = topology(name, slices).devices
    mesh = make_mesh(MeshConfig(height=2), len(devices) // 2, devices)
    processes = {device.process_index for device in devices}
    rows = [rows_of(mesh, len(devices) // 2, process) for process in processes]
    assert sorted(set().union(*rows)) == list(range(len(devices) // 2))
