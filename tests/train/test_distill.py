"""Distillation: what the teacher did is kept, a student learns it, and a killed job goes on bit for bit."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from keysync_jax.cli import main
from keysync_jax.config import GuidanceConfig, LogMelConfig, ModelConfig, StageConfig
from keysync_jax.data.records import Dataset
from keysync_jax.diffusion import precond
from keysync_jax.diffusion.schedule import ALIGN_YOUR_STEPS, STUDENTS
from keysync_jax.errors import UserError
from keysync_jax.model import network_shapes, open_model, save_model
from keysync_jax.pipeline.sampling import Windows, guidance_of, sample_windows, sigmas_of
from keysync_jax.train import trajectories as trajectories_module
from keysync_jax.train.checkpoint import settle_config
from keysync_jax.train.config import (
    CheckpointConfig,
    DataConfig,
    DistillConfig,
    InitConfig,
    LogConfig,
    LossConfig,
    OptimizerConfig,
    TrainConfig,
)
from keysync_jax.train.config_file import load_stage_config
from keysync_jax.train.distill import TrajectoryBatch, TrajectorySamples, huber, objective
from keysync_jax.train.export import export
from keysync_jax.train.loop import train
from keysync_jax.train.trajectories import Trajectories, trajectories
from tests.train.smallest_config import UNET, pretend_checkpoint, smallest
from tests.train.synthetic_dataset import write_dataset
from tests.train.tiny_training import parameters

LOGMEL = LogMelConfig(bands=4, context=0)
GRID = (700.0, 4.248)
STUDENT = DistillConfig(GRID, (700.0, 15.886, 4.248), clips=5)


@pytest.fixture(scope="module", autouse=True)
def small_parts() -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setattr(trajectories_module, "PART", 2)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of 4 steps, which is guided in the middle of its table."""
    keyframe = StageConfig("keyframe", "logmel", UNET, 4, 14, 8)
    wider = dataclasses.replace(UNET, in_channels=9)
    between = dataclasses.replace(keyframe, kind="interpolation", unet=wider)
    config = ModelConfig(
        keyframe,
        between,
        smallest().vae,
        {"logmel": LOGMEL},
        guidance=GuidanceConfig(audio_interval=(2, 20), identity_interval=(2, 20)),
        sigmas=(700.0, 15.886, 4.248, 1.789),
    )
    folder = tmp_path_factory.mktemp("teacher") / "model"
    names = ("keyframe", "interpolation", "vae")
    save_model(
        folder, config, {n: parameters(network_shapes(config, n).params, i) for i, n in enumerate(names)}
    )
    return folder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clips, of 40 and 31 frames."""
    folder = tmp_path_factory.mktemp("data") / "dataset"
    return write_dataset(folder, (40, 31), "logmel", audio=LOGMEL.sha256, dim=4)


def config_of(teacher: Path, dataset: Path, distill: DistillConfig = STUDENT, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = dict(
        stage=open_model(teacher, only=()).config.keyframe,
        vae=smallest().vae,
        init=InitConfig("keysync", str(teacher), str(teacher)),
        data=DataConfig((str(dataset),), sample_posterior=False),
        loss=LossConfig(pixel="none"),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup=2, frozen=()),
        checkpoint=CheckpointConfig(every=2, keep=2, keep_every=0),
        log=LogConfig(every=1),
        guidance=GuidanceConfig("none"),
        distill=distill,
        batch_size=2,
        steps=6,
        dtype="fp32",
        remat="none",
    )
    return TrainConfig(**(values | changes))


@pytest.fixture(scope="module")
def made(teacher: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Trajectories:
    """The keyframe stage's trajectories."""
    folder = tmp_path_factory.mktemp("trajectories") / "keyframe"
    return trajectories(config_of(teacher, dataset), [Dataset(dataset)], folder, False)


def test_a_record_is_what_the_teacher_did(made: Trajectories, teacher: Path) -> None:
    """The state at the highest level is the noise that the sampler begins with; it leads to the kept end."""
    assert len(made) == 5
    record, model = made.read(3), open_model(teacher)
    gt, mask = record["gt"].astype(np.float32), record["mask"].astype(np.float32)
    noise, reference = record["states"][0].astype(np.float32), record["reference"].astype(np.float32)
    windows = Windows(*(x[None] for x in (noise, record["audio"], reference, gt, mask)))
    sigmas = sigmas_of(model.config)
    given = guidance_of(model.config.guidance, sigmas), jnp.asarray(sigmas, jnp.float32)
    end = np.asarray(sample_windows(*model.load("keyframe"), windows, *given))[0]
    inside = np.broadcast_to(mask, end.shape) > 0
    assert 0.05 < inside.mean() < 0.95
    np.testing.assert_allclose(end[inside], record["end"][inside], atol=0.03)
    np.testing.assert_allclose(record["end"][~inside], record["gt"][~inside], atol=2e-3)
    levels = np.array(made.settings.levels, np.float32)
    states = record["states"].astype(np.float32) / precond.c_in(levels)[:, None, None, None, None]
    far = [np.abs(state - record["end"])[inside].mean() for state in states]
    assert far[0] > 10 * far[1] > 10 * far[2]


