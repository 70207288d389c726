"""What programs are compiled for and with, and that compiled ones are found again."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from keysync_jax.backend import axis_size, batch_shards, computing, keep_compiled, platform, tracing_for
from keysync_jax.config import Dtype
from tests.commands_worker import COMMANDS

ROOT = Path(__file__).parents[1]


def run(module: str, *arguments: str, **environment: str) -> Any:
    """What a module of the tests prints, in a process that knows no folder of compiled programs."""
    kept = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env=kept | {"JAX_PLATFORMS": "cpu"} | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("dtype", "name"), [("fp32", "HIGHEST"), ("tf32", "HIGH"), ("bf16", "DEFAULT")])
def test_a_dtype_says_how_products_are_computed(dtype: Dtype, name: str) -> None:
    @jax.jit
    def product(x: jax.Array) -> jax.Array:
        return x @ x

    x = jax.ShapeDtypeStruct((2, 2), "float32")
    with computing(dtype):
        inside = product.lower(x).as_text()
    assert f"precision = [{name}, {name}]" in inside
    # It ends with the block, and a function that was traced in it is traced anew.
    assert "precision = [DEFAULT, DEFAULT]" in product.lower(x).as_text()


def test_a_program_knows_the_mesh_that_it_is_traced_for() -> None:
    mesh = jax.make_mesh((1, 1), ("data", "fsdp"))
    seen: dict[str, Any] = {}

    def look(x: jax.Array) -> jax.Array:
        with tracing_for(mesh):
            seen.update(
                shards=batch_shards(), fsdp=axis_size("fsdp"), other=axis_size("model"), on=platform()
            )
        return x

    jax.jit(look).lower(jax.ShapeDtypeStruct((2,), "float32"))
    assert seen == {"shards": 1, "fsdp": 1, "other": 1, "on": "cpu"}
    assert (batch_shards(), axis_size("fsdp"), platform()) == (1, 1, jax.default_backend())


def test_a_share_of_a_batch_is_not_split_again() -> None:
    """Memory is budgeted by the parts of a batch; within a shard_map a program sees its part alone."""
    mesh = AbstractMesh((8,), ("rows",))
    seen: list[Any] = []

    def look(x: jax.Array) -> jax.Array:
        seen.append((x.shape, batch_shards()))
        return x

    whole = jax.ShapeDtypeStruct((16, 2), "float32")
    over = jax.shard_map(look, mesh=mesh, in_specs=PartitionSpec("rows"), out_specs=PartitionSpec("rows"))
    assert jax.eval_shape(over, whole).shape == (16, 2)
    assert seen[-1] == ((2, 2), 1)


@pytest.fixture
def unset() -> Iterator[None]:
    """JAX's settings as a new process has them; nothing is compiled meanwhile."""
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_remove_custom_partitioning_ptr_from_cache_key",
    )
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in zip(names, (None, 1.0, False), strict=True):
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.usefixtures("unset")
def test_what_the_user_has_set_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    keep_compiled(tmp_path / "file/below")  # No folder can be made there: nothing is kept, nothing fails.
    assert jax.config.jax_compilation_cache_dir is None
    keep_compiled(tmp_path / "ours")
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "ours")
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0
    jax.config.update("jax_compilation_cache_dir", "theirs")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 7.0)
    keep_compiled(tmp_path / "ours")
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "1")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    keep_compiled(tmp_path / "ours")
    assert jax.config.jax_compilation_cache_dir == "theirs"
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 1


def test_no_command_compiles_again_what_it_has_compiled(tmp_path: Path) -> None:
    first, second = (run("tests.commands_worker", KEYSYNC_CACHE=str(tmp_path)) for _ in range(2))
    assert first == dict.fromkeys(COMMANDS, 1)
    assert second == dict.fromkeys(COMMANDS, 0)


PARTITIONED = """
import sys, jax, jax.numpy as jnp
from pathlib import Path
from jax.experimental.custom_partitioning import custom_partitioning
from keysync_jax.backend import keep_compiled
from keysync_jax.pipeline.phases import _Compiles
keep_compiled(Path(sys.argv[1]))
twice = custom_partitioning(lambda x: 2 * x)
twice.def_partition(
    infer_sharding_from_operands=lambda mesh, arguments, result: arguments[0].sharding,
    partition=lambda mesh, arguments, result: (
        mesh, lambda x: 2 * x, arguments[0].sharding, (arguments[0].sharding,)
    ),
    sharding_rule="i -> i",
)
mesh = jax.make_mesh((2,), ("data",))
x = jax.device_put(jnp.arange(4.0), jax.NamedSharding(mesh, jax.P("data")))
before = _Compiles.count
jax.jit(twice)(x)
print(_Compiles.count - before)
"""


def test_what_python_partitions_is_found_again(tmp_path: Path) -> None:
    """As cuDNN's attention is: without it, no training step on a GPU would be."""
    (tmp_path / "partitioned.py").write_text(PARTITIONED)
    flags = "--xla_force_host_platform_device_count=2"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    command = [sys.executable, str(tmp_path / "partitioned.py"), str(tmp_path / "compiled")]
    found = [subprocess.run(command, env=environment, check=True, capture_output=True).stdout for _ in "123"]
    assert [int(out) for out in found] == [1, 0, 0]
