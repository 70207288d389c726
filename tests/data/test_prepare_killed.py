"""A signal in the middle of a command: no worker outlives it, and the next run leaves nothing of it."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from keysync_jax.data.prepare import PrepareSettings, check, prepare
from keysync_jax.synthetic.write import SynthSettings, synth
from tests.clips import face_landmarks
from tests.data.preparing import add_clip, contents
from tests.processes import children, hidden_names, is_alive, wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


def end_in_the_middle(
    arguments: list[str], is_under_way: Callable[[int], object], number: signal.Signals
) -> tuple[int, str]:
    """Starts a command with two workers, sends it a signal, and waits until all its processes have ended.

    Returns:
      Its exit code, and what it wrote on stderr.
    """
    command = [sys.executable, "-m", "keysync_jax.cli", *arguments, "--workers", "2"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as run:
        wait_until(lambda: is_under_way(run.pid) or run.poll() is not None, 120, "workers are at it")
        started = children(run.pid)
        assert len(started) >= 2, "it had ended already"
        run.send_signal(number)
        _, errors = run.communicate()
    wait_until(lambda: not any(is_alive(pid) for pid in started), 10, "its workers have ended")
    return run.returncode, errors


def crops_in_memory(pid: int) -> list[Path]:
    """Files in memory of a process into which workers have written crops."""
    found = []
    for held in Path(f"/proc/{pid}/fd").glob("*"):
        with suppress(OSError):
            if os.readlink(held).startswith("/memfd:crops") and held.stat().st_size:
                found.append(held)
    return found


def end_prepare(folder: Path, number: signal.Signals) -> tuple[Path, Path, int, str]:
    """Ends `prepare` while its workers cut two clips: the clips, the dataset, exit code and stderr."""
    source, output = folder / "clips", folder / "dataset"
    for name in ("a", "b"):
        add_clip(source, name, 400, face_landmarks(400))
    arguments = ["prepare", str(source), "-o", str(output), "--crop", "64"]
    ended = end_in_the_middle(arguments, lambda pid: len(crops_in_memory(pid)) == 2, number)
    return source, output, *ended


def test_prepare_that_is_killed(tmp_path: Path) -> None:
    source, output, code, _ = end_prepare(tmp_path, signal.SIGKILL)
    assert code == -signal.SIGKILL
    # As if it had been killed while it wrote a part, a mark or a shard.
    for name in (
        ".work/parts/.p.arrayrecord",
        ".work/.plan.json",
        ".shard-00000.arrayrecord",
        ".report.json",
    ):
        (output / f"{name}.0123abcd.partial{Path(name).suffix}").touch()
    assert prepare(source, output, settings=PrepareSettings(crop=64)).done == 2
    assert hidden_names(output) == []
    check(output)
    assert set(contents(output)) == {
        "manifest.json",
        "report.json",
        "shard-00000.arrayrecord",
        "sources.json",
    }


def test_prepare_that_is_told_to_stop(tmp_path: Path) -> None:
    _, output, code, errors = end_prepare(tmp_path, signal.SIGTERM)
    assert code == 128 + signal.SIGTERM
    assert "the same command goes on where this one was" in errors
    assert "Traceback" not in errors
    assert hidden_names(output) == [".work"]


def test_synth_that_is_killed(tmp_path: Path) -> None:
    output = tmp_path / "clips"
    end_in_the_middle(
        ["synth", "-n", "6", "--seconds", "1", "-o", str(output)],
        lambda _: (output / "clip-00000.mp4").is_file() and hidden_names(output),
        signal.SIGKILL,
    )
    # The killed workers were at other clips than those that are asked for now.
    made = len(list(output.glob("clip-*.mp4")))
    assert made < 6
    (output / ".clip-00005.mp4.0123abcd.partial.mp4").touch()
    synth(output, SynthSettings(clips=made, seconds=1))
    assert hidden_names(output) == []
