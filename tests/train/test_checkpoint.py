"""Checkpoints: bit for bit, onto another mesh, and whole or not at all."""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from keysync_jax.errors import UserError
from keysync_jax.train import checkpoint
from keysync_jax.train.checkpoint import Checkpoints
from keysync_jax.train.config import CheckpointConfig
from keysync_jax.train.step import TrainState


def state(step: int, ema: bool = True) -> TrainState:
    rng = np.random.default_rng(step)
    params = {f"unet.{i}.kernel": jnp.asarray(rng.standard_normal((64, 32), np.float32)) for i in range(4)}
    params["unet.0.bias"] = jnp.asarray([np.nan, -0.0, 1e-42], jnp.float32)
    frozen = {"unet.time.kernel": jnp.asarray(rng.standard_normal((8, 8), np.float32))}
    average = {k: x + 1 for k, x in params.items()} if ema else None
    return TrainState(jnp.int32(step), params, frozen, optax.adamw(1e-3).init(params), average)


def abstract(of: TrainState) -> TrainState:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), of)


def same_bits(a: Any, b: Any) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


def write(folder: Path, *steps: int, **config: int) -> Path:
    with Checkpoints(folder, CheckpointConfig(**config)) as checkpoints:
        for step in steps:
            checkpoints.save(state(step), step)
    return folder


def test_what_is_restored_is_what_was_saved(tmp_path: Path) -> None:
    write(tmp_path / "run", 10, 20)
    with Checkpoints(tmp_path / "run", CheckpointConfig()) as checkpoints:
        assert checkpoints.latest == 20
        back = checkpoints.restore(abstract(state(0)))
    assert jax.tree.structure(back) == jax.tree.structure(state(20))
    assert same_bits(back, state(20))
    assert not same_bits(back, state(10))


def test_saving_does_not_see_what_happens_afterwards(tmp_path: Path) -> None:
    step = jax.jit(lambda s: jax.tree.map(lambda x: x * 2 + 1, s), donate_argnums=0)
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        now = state(1)
        checkpoints.save(now, 1)
        for _ in range(3):
            now = step(now)
        checkpoints.wait()
        assert same_bits(checkpoints.restore(abstract(state(1))), state(1))


def test_latest_ones_and_every_nth_are_kept(tmp_path: Path) -> None:
    write(tmp_path, 10, 20, 30, 40, 50, 60, 70, keep=2, keep_every=30)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["30", "60", "70"]


def test_a_step_that_is_there_is_not_saved_again(tmp_path: Path) -> None:
    write(tmp_path, 10)
    write(tmp_path, 10)
    assert [p.name for p in tmp_path.iterdir()] == ["10"]


def test_another_mesh(tmp_path: Path) -> None:
    script = """
import sys, jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from keysync_jax.train.checkpoint import Checkpoints
from keysync_jax.train.config import CheckpointConfig
from tests.train.test_checkpoint import abstract, same_bits, state
def placed(shape):
    mesh = Mesh(np.array(jax.devices()).reshape(shape), ("data", "fsdp"))
    def put(x):
        split = x.ndim and x.shape[0] % mesh.shape["fsdp"] == 0
        return jax.device_put(x, NamedSharding(mesh, P("fsdp") if split else P()))
    return jax.tree.map(put, state(7))
for save, restore in (((8, 1), (2, 4)), ((2, 4), (1, 8)), ((1, 8), (8, 1))):
    with Checkpoints(f"{sys.argv[1]}/{save[1]}", CheckpointConfig()) as checkpoints:
        checkpoints.save(placed(save), 7)
        checkpoints.wait()
        wanted = abstract(placed(restore))
        back = checkpoints.restore(wanted)
    assert same_bits(back, state(7))
    assert all(x.sharding == y.sharding for x, y in zip(*map(jax.tree.leaves, (back, wanted)), strict=True))
"""
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, "-c", script, str(tmp_path)]
    subprocess.run(command, check=True, env=environment, cwd=Path(__file__).parents[2])
    # And what eight devices wrote, one reads.
    with Checkpoints(tmp_path / "8", CheckpointConfig()) as checkpoints:
        assert same_bits(checkpoints.restore(abstract(state(7))), state(7))


