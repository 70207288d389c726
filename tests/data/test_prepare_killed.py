"""kill -9 in the middle of a command: no worker outlives it, and the next run leaves nothing of it behind."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from keysync_jax.data.prepare import PrepareSettings, check, prepare
from keysync_jax.synthetic.write import SynthSettings, synth
from tests.clips import face_landmarks
from tests.data.preparing import add_clip, contents
from tests.processes import children, hidden_names, is_alive, wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


def kill_in_the_middle(arguments: list[str], is_under_way: Callable[[], object]) -> None:
    """Starts a command with two workers, kills it, and waits until all its processes have ended."""
    command = [sys.executable, "-m", "keysync_jax.cli", *arguments, "--workers", "2"]
    with subprocess.Popen(
        command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, stderr=subprocess.DEVNULL
    ) as run:
        wait_until(lambda: is_under_way() or run.poll() is not None, 60, "workers are at it")
        started = children(run.pid)
        assert len(started) >= 2, "it had ended already"
        run.kill()
    wait_until(lambda: not any(is_alive(pid) for pid in started), 5, "its workers have ended")


def test_prepare(tmp_path: Path) -> None:
    for name in ("a", "b"):
        add_clip(tmp_path / "clips", name, 400, face_landmarks(400))
    output, crops = tmp_path / "dataset", tmp_path / "dataset/.work/crops"
    arguments = ["prepare", str(tmp_path / "clips"), "-o", str(output), "--crop", "64"]
    kill_in_the_middle(arguments, lambda: crops.is_dir() and len(hidden_names(crops)) == 2)
    # As if it had been killed while it wrote a part, a mark or a shard.
    for name in (
        ".work/parts/.p.arrayrecord",
        ".work/.plan.json",
        ".shard-00000.arrayrecord",
        ".report.json",
    ):
        path = output / f"{name}.0123abcd.partial{Path(name).suffix}"
        path.touch()
    assert prepare(tmp_path / "clips", output, settings=PrepareSettings(crop=64)).done == 2
    assert hidden_names(output) == []
    check(output)
    assert set(contents(output)) == {
        "manifest.json",
        "report.json",
        "shard-00000.arrayrecord",
        "sources.json",
    }


def test_synth(tmp_path: Path) -> None:
    output = tmp_path / "clips"
    kill_in_the_middle(
        ["synth", "-n", "6", "--seconds", "1", "-o", str(output)],
        lambda: (output / "clip-00000.mp4").is_file() and hidden_names(output),
    )
    # The killed workers were at other clips than those that are asked for now.
    made = len(list(output.glob("clip-*.mp4")))
    assert made < 6
    (output / ".clip-00005.mp4.0123abcd.partial.mp4").touch()
    synth(output, SynthSettings(clips=made, seconds=1))
    assert hidden_names(output) == []
