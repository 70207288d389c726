"""The loop: an interrupted run goes through the same losses, and what goes wrong is told in a sentence."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from keysync_jax.errors import UserError
from keysync_jax.train import loop
from keysync_jax.train.config import (
    CheckpointConfig,
    InitConfig,
    InitKind,
    LogConfig,
    OptimizerConfig,
    TrainConfig,
)
from keysync_jax.train.logs import animated_png
from keysync_jax.train.loop import Outcome, open_datasets, train
from tests.train.smallest_config import smallest
from tests.train.synthetic_dataset import CROP, write_dataset

ROOT = Path(__file__).parents[2]
STEPS = smallest().steps


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "dataset")


CACHE: dict[str, Any] = {
    "jax_persistent_cache_min_compile_time_secs": 0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Compiled programs are kept from one run to the next, in this process and in those of `command`."""
    settings = CACHE | {"jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled"))}
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield Path(settings["jax_compilation_cache_dir"])
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def command(dataset: Path, compiled: Path) -> Callable[..., "subprocess.Popen[str]"]:
    """Starts `keysync train` in a process of its own."""
    environment = os.environ | {name.upper(): str(value) for name, value in CACHE.items()}
    environment |= {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(compiled)}

    def start(workdir: Path, *overrides: str) -> "subprocess.Popen[str]":
        config = ["--config", "tests/train/smallest_config.py", f"--config.data.paths={dataset}"]
        command = [sys.executable, "-m", "keysync_jax.cli", "train", *config, "--workdir", str(workdir)]
        command += overrides
        return subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True)

    return start


def lines(workdir: Path) -> list[dict[str, Any]]:
    """The metrics so far; a line that is being written is left out."""
    path = workdir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def losses(workdir: Path) -> list[tuple[Any, ...]]:
    """Step, loss and gradient norm, to the last bit."""
    return [(line["step"], line["loss"], line["loss_latent"], line["grad_norm"]) for line in lines(workdir)]


def wait_for_step(process: "subprocess.Popen[str]", workdir: Path, step: int) -> None:
    while len(lines(workdir)) < step:
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.01)


@pytest.fixture(scope="module")
def uninterrupted(
    command: Callable[..., "subprocess.Popen[str]"], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    workdir = tmp_path_factory.mktemp("run") / "whole"
    process = command(workdir)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert [line["step"] for line in lines(workdir)] == list(range(1, STEPS + 1))
    return workdir


def test_metrics_have_the_losses_and_the_speed(uninterrupted: Path) -> None:
    last = lines(uninterrupted)[-1]
    parts = {"loss", "loss_latent", "loss_pixel", "grad_norm", "learning_rate"}
    speed = {"seconds_per_step", "samples_per_second", "tflops_per_device"}
    assert parts | speed | {"step"} <= last.keys()
    assert last["samples_per_second"] == pytest.approx(2 / last["seconds_per_step"])
    assert last["learning_rate"] == pytest.approx(1e-3)
    assert list((uninterrupted / "tensorboard").glob("events.*"))


def test_killed_in_the_middle(command: Any, uninterrupted: Path, tmp_path: Path) -> None:
    process = command(tmp_path / "run")
    wait_for_step(process, tmp_path / "run", 13)
    process.kill()
    process.communicate()
    assert len(lines(tmp_path / "run")) < STEPS
    process = command(tmp_path / "run")
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert losses(tmp_path / "run") == losses(uninterrupted)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stopped_by_a_signal(
    command: Any, uninterrupted: Path, tmp_path: Path, number: int, code: int
) -> None:
    workers = "--config.data.workers=2"
    process = command(tmp_path / "run", workers)
    wait_for_step(process, tmp_path / "run", 7)
    process.send_signal(number)
    _, errors = process.communicate()
    done = len(lines(tmp_path / "run"))
    assert process.returncode == code, errors
    assert f"stopped at step {done} of {STEPS}, which is saved; the same command goes on" in errors
    assert (tmp_path / "run/checkpoints" / str(done)).is_dir()
    process = command(tmp_path / "run", workers)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert losses(tmp_path / "run") == losses(uninterrupted)


@pytest.fixture
def config(dataset: Path) -> TrainConfig:
    return with_data(smallest(), dataset)


def with_data(config: TrainConfig, dataset: Path, **data: Any) -> TrainConfig:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, paths=(str(dataset),), **data))