@contextmanager
def full_disk() -> Iterator[None]:
    """No file may grow beyond 4 KiB; writing fails as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_save_that_fails_leaves_the_one_before(tmp_path: Path) -> None:
    write(tmp_path, 10)
    sentence = r"step 20 could not be saved \(File too large\); the checkpoint of step 10 is complete"
    with full_disk(), pytest.raises(UserError, match=sentence):
        write(tmp_path, 20, keep=1)
    for _ in range(50):  # Orbax's writers may still be busy with the save that failed.
        with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
            names = [p.name for p in tmp_path.iterdir()]
        if names == ["10"]:
            break
        time.sleep(0.2)
    # What was written of the other has given its room back.
    assert names == ["10"]
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        assert checkpoints.latest == 10
        assert same_bits(checkpoints.restore(abstract(state(10))), state(10))


def restored(folder: Path) -> TrainState | str:
    """The last checkpoint, or the sentence that says why not."""
    try:
        with Checkpoints(folder, CheckpointConfig()) as checkpoints:
            return checkpoints.restore(abstract(state(0)))
    except UserError as error:
        return str(error)


def test_a_truncated_checkpoint_is_noticed(tmp_path: Path) -> None:
    whole, noticed = write(tmp_path / "whole", 10), set()
    for file in sorted(p for p in (whole / "10").rglob("*") if p.is_file()):
        copy = Path(shutil.copytree(whole, tmp_path / "copy"))
        damaged = copy / file.relative_to(whole)
        damaged.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        back = restored(copy)
        if isinstance(back, str):
            assert "/10: this checkpoint is damaged" in back
            assert "remove this folder to start anew" in back
            noticed.add(str(file.relative_to(whole)))
        else:
            assert same_bits(back, state(10)), file
        shutil.rmtree(copy)
    assert {"10/state/_METADATA", "10/state/manifest.ocdbt"} < noticed
    assert any("/d/" in name for name in noticed)


def test_what_an_interrupted_save_left_is_no_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, 10)
    (tmp_path / "20.orbax-checkpoint-tmp").mkdir()
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        assert checkpoints.latest == 10
    assert [p.name for p in tmp_path.iterdir()] == ["10"]


def test_reading_leaves_a_save_under_way_alone(tmp_path: Path) -> None:
    write(tmp_path, 10)
    (tmp_path / "20.orbax-checkpoint-tmp").mkdir()
    with Checkpoints(tmp_path, CheckpointConfig(), read_only=True) as checkpoints:
        assert checkpoints.restore_weights(average=False)[0] == 10
    assert sorted(p.name for p in tmp_path.iterdir()) == ["10", "20.orbax-checkpoint-tmp"]


def test_weights_alone(tmp_path: Path) -> None:
    write(tmp_path / "a", 10)
    with Checkpoints(tmp_path / "a", CheckpointConfig()) as checkpoints:
        for average in (False, True):
            step, weights = checkpoints.restore_weights(average)
            trained = state(10).ema if average else state(10).params
            assert step == 10
            assert isinstance(weights["unet.1.kernel"], np.ndarray)
            wanted = {**(trained or {}), **state(10).frozen}
            assert weights.keys() == wanted.keys()
            assert all(same_bits(weights[k], wanted[k]) for k in wanted)
    with Checkpoints(tmp_path / "b", CheckpointConfig()) as checkpoints:
        with pytest.raises(UserError, match="there is no checkpoint in it"):
            checkpoints.restore_weights(False)
        checkpoints.save(state(3, ema=False), 3)
        checkpoints.wait()
        with pytest.raises(UserError, match="kept no moving average"):
            checkpoints.restore_weights(True)


def test_arrays_are_stored_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Another mesh reads pieces, not the shards of the mesh that saved.
    monkeypatch.setattr(checkpoint, "_CHUNK_BYTES", 1024)
    monkeypatch.setattr(checkpoint, "_GROUP_BYTES", 20_000)
    write(tmp_path, 7)
    stored = json.loads(next((tmp_path / "7").rglob("array_metadatas/process_0")).read_text())
    shapes = {
        entry["array_metadata"]["param_name"]: entry["array_metadata"]["chunk_shape"]
        for entry in stored["array_metadatas"]
    }
    kernel = next(
        shape for name, shape in shapes.items() if name.startswith("params.") and "0.kernel" in name
    )
    assert 4 * np.prod(kernel) <= 1024
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        assert same_bits(checkpoints.restore(abstract(state(0))), state(7))
        step, arrays = checkpoints.stored_weights(average=True)
    # Read one by one, when they are asked for, and after the checkpoints were left.
    whole = {**state(7).ema, **state(7).frozen}
    assert step == 7
    assert {p: (x.shape, x.dtype) for p, x in arrays.items()} == {
        p: (x.shape, x.dtype) for p, x in whole.items()
    }
    assert all(same_bits(np.asarray(x), whole[p]) for p, x in arrays.items())
    half = arrays["unet.0.kernel"].astype(jnp.bfloat16)
    assert same_bits(np.asarray(half), whole["unet.0.kernel"].astype(jnp.bfloat16))
