"""One run on several meshes: the same losses, and each device holds its share alone."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from keysync_jax.config import StageConfig, UNetConfig
from keysync_jax.errors import UserError
from keysync_jax.nn.functional import shapes
from keysync_jax.train.config import MeshConfig, TrainConfig
from keysync_jax.train.mesh import make_mesh
from keysync_jax.train.sharding import (
    batch_shardings,
    bytes_per_device,
    check_rules,
    shardings,
    spec,
)
from keysync_jax.train.step import init_state, make_stage
from tests.train.tiny_training import CPU_FLAGS, batch, train_config

MESHES = ("1,1", "2,2,2", "4,1,2", "1,4")
"""Of 4 clips."""


def fake(data: int, fsdp: int) -> Any:
    """A mesh for shapes alone."""
    return make_mesh(MeshConfig(data, fsdp), data * fsdp, [jax.devices()[0]] * (data * fsdp))


def test_losses_are_the_single_devices_and_memory_is_shared(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    saved = tmp_path / "checkpoints"
    flags = f"--xla_force_host_platform_device_count=8 {CPU_FLAGS}"
    done = subprocess.run(
        [sys.executable, "-m", "tests.train.mesh_worker", "--clips", "4", "--saved", str(saved), *MESHES],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    single = found["1,1"]
    assert len(set(single["losses"])) == 5
    with capsys.disabled():
        for name, mesh in found.items():
            share = mesh["bytes"] / single["bytes"]
            error = np.abs(np.divide(mesh["losses"], single["losses"]) - 1).max()
            print(
                f"\nmesh {name}: {mesh['bytes']:,} bytes a device ({share:.4f}), losses off by {error:.1e}",
                end="",
            )
            assert error < 1e-5
            assert mesh["bytes"] == mesh["measured"]
    # What no axis divides (output convolution, mixing factors, counters) is 0.3 % of so small a network.
    assert found["2,2,2"]["bytes"] == pytest.approx(single["bytes"] / 2, rel=0.01)
    assert found["4,1,2"]["bytes"] == single["bytes"]
    assert found["1,4"]["bytes"] == pytest.approx(single["bytes"] / 4, rel=0.01)
    # The checkpoint of 2,2,2 has every array once, and any mesh goes on from it.
    assert "resumed" not in found["2,2,2"]
    stored = sum(path.stat().st_size for path in saved.rglob("*") if path.is_file())
    assert 0.5 * single["bytes"] < stored < 1.05 * single["bytes"]
    for name in ("4,1,2", "1,4"):
        np.testing.assert_allclose(found[name]["resumed"], single["losses"][3:], rtol=1e-5)


def test_the_first_rule_that_finds_a_path_counts() -> None:
    rules = ((r"\.bias$", ()), (r"conv", ("data", "fsdp")), (r"proj", ("fsdp", "")))
    config, mesh = MeshConfig(2, 4, rules), fake(2, 4)
    assert spec(config, mesh, "conv.bias", (8,)) == PartitionSpec(None)
    assert spec(config, mesh, "conv.kernel", (3, 3, 8, 8)) == PartitionSpec(None, None, "data", "fsdp")
    assert spec(config, mesh, "conv.kernel", (3, 3, 7, 6)) == PartitionSpec(None, None, None, None)
    assert spec(config, mesh, "proj.kernel", (8, 8)) == PartitionSpec("fsdp", None)
    assert spec(config, mesh, "conv.scale", (8,)) == PartitionSpec("fsdp")
    assert spec(config, mesh, "other.kernel", (8, 8)) == PartitionSpec(None, None)


def test_everything_kept_of_a_parameter_lies_as_it_does() -> None:
    config = train_config()
    params = {"a.kernel": jnp.zeros((3, 16)), "x.time_mixer.mix_factor": jnp.zeros((1,))}
    params |= {f"x{p}y": jnp.zeros((16,)) for p in (".temporal_res_block.", ".time_pos_embed.")}
    params["x.temporal_transformer_blocks.y"] = jnp.zeros((16,))
    state = jax.eval_shape(lambda p: init_state(config, p), params)
    mesh = fake(1, 8)
    placed = shardings(mesh, config.mesh, state)
    adam = placed.opt_state[1][0]
    kernels = (placed.params["a.kernel"], adam.mu["a.kernel"], adam.nu["a.kernel"])
    assert [k.spec for k in kernels] == [PartitionSpec(None, "fsdp")] * 3
    assert placed.frozen["x.time_mixer.mix_factor"].spec == PartitionSpec(None)
    assert placed.step.spec == adam.count.spec == PartitionSpec()
    assert batch_shardings(mesh, batch(config)).audio.spec == PartitionSpec(("data", "fsdp"))
    assert bytes_per_device(state.params, placed.params) == 3 * 16 * 4 // 8


def test_full_size_on_eight_devices_is_an_eighth(capsys: pytest.CaptureFixture[str]) -> None:
    config = TrainConfig(StageConfig("keyframe", "hubert", UNetConfig()))
    _, params = shapes(make_stage(config))
    state = jax.eval_shape(lambda p: init_state(config, p), params)
    one, eight = (
        bytes_per_device(state, shardings(mesh, MeshConfig(1, n), state))
        for n, mesh in ((1, fake(1, 1)), (8, fake(1, 8)))
    )
    with capsys.disabled():
        print(f"\nfull size: {one:,} bytes on one device, {eight:,} on each of eight", end="")
    assert eight / one == pytest.approx(1 / 8, rel=1e-4)


@pytest.mark.parametrize(
    ("config", "batch_size", "message"),
    [
        (MeshConfig(3, 2), 8, r"mesh\.data=3, mesh\.fsdp=2: such a mesh does not fit the 8 devices"),
        (MeshConfig(-1, 3), 8, "does not fit the 8 devices"),
        (MeshConfig(-1, 16), 8, "does not fit the 8 devices"),
        (MeshConfig(-1, -1), 8, "one of them may be -1"),
        (MeshConfig(0, 8), 8, "each must be 1 or more"),
        (MeshConfig(), 4, r"4 samples cannot be split .*; mesh\.height=2 or 4 splits a clip"),
        (MeshConfig(height=3), 8, r"mesh\.height must be 1, 2 or 4, not 3"),
        (MeshConfig(2, 4, height=2), 8, r"fsdp=4, mesh\.height=2: such a mesh does not fit the 8 devices"),
        (MeshConfig(2, -1, height=2), 8, r"mesh\.height=2 is for one sample a device of 2 .* x 2 .*, not 2"),
        (MeshConfig(2, -1), 12, r"batch_size: 12 samples cannot be split evenly over 2 .* x 4 .* devices"),
    ],
)
def test_meshes_that_do_not_fit(config: MeshConfig, batch_size: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_mesh(config, batch_size, [jax.devices()[0]] * 8)


def test_minus_one_is_what_is_left() -> None:
    devices = [jax.devices()[0]] * 8
    assert dict(make_mesh(MeshConfig(-1, 2), 8, devices).shape) == {"data": 4, "fsdp": 2, "height": 1}
    assert dict(make_mesh(MeshConfig(2, -1), 8, devices).shape) == {"data": 2, "fsdp": 4, "height": 1}
    assert dict(make_mesh(MeshConfig(height=4), 2, devices).shape) == {"data": 2, "fsdp": 1, "height": 4}


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ((r"(", ("fsdp",)), "is not a regular expression"),
        ((r".*", ("model",)), "names the axis 'model'; there are data and fsdp"),
        ((r".*", ("fsdp", "fsdp")), "names an axis for two dimensions"),
    ],
)
def test_rules_that_cannot_be_meant(rule: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_rules(MeshConfig(rules=(rule,)))
