"""A command that is stopped by a signal ends in order, and one that is killed leaves nothing for good."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from keysync_jax.cli import main
from keysync_jax.cli.stopping import Stopped, stopping_in_order
from tests.clips import face_landmarks, write_video, write_voice

FRAMES = 30

DUB = """
import sys, time
import numpy as np
from keysync_jax.cli import main
from keysync_jax.media.writer import VideoWriter
from keysync_jax.model import Model, Network
from keysync_jax.pipeline import dub, generate

# Of the networks the VAE alone: the others take half a minute, and write no file.
load = Model.load
Model.load = lambda model, name, dtype: load(model, name, dtype) if name == "vae" else Network(None, {})
Model.load_encoder = lambda model, kind: {}
dub.programs = lambda *_: {}
dub.audio_features = lambda config, params, wave, frames: np.zeros((frames, 2, 768), np.float32)
generate.sample_windows = lambda graphdef, params, windows, *_: windows.noise
write, wait = VideoWriter.write, sys.argv[1] == "wait"

def write_and_wait(writer, frame):
    write(writer, frame)
    if wait and writer.frames == 3:
        print("composing", flush=True)
        time.sleep(600)

VideoWriter.write = write_and_wait
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    write_voice(folder / "voice.wav", 0.6)
    write_video(folder / "video.mp4", FRAMES)
    np.save(folder / "landmarks.npy", face_landmarks(FRAMES))
    return folder


def call(clip: Path, model: Path, output: Path) -> list[str]:
    options = ["--model", str(model), "--landmarks", str(clip / "landmarks.npy")]
    return ["dub", str(clip / "video.mp4"), str(clip / "voice.wav"), "-o", str(output), *options]


def started(how: str, command: list[str]) -> "subprocess.Popen[str]":
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [sys.executable, "-c", DUB, how, *command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@contextmanager
def composing(command: list[str]) -> Iterator["subprocess.Popen[str]"]:
    """A process that runs the command and waits while it writes the video."""
    with started("wait", command) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "composing\n", process.communicate()[1]
            yield process
        finally:
            process.kill()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_dub_that_is_stopped_or_killed_goes_on(clip: Path, tiny_model: Path, tmp_path: Path) -> None:
    command = call(clip, tiny_model, tmp_path / "out.mp4")
    with composing(command) as process:
        partial, *kept = names(tmp_path)
        assert partial.endswith(".partial.mp4")
        assert kept == [".out.mp4.work", ".out.mp4.work.lock"]
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGTERM)  # as `timeout` does
        _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    last = "keysync: stopped by SIGTERM; the same command goes on where this one was"
    assert error.strip().splitlines()[-1] == last
    assert "Traceback" not in error
    assert names(tmp_path) == [".out.mp4.work"]
    with composing(command) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert len(names(tmp_path)) == 3
    with started("go", command) as process:
        _, error = process.communicate()
    assert process.returncode == 0, error
    assert names(tmp_path) == ["out.mp4"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_command_that_is_stopped_ends_its_files(tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "keysync_jax.cli", "synth", "-n", "1000", "-o", str(tmp_path)]
    with subprocess.Popen([*command, "--seconds", "0.8"], stderr=subprocess.PIPE, text=True) as process:
        while not (tmp_path / "clip-00000.mp4").is_file():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert f"stopped by {number.name}; the same command goes on" in error
    assert not [name for name in names(tmp_path) if name.startswith(".")]


def test_the_first_signal_stops_and_the_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    ended = []

    def work() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.01)
            ended.append(True)

    with pytest.raises(Stopped, match="stopped by SIGTERM") as stopped, stopping_in_order():
        work()
    assert ended
    assert stopped.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before


def test_signals_that_are_ignored_stay_so(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping_in_order():
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.01)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_in_another_thread_is_left_alone() -> None:
    entered = []

    def run() -> None:
        with stopping_in_order():
            entered.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert entered == [signal.getsignal(signal.SIGTERM)]


def test_a_machine_that_fails_gets_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> int:
        raise OSError(24, "Too many open files", "clip.mp4")

    monkeypatch.setattr("keysync_jax.cli.data._synth", fail)
    assert main(["synth", "-n", "1", "-o", "x"]) == 2
    assert capsys.readouterr().err == (
        "keysync: clip.mp4: Too many open files; raise the limit (ulimit -n); "
        "the same command goes on where this one was\n"
    )
