"""The first state from slices: the same bits, each byte of a file read once."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import jax, numpy as np
import ml_dtypes
from keysync_jax.train.config import MeshConfig, OptimizerConfig, TrainConfig
from keysync_jax.train.scatter import state_from_slices
from keysync_jax.train.mesh import make_mesh
from keysync_jax.train.sharding import state_from
from tests.train.tiny_training import train_config

read = {}
class File:
    '''An array of a mapped file, which notes what is read of it.'''
    def __init__(self, name, x):
        self.name, self.x, self.shape, self.size, self.dtype = name, x, x.shape, x.size, x.dtype
    def reshape(self, *shape):
        assert shape == (-1,)
        return self
    def __getitem__(self, part):
        read.setdefault(self.name, []).append((part.start, min(part.stop, self.size)))
        return self.x.reshape(-1)[part]

rng = np.random.default_rng(0)
shapes = {"a.kernel": (3, 3, 16, 24), "a.bias": (7,), "b.scale": (), "time.kernel": (5, 8)}
shapes["frozen.temporal_res_block.kernel"] = (8, 8)
weights = {k: np.asarray(rng.standard_normal(s), np.float32) for k, s in shapes.items()}
weights["time.kernel"] = weights["time.kernel"].astype(ml_dtypes.bfloat16)
config = train_config(optimizer=OptimizerConfig(ema=0.9, frozen=("temporal",)), mesh=MeshConfig(2, 4))
mesh = make_mesh(config.mesh, 8)
whole = state_from(mesh, config, weights)
sliced = state_from_slices(mesh, config, {k: File(k, x) for k, x in weights.items()})
for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(sliced), strict=True):
    assert a.sharding == b.sharding and a.dtype == b.dtype
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
assert jax.tree.structure(whole) == jax.tree.structure(sliced)
for name, x in weights.items():
    parts = sorted(p for p in read[name] if p[0] < p[1])
    assert [p[0] for p in parts] == [0] + [p[1] for p in parts[:-1]] and parts[-1][1] == x.size, (name, parts)
    assert len(parts) == min(8, -(-x.size // -(-x.size // 8)))
print("same")
"""


def test_the_same_state_with_every_byte_read_once() -> None:
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",
        "JAX_PLATFORMS": "cpu",
    }
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert run.stdout == "same\n", run.stderr[-3000:]
