"""Preparing on a local Ray cluster, one of whose actors is killed in the middle of a clip."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from keysync_jax.cli import main
from keysync_jax.data.from_precomputed import FromPrecomputed
from keysync_jax.data.prepare import prepare
from keysync_jax.data.settings import PrepareSettings
from keysync_jax.errors import UserError
from keysync_jax.launch.ray_prepare import OnRay
from tests.data.preparing import add_clip


def test_an_actor_that_is_killed_loses_and_doubles_no_clip(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    pytest.importorskip("psutil")
    command = [sys.executable, "-m", "tests.launch.ray_worker", "prepare", str(tmp_path)]
    options = ["--clips", "4", "--kills", "0", "--crop", "32"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    run = subprocess.run([*command, *options], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["killed"] == ["once"]
    assert found["ray: all files equal"]
    assert len(set(found["content"].values())) == 1
    assert found["clips, each once"] == {"1": 4}
    assert found["left behind"] == ["manifest.json", "report.json", "shard-00000.arrayrecord", "sources.json"]


def test_what_is_only_packed_needs_no_cluster() -> None:
    with pytest.raises(UserError, match="--ray is not needed"):
        OnRay(FromPrecomputed.__new__(FromPrecomputed))


def test_what_is_of_one_machine_is_not_ignored(tmp_path: Path) -> None:
    add_clip(tmp_path / "clips", "a", 15)
    for changes in ({"workers": 2}, {"devices": 1}):
        settings = PrepareSettings(crop=16, **changes)
        with pytest.raises(UserError, match="leave --workers and --devices out"):
            prepare(tmp_path / "clips", tmp_path / "out", settings=settings, elsewhere=OnRay)


def test_the_command_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    add_clip(tmp_path / "clips", "a", 15)
    monkeypatch.setitem(sys.modules, "ray", None)
    command = ["prepare", str(tmp_path / "clips"), "-o", str(tmp_path / "out"), "--crop", "16", "--ray"]
    assert main(command) == 2
    assert "needs ray, which is not installed: pip install 'keysync_jax[ray]'" in capsys.readouterr().err
