"""Calls split over the devices of the host: the same results, and no transfer while one runs."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from keysync_jax.errors import UserError
from keysync_jax.model import Network
from keysync_jax.pipeline.devices import ONE_DEVICE, Devices, local_devices
from tests.train.tiny_training import CPU_FLAGS


def test_eight_devices_give_what_one_gives() -> None:
    flags = f"--xla_force_host_platform_device_count=8 {CPU_FLAGS}"
    done = subprocess.run(
        [sys.executable, "-m", "tests.pipeline.devices_worker"],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["devices"] == 8
    for name, difference in found["differences"].items():
        assert difference <= 1e-5 * found["sizes"][name], found
    assert found["resumed"] <= 1e-5 * found["sizes"]["windows"], found
    # Encoder, decoder and both stages compile once each, in threads before their inputs are there.
    assert (found["programs"], found["compiled"], found["compiled_again"]) == (4, 4, 0)
    # 21 frames, 12 keyframes in one window, then 8 windows (3 to 10): every call is of the same size.
    calls = ["_encode"] * 2 + ["sample_windows_by_branch", "sample_windows"] + ["_decode_pixels"] * 2
    assert found["calls"] == calls
    assert found["guard_notices"]


@pytest.mark.parametrize(
    ("devices", "windows", "branches", "rows", "columns"),
    [
        (8, 8, 3, 8, 1),
        (8, 100, 3, 8, 1),
        (8, 1, 3, 1, 3),
        (8, 2, 3, 2, 3),
        (8, 3, 3, 3, 2),  # of the two that are as quick, the one with fewer sums
        (8, 5, 3, 8, 1),
        (4, 1, 3, 1, 3),
        (4, 2, 3, 2, 2),
        (4, 3, 3, 4, 1),
        (2, 1, 3, 1, 2),  # one device has two branches
        (2, 1, 1, 2, 1),
        (1, 1, 3, 1, 1),
    ],
)
def test_devices_share_the_branches_of_few_windows(
    devices: int, windows: int, branches: int, rows: int, columns: int
) -> None:
    found = mesh_of(devices).for_windows(windows, branches)
    assert found.mesh is not None
    assert found.mesh.shape == ({"rows": rows} if columns == 1 else {"rows": rows, "branches": columns})
    assert len(found) == rows
    assert ONE_DEVICE.for_windows(windows, branches) is ONE_DEVICE


def mesh_of(count: int) -> Devices:
    return Devices(Mesh(np.array(jax.local_devices() * count), ("rows",)))


def test_one_device_runs_the_function_itself() -> None:
    calls: list[Any] = []
    network = Network(None, {"x": np.ones(2, np.float32)})  # type: ignore[arg-type]
    result = ONE_DEVICE.run(lambda *given: calls.append(given) or 7, network, 1, 2)
    assert result == 7
    assert calls == [(None, network.params, 1, 2)]
    assert len(ONE_DEVICE) == 1


def test_a_mesh_computes_what_one_device_does() -> None:
    one = mesh_of(1)  # the machine may have one alone; of eight see above

    def function(graphdef: Any, params: Any, rows: jax.Array, factor: jax.Array) -> jax.Array:
        return rows * params["x"] * factor

    network = one.network(Network(None, {"x": np.float32(2)}))  # type: ignore[arg-type]
    rows = np.arange(6, dtype=np.float32).reshape(3, 2)
    made = one.run(function, network, one.split(rows), one.copy(np.float32(3)))
    np.testing.assert_array_equal(made, rows * 6)


def test_no_more_devices_are_taken_than_there_are() -> None:
    here = len(jax.local_devices())
    assert len(local_devices()) == here
    assert len(local_devices(1)) == 1
    with pytest.raises(UserError, match=rf"{here + 1} devices were asked for, but this host has {here} \("):
        local_devices(here + 1)
    with pytest.raises(UserError, match="at least 1 device"):
        local_devices(0)
