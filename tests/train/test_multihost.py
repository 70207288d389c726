"""Two processes of two devices each take the same steps as one device."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

from tests.train.tiny_training import CPU_FLAGS

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def worker(devices: int, *arguments: str) -> subprocess.Popen[str]:
    flags = f"--xla_force_host_platform_device_count={devices} {CPU_FLAGS}"
    return subprocess.Popen(
        [sys.executable, "-m", "tests.train.mesh_worker", *arguments],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_processes_of_two_devices() -> None:
    port = str(free_port())
    workers = [worker(2, port, str(process), "2", "2,2") for process in range(2)]
    workers.append(worker(1, "1,1"))
    try:
        outputs = [w.communicate(timeout=300) for w in workers]
    finally:
        for w in workers:
            w.kill()
    assert [w.returncode for w in workers] == [0, 0, 0], "".join(err[-2000:] for _, err in outputs)
    first, second, single = (next(iter(json.loads(out.splitlines()[-1]).values())) for out, _ in outputs)
    assert first["losses"] == second["losses"]
    np.testing.assert_allclose(first["losses"], single["losses"], rtol=1e-5)
    assert first["bytes"] == first["measured"] < 0.51 * single["bytes"]