def test_a_killed_job_goes_on_and_is_equal_bit_for_bit(
    made: Trajectories, teacher: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, folder = config_of(teacher, dataset), tmp_path / "again"
    write = trajectories_module._Job.write
    written: list[int] = []

    def killed(job: Any, path: Path, part: int) -> None:
        if part == 1 and len(written) == 1:
            raise KeyboardInterrupt
        written.append(part)
        write(job, path, part)

    monkeypatch.setattr(trajectories_module._Job, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        trajectories(config, [Dataset(dataset)], folder, False)
    with pytest.raises(UserError, match="no complete trajectories"):
        Trajectories(folder)
    assert [path.name for path in folder.glob("*.arrayrecord")] == ["00000.arrayrecord"]
    written.append(-1)
    assert trajectories(config, [Dataset(dataset)], folder, False).sha256 == made.sha256
    assert written == [0, -1, 1, 2]
    with pytest.raises(UserError, match="holds trajectories of other settings"):
        trajectories(dataclasses.replace(config, seed=1), [Dataset(dataset)], folder, False)


class Echo:
    """A stage that answers F = c_in x, and notes what it hears."""

    def project_audio(self, audio: Any) -> Any:
        self.heard = audio
        return audio.mean(axis=2)

    def key_value(self, audio: Any) -> None:
        return None

    def __call__(self, x: Any, c_noise: Any, audio: Any, reference: Any, key_value: Any) -> Any:
        return x


def test_the_loss_is_that_of_the_end_within_the_mask() -> None:
    assert float(huber(jnp.float32(0.05), 0.1)) == pytest.approx(0.05**2 / 0.2)
    assert float(huber(jnp.float32(-3.0), 0.1)) == pytest.approx(3 - 0.05)
    rng = np.random.default_rng(0)
    state, gt = rng.standard_normal((2, 2, 3, 4, 4, 4)).astype(np.float16)
    mask = rng.integers(0, 2, (2, 3, 4, 4, 1)).astype(np.uint8)
    sigma = np.array(GRID, np.float32)
    s = sigma[:, None, None, None, None]
    # With F = c_in x, D = (1 - sigma) x / (1 + sigma^2).
    clean = (1 - s) / (1 + s**2) * state.astype(np.float32) * np.sqrt(1 + s**2)
    end = np.where(mask, clean + 2.0, 50.0).astype(np.float32)
    empty, audio = np.zeros((2, 0, 0, 1), np.uint8), rng.standard_normal((2, 3, 2, 5)).astype(np.float32)
    batch = TrajectoryBatch(
        state, sigma, end, gt, gt[:, :1], audio, mask, empty, empty, np.zeros(2, np.int32)
    )
    stage = Echo()
    loss, parts = objective(DistillConfig(), stage, None, batch)
    assert float(loss) == pytest.approx(2 - 0.05, rel=1e-3)
    assert float(parts["rmse"]) == pytest.approx(2, rel=1e-3)
    np.testing.assert_array_equal(stage.heard, audio)
    objective(DistillConfig(shuffle_voices=True), stage, None, batch)
    np.testing.assert_array_equal(stage.heard, audio[::-1])


def losses(workdir: Path) -> list[tuple[float, float]]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(row["loss"], row["grad_norm"]) for row in rows]


@pytest.fixture(scope="module")
def run(teacher: Path, dataset: Path, made: Trajectories, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished distillation of the keyframe stage, with both terms on pixels."""
    workdir = tmp_path_factory.mktemp("runs") / "student"
    assert train(with_pixels(teacher, dataset, made), workdir, show=False).step == 6
    return workdir


def with_pixels(teacher: Path, dataset: Path, made: Trajectories) -> TrainConfig:
    student = dataclasses.replace(STUDENT, decoded=0.5, truth=0.1, trajectories=str(made.folder))
    return config_of(teacher, dataset, student)


def test_a_run_that_was_cut_off_goes_through_the_same_losses(
    run: Path, teacher: Path, dataset: Path, made: Trajectories, tmp_path: Path
) -> None:
    """As after a kill, from the last checkpoint but one."""
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/6")
    assert train(with_pixels(teacher, dataset, made), tmp_path / "run", show=False).step == 6
    assert losses(tmp_path / "run") == losses(run)
    assert len(losses(run)) == 6


def test_a_student_is_a_model_like_any_other(run: Path, teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="one table"):
        export([run], tmp_path / "half", teacher)
    # A base whose interpolation stage is for the student's levels.
    shutil.copytree(teacher, tmp_path / "base")
    config = json.loads((teacher / "config.json").read_bytes())
    (tmp_path / "base/config.json").write_text(json.dumps(config | {"sigmas": GRID}))
    export([run], tmp_path / "student", tmp_path / "base")
    found = open_model(tmp_path / "student").config
    assert (found.sigmas, found.guidance) == (GRID, GuidanceConfig("none"))
    assert open_model(teacher).fingerprint in found.provenance["keyframe"]
    np.testing.assert_array_equal(sigmas_of(found), [*GRID, 0])
    with pytest.raises(UserError, match="distilled for 2 steps"):
        sigmas_of(found, 10)


def test_the_interpolation_stage_sees_the_student_s_keyframes(
    run: Path, teacher: Path, dataset: Path, tmp_path: Path
) -> None:
    """In every second stretch; the others, and all else, are the same with and without a student."""
    stage = open_model(teacher, only=()).config.interpolation
    made = []
    for name, student in (("teacher", ""), ("student", str(run))):
        distill = dataclasses.replace(STUDENT, clips=2, student=student)
        config = config_of(teacher, dataset, distill, stage=stage)
        made.append(trajectories(config, [Dataset(dataset)], tmp_path / name, False))
    assert [len(one) for one in made] == [5, 5]
    assert [bool(one.settings.student) for one in made] == [False, True]
    without, with_student = ([one.read(n) for n in range(5)] for one in made)
    same = [
        np.array_equal(a["reference"], b["reference"]) for a, b in zip(without, with_student, strict=True)
    ]
    first = same.count(True)
    assert first in (2, 3)
    assert same == [True] * first + [False] * (5 - first)
    for a, b in zip(without, with_student, strict=True):
        assert a["reference"].shape == (2, 8, 8, 4)
        np.testing.assert_array_equal(a["states"][0], b["states"][0])
        np.testing.assert_array_equal(a["audio"], b["audio"])


def test_settings_that_a_distillation_would_not_look_at(teacher: Path, dataset: Path) -> None:
    changes: tuple[tuple[dict[str, Any], str], ...] = (
        ({"loss": LossConfig()}, "loss.pixel='none', not 'l2'"),
        ({"guidance": GuidanceConfig()}, "without guidance"),
        ({"data": DataConfig(flip=0.5, sample_posterior=False)}, "data.flip=0"),
    )
    for wrong, sentence in changes:
        with pytest.raises(UserError, match=sentence):
            config_of(teacher, dataset, **wrong)
    with pytest.raises(UserError, match=r"16 is none of distill\.levels"):
        DistillConfig(grid=(700.0, 16.0))
    with pytest.raises(UserError, match="the highest first"):
        DistillConfig(grid=(4.248, 700.0))


def test_samples_are_functions_of_their_number(made: Trajectories, teacher: Path, dataset: Path) -> None:
    samples = TrajectorySamples(config_of(teacher, dataset), made)
    for a, b in zip(samples(7), samples(7), strict=True):
        np.testing.assert_array_equal(a, b)
    assert {float(samples(n).sigma) for n in range(12)} == {np.float32(sigma) for sigma in GRID}


def test_a_run_does_not_go_on_with_a_teacher_that_it_had_not(
    teacher: Path, dataset: Path, tmp_path: Path
) -> None:
    config = config_of(teacher, dataset)
    plain = dataclasses.replace(config, distill=None)
    for name, first, then in (("plain", plain, config), ("student", config, plain)):
        settle_config(tmp_path / name, first)
        pretend_checkpoint(tmp_path / name / "checkpoints/1")
        with pytest.raises(UserError, match="was started with distill"):
            settle_config(tmp_path / name, then)


def test_the_command_tells_what_a_distillation_takes(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["distill", "--teacher", "models/none", "--dry-run", "--config"]
    assert main([*command, "configs/distill_interpolation_tiny.py", "--config.distill.grid=700"]) == 0
    told = capsys.readouterr().out
    assert "stage             interpolation" in told
    assert "teacher           " in told
    assert "on H100s" in told
    assert main([*command, "configs/keyframe_tiny.py"]) == 2
    assert "says nothing of a student" in capsys.readouterr().err
    for stage, encoder in (("keyframe", "hubert"), ("interpolation", "wavlm")):
        config = load_stage_config(f"configs/distill_{stage}.py")
        assert (config.stage.kind, config.stage.audio_encoder) == (stage, encoder)
        assert config.distill == DistillConfig(clips=config.distill.clips if config.distill else 0)
    assert set(DistillConfig().levels) == set(STUDENTS[4]) <= set(ALIGN_YOUR_STEPS)
    assert DistillConfig().grid == STUDENTS[2]