def test_a_run_knows_its_data_by_content(
    config: TrainConfig, dataset: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    place, moved, run = (tmp_path / name for name in ("place", "moved", "run"))
    shutil.copytree(dataset, place)
    assert train(dataclasses.replace(with_data(config, place), steps=5), run, show=False) == Outcome(5)
    place.rename(moved)
    write_dataset(place, lengths=(31, 40))
    before = (run / "config.json").read_bytes()
    with pytest.raises(UserError, match=r"place: is not the dataset that .*/run was started with"):
        train(dataclasses.replace(with_data(config, place), steps=8), run, show=False)
    assert (run / "config.json").read_bytes() == before
    assert train(dataclasses.replace(with_data(config, moved), steps=8), run, show=False) == Outcome(8)
    assert losses(run) == losses(uninterrupted)[:8]


def test_a_loss_that_is_not_finite(config: TrainConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(
        config,
        optimizer=OptimizerConfig(learning_rate=1e30, warmup=0, clip=0.0),
        checkpoint=CheckpointConfig(every=1),
    )
    sentence = r"step 2: loss_latent is (nan|inf), so training stopped; the checkpoint of step 1 is good"
    with pytest.raises(UserError, match=sentence):
        train(config, tmp_path, show=False)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["1"]


def test_more_steps_previews_and_means(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = dataclasses.replace(
        config,
        steps=2,
        log=LogConfig(every=2, preview_every=2, preview_clip=1, wandb=True),
        optimizer=dataclasses.replace(config.optimizer, ema=0.9),
    )
    assert train(config, tmp_path, show=False) == Outcome(2)
    assert train(config, tmp_path, show=False) == Outcome(2)
    assert train(dataclasses.replace(config, steps=5), tmp_path, show=False) == Outcome(5)
    assert [line["step"] for line in lines(tmp_path)] == [2, 4, 5]
    assert [p.name for p in sorted((tmp_path / "previews").iterdir())] == ["00000002.mp4", "00000004.mp4"]
    assert preview_size(tmp_path / "previews/00000004.mp4") == (3, CROP, 4 * CROP)
    events = b"".join(p.read_bytes() for p in (tmp_path / "tensorboard").iterdir())
    assert events.count(b"acTL") == 2


def preview_size(path: Path) -> tuple[int, int, int]:
    import av

    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return (len(frames), *frames[0].shape[:2])


def test_an_animated_picture_keeps_its_pixels() -> None:
    import io

    import av

    frames = np.random.default_rng(0).integers(0, 256, (3, 6, 10, 3), np.uint8)
    with av.open(io.BytesIO(animated_png(frames)), format="apng") as container:
        back = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    np.testing.assert_array_equal(back, frames)


def test_what_does_not_fit_is_refused(config: TrainConfig, dataset: Path, tmp_path: Path) -> None:
    def refused(config: TrainConfig, sentence: str, folder: Path = tmp_path / "run") -> None:
        with pytest.raises(UserError, match=sentence):
            train(config, folder, show=False)

    refused(smallest(), r"data.paths is empty")
    other = write_dataset(tmp_path / "other", encoder="wavlm")
    refused(with_data(config, other), "was prepared with wavlm features, the config asks for hubert")
    preview = dataclasses.replace(config, log=LogConfig(preview_every=1, preview_clip=2))
    refused(preview, "has 2 clips, not a 2")
    short = write_dataset(tmp_path / "short", lengths=(4,))
    refused(with_data(config, short), "none of its 1 clips can be used")
    refused(dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, data=3)), r"mesh.data=3")
    (tmp_path / "file").write_text("")
    refused(config, "cannot be written", tmp_path / "file/run")


@pytest.mark.parametrize(("kind", "encoder"), [("svd", "v"), ("keysync", "s")])
def test_data_of_another_model_is_refused(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: InitKind, encoder: str
) -> None:
    def hashes(folder: str, only: object = None) -> SimpleNamespace:
        letter = Path(folder).name[0]
        return SimpleNamespace(hashes={f"{n}.safetensors": letter * 64 for n in ("vae", "audio_hubert")})

    def opened(name: str, vae: str, audio: str) -> None:
        data = write_dataset(tmp_path / name, vae=vae * 64, audio=audio * 64)
        open_datasets(dataclasses.replace(with_data(config, data), init=init))

    monkeypatch.setattr(loop, "open_model", hashes)
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae/vae.safetensors").touch()
    init = InitConfig(kind, str(tmp_path / "stage"), str(tmp_path / "vae"))
    opened("same", "v", encoder)
    with pytest.raises(UserError, match=r"was prepared with another vae.safetensors than the model"):
        opened("vae_of_another", "x", encoder)
    with pytest.raises(UserError, match=r"was prepared with another audio_hubert.safetensors than the model"):
        opened("encoder_of_another", "v", "x")


def test_datasets_of_a_run_must_be_alike(config: TrainConfig, tmp_path: Path) -> None:
    paths = tuple(str(write_dataset(tmp_path / n, vae=n * 64)) for n in "ab")
    both = dataclasses.replace(config, data=dataclasses.replace(config.data, paths=paths))
    with pytest.raises(UserError, match=r"/a and .*/b: were prepared with different vae.safetensors"):
        open_datasets(both)
