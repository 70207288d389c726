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
from keysync_jax.pipeline import latents
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
    # Encoder, decoder and both stages compile once each, whatever the number of calls.
    assert (found["programs"], found["compiled_again"]) == (4, 0)
    # 21 frames, 12 keyframes in one call, then 8 windows (3 to 10): every call is of the same size.
    calls = ["_encode"] * 2 + ["sample_windows"] * 2 + ["_decode_pixels"] * 2
    assert found["calls"] == calls
    assert found["guard_notices"]


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


@pytest.mark.parametrize(
    ("stats", "size", "count"),
    [
        (None, 512, 2),
        ({}, 512, 2),
        ({"bytes_limit": 80 * 2**30, "bytes_in_use": 10 * 2**30}, 512, 16),
        ({"bytes_limit": 16 * 2**30, "bytes_in_use": 2**30}, 512, 4),
        ({"bytes_limit": 4 * 2**30}, 512, 1),
        ({"bytes_limit": 2**30}, 512, 1),
        ({"bytes_limit": 4 * 2**30}, 128, 16),
    ],
)
def test_the_vae_takes_what_fits_half_of_the_free_memory(
    monkeypatch: pytest.MonkeyPatch, stats: dict[str, int] | None, size: int, count: int
) -> None:
    class Device:
        def memory_stats(self) -> dict[str, int] | None:
            return stats

    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    assert latents.frames_per_call(size) == count
