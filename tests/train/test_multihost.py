"""Two processes: steps as of one device, and a whole run that stops and goes on in both alike."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from keysync_jax.train.events import read_events
from keysync_jax.train.watchdog import RESTART
from tests.train.synthetic_dataset import write_dataset
from tests.train.test_train_loop import lines, losses
from tests.train.tiny_training import CPU_FLAGS

ROOT = Path(__file__).parents[2]
LIMIT = 240
"""Seconds after which a process counts as hung: far more than it needs."""


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


class Pair:
    """`keysync train` as two processes of one device each."""

    def __init__(
        self,
        dataset: Path,
        workdir: Path,
        *overrides: str,
        lagging: bool = False,
        second: tuple[str, ...] = (),
    ):
        self.workdir, port = workdir, str(free_port())
        environment = os.environ | {"XLA_FLAGS": CPU_FLAGS, "JAX_PLATFORMS": "cpu"}
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        config = ["--config", "tests/train/smallest_config.py", f"--config.data.paths={dataset}"]
        run = [*config, "--workdir", str(workdir), "--config.log.preview_every=3", *overrides]
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.train.loop_worker"]
                + ["--lagging"] * (lagging and process == 1)
                + [str(process), "2", port, *run, *(second if process == 1 else ())],
                env=environment,
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for process in range(2)
        ]

    def wait_for_step(self, step: int) -> None:
        while len(lines(self.workdir)) < step:
            assert all(process.poll() is None for process in self.processes), self.end()
            time.sleep(0.05)

    def end(self) -> tuple[list[dict[str, Any]], list[str]]:
        """What both report, and their last words."""
        try:
            outputs = [process.communicate(timeout=LIMIT) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
        errors = [err[-3000:] for _, err in outputs]
        # What has failed ends at once, without a report; Gloo writes on stdout too.
        last = [(out.splitlines() or [""])[-1] for out, _ in outputs]
        codes = [{"code": process.returncode} for process in self.processes]
        found = zip(codes, last, strict=True)
        return [json.loads(line) if line[:1] == "{" else code for code, line in found], errors


def test_a_run_of_two_processes_stops_and_goes_on_as_one(tmp_path: Path) -> None:
    dataset, workdir = write_dataset(tmp_path / "data"), tmp_path / "run"
    pair = Pair(dataset, workdir, "--config.steps=1000")
    pair.wait_for_step(4)
    pair.processes[1].send_signal(signal.SIGTERM)
    reports, errors = pair.end()
    assert [report["code"] for report in reports] == [143, 143], errors
    done = len(lines(workdir))
    assert 4 <= done < 1000
    assert all(f"stopped at step {done} of 1000, which is saved" in error for error in errors)
    assert str(done) in {path.name for path in (workdir / "checkpoints").iterdir()}

    # All must be told the same; the one that was not is named.
    reports, errors = Pair(dataset, workdir, second=("--config.log.every=7",)).end()
    assert [report["code"] for report in reports] == [2, 2], errors
    assert all("process 1 on " in e and "was given another --config than process 0" in e for e in errors)
    assert "variables, process 1 of 2 on " in errors[1]
    assert "1 of 2 devices (cpu), 1 slice" in errors[1]

    # A host that is gone ends the others, with a code that asks for another start.
    pair = Pair(dataset, workdir, "--config.steps=1000")
    pair.wait_for_step(done + 2)
    pair.processes[1].kill()
    began = time.monotonic()
    reports, errors = pair.end()
    assert [report["code"] for report in reports] == [RESTART, -signal.SIGKILL], errors
    assert "another process of the run, or the way to it, is gone" in errors[0]
    assert time.monotonic() - began < 60
    stops = [event["reason"] for event in read_events(workdir) if event["event"] == "stop"]
    assert stops == ["SIGTERM", "another process was lost"]
    done = len(lines(workdir))  # It may have saved some of these.

    # Process 1 sees no checkpoint; the first one tells it where to go on, and that a seed is another one.
    reports, errors = Pair(dataset, workdir, "--config.seed=5", lagging=True).end()
    assert [report["code"] for report in reports] == [2, 2], errors
    assert all("this run was started with seed = 0, not 5" in error for error in errors)
    steps = f"--config.steps={done + 4}"
    reports, errors = Pair(dataset, workdir, steps, lagging=True).end()
    assert [report["code"] for report in reports] == [0, 0], errors

    # The same without a stop, in a folder of the same name, which the keys of compiled programs hold.
    stopped = workdir.rename(tmp_path / "stopped")
    shutil.copytree(stopped / "compiled", workdir / "compiled")
    reports, errors = Pair(dataset, workdir, steps).end()
    # What process 0 has compiled serves it again.
    assert [report["code"] for report in reports] == [0, 0], errors
    assert reports[0]["programs"] == 0, errors
    assert len(losses(workdir)) == done + 4
    assert losses(workdir) == losses(stopped)
    previews = [{path.name for path in (run / "previews").iterdir()} for run in (workdir, stopped)]
    assert previews[0] == previews[1] == {f"{step:08d}.mp4" for step in range(3, done + 5, 3)}
