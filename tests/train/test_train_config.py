"""Configs, their overrides, the config that a run keeps, and the dry run."""

import argparse
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from keysync_jax.cli import main
from keysync_jax.config import to_dict
from keysync_jax.errors import UserError
from keysync_jax.launch.train import add_arguments, run
from keysync_jax.nn.functional import shapes
from keysync_jax.nn.vae import VAE
from keysync_jax.train.checkpoint import read_config, settle_config
from keysync_jax.train.config import MeshConfig, TrainConfig, VAETrainConfig
from keysync_jax.train.config_file import load_config
from keysync_jax.train.dry_run import dry_run
from keysync_jax.train.mesh import make_mesh
from tests.train.smallest_config import pretend_checkpoint

NAMES = ("keyframe", "interpolation", "keyframe_tiny", "interpolation_tiny")


def load(*overrides: str, config: str = "tests/configs/keyframe_toy.py") -> TrainConfig:
    return load_config(config, [f"--config.{o}" for o in overrides])


@pytest.mark.parametrize("name", NAMES)
def test_a_config_loads_from_a_checkout_and_from_the_package(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = load_config(Path(__file__).parents[2] / "configs" / f"{name}.py")
    monkeypatch.chdir(tmp_path)
    assert here == load_config(f"configs/{name}.py") == load_config(f"{name}.py")
    assert here.stage.kind == name.removesuffix("_tiny")
    channels = here.vae.latent_channels
    assert here.stage.unet.in_channels == 2 * channels + (here.stage.kind == "interpolation")
    assert here.stage.unet.out_channels == channels


def test_full_size_is_the_papers_table() -> None:
    key, between = load(config="configs/keyframe.py"), load(config="configs/interpolation.py")
    assert (key.steps, key.optimizer.learning_rate) == (60_000, 1e-5)
    assert (between.steps, between.optimizer.learning_rate) == (120_000, 3e-5)
    for config in (key, between):
        assert (config.batch_size, config.optimizer.warmup, config.loss.pixel_weight) == (32, 1000, 1.0)
        assert (config.init.kind, config.loss.pixel, config.dtype) == ("svd", "l2", "bf16")


def test_overrides_take_the_type_of_what_they_replace() -> None:
    config = load(
        "steps=1_000",
        "optimizer.learning_rate=2e-5",
        "log.wandb=True",
        "data.paths=a/b,c",
        "data.weights=0.25,0.75",
        "init.vae=1234",
        'mesh.rules=((".*kernel", ("data", "")),)',
        "optimizer.frozen=",
        "loss.pixel=l1",
    )
    assert config.steps == 1000
    assert config.optimizer.learning_rate == 2e-5
    assert config.log.wandb is True
    assert config.data.paths == ("a/b", "c")
    assert config.data.weights == (0.25, 0.75)
    assert config.init.vae == "1234"
    assert config.mesh.rules == ((".*kernel", ("data", "")),)
    assert config.optimizer.frozen == ()
    assert config.loss.pixel == "l1"


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("optimizer.learning_rat=1", "unknown key 'learning_rat', did you mean 'learning_rate'?"),
        ("optimiser.ema=1", "unknown key 'optimiser', did you mean 'optimizer'?"),
        ("steps.every=1", "'steps' is a value, it has no keys"),
        ("optimizer=1", "this is a section"),
        ("steps=1.5", "'1.5' is not a whole number"),
        ("optimizer.ema=much", "'much' is not a number"),
        ("log.wandb=1", "'1' is neither true nor false"),
        ("log.wandb", "write --config.key=value"),
        ("loss.pixel=l3", "'l3' is not 'none' or 'l2'"),
        ("data.weights=1,2", "data.weights has 2 entries for 0 data.paths"),
    ],
)
def test_an_override_that_cannot_be_is_refused(override: str, sentence: str) -> None:
    with pytest.raises(UserError) as error:
        load(override)
    assert sentence in str(error.value)


LEAST = {
    1: ("steps", "batch_size", "checkpoint.every", "checkpoint.keep", "log.every", "optimizer.accumulate"),
    0: ("seed", "optimizer.warmup", "checkpoint.keep_every", "log.preview_every", "data.workers"),
}


@pytest.mark.parametrize(("least", "name"), [(n, name) for n, names in LEAST.items() for name in names])
def test_a_number_that_is_too_small_is_refused(least: int, name: str) -> None:
    load(f"{name}={least}")
    with pytest.raises(UserError, match=f"^{name} must be {least} or more, not {least - 1}"):
        load(f"{name}={least - 1}")


@pytest.mark.parametrize("name", ["data.flip", "data.pitch", "loss.drop_audio", "loss.drop_reference"])
def test_a_probability_is_from_0_to_1(name: str) -> None:
    for value in ("0", "1"):
        load(f"{name}={value}")
    for value in ("-0.1", "1.1", "nan"):
        with pytest.raises(UserError, match=f"^{name} is a probability, from 0 to 1, not {value}"):
            load(f"{name}={value}")


@pytest.mark.parametrize(
    ("name", "values", "sentence"),
    [
        ("loss.p_std", ("0", "-1", "nan"), "must be above 0"),
        ("optimizer.learning_rate", ("0", "-1", "nan"), "must be above 0"),
        ("optimizer.ema", ("-0.1", "1", "nan"), "must be 0 or more and below 1"),
    ],
)
def test_a_value_out_of_range_is_refused(name: str, values: tuple[str, ...], sentence: str) -> None:
    for value in values:
        with pytest.raises(UserError, match=f"^{name} {sentence}, not {value}"):
            load(f"{name}={value}")


def test_a_file_that_is_no_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such config file"):
        load_config(tmp_path / "configs/keyframe.py")
    for text, sentence in (("x = 1", r"has no get_config\(\)"), ("x =", "cannot be read")):
        (tmp_path / "config.py").write_text(text)
        with pytest.raises(UserError, match=sentence):
            load_config(tmp_path / "config.py")


def test_a_run_goes_on_with_what_it_was_started_with(tmp_path: Path) -> None:
    settle_config(tmp_path / "run", load("seed=3"))
    pretend_checkpoint(tmp_path / "run/checkpoints/10")
    assert read_config(tmp_path / "run") == load("seed=3")
    later = load("seed=3", "steps=99", "log.every=7", "checkpoint.keep=9", "mesh.fsdp=2", "data.workers=2")
    init = dataclasses.replace(later.init, kind="svd", path="moved")
    later = dataclasses.replace(later, init=init)
    settle_config(tmp_path / "run", later)
    assert read_config(tmp_path / "run") == later
    changes = ("seed=4", "batch_size=4", "data.flip=0.5", "stage.unet.head_dim=32")
    for change in (*changes, "init.vae=a", "init.lpips_trunk=a", "init.lpips_heads=a"):
        name, _, _ = change.partition("=")
        with pytest.raises(UserError, match=rf"was started with {name} = "):
            settle_config(tmp_path / "run", load("seed=3", change) if name != "seed" else load(change))
    (tmp_path / "run/config.json").write_text("{}")
    with pytest.raises(UserError, match="not the config of a training run"):
        settle_config(tmp_path / "run", later)
    with pytest.raises(UserError, match="not the folder of a training run"):
        read_config(tmp_path)


def test_a_run_from_before_drops_by_frame_goes_on_dropping_by_clip(tmp_path: Path) -> None:
    settle_config(tmp_path, load())
    pretend_checkpoint(tmp_path / "checkpoints/10")
    old = json.loads((tmp_path / "config.json").read_text())
    del old["loss"]["drop_reference_by"]
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert not read_config(tmp_path).drops_by_frame  # type: ignore[union-attr]
    with pytest.raises(UserError, match=r"started with loss.drop_reference_by = 'clip', not 'auto'"):
        settle_config(tmp_path, load())
    settle_config(tmp_path, load("loss.drop_reference_by=clip"))


def test_a_run_without_a_checkpoint_takes_other_settings(tmp_path: Path) -> None:
    settle_config(tmp_path, load("batch_size=2"))
    (tmp_path / "checkpoints/10.orbax-checkpoint-tmp").mkdir(parents=True)
    settle_config(tmp_path, load("batch_size=4"))
    assert read_config(tmp_path) == load("batch_size=4")
    # A folder of something else keeps its config.
    (tmp_path / "config.json").write_text('{"format": "keysync-1"}')
    with pytest.raises(UserError, match="not the config of a training run"):
        settle_config(tmp_path, load())


def test_the_effective_config_is_json(tmp_path: Path) -> None:
    settle_config(tmp_path, load("steps=7"))
    content = json.loads((tmp_path / "config.json").read_text())
    assert content.pop("format") == "keysync-run-1"
    assert content == to_dict(load("steps=7"))


def test_full_size_dry_run(golden: Path) -> None:
    plan = dry_run(load("mesh.data=2", "mesh.fsdp=4", config="configs/keyframe.py"), devices=8)
    listed = json.loads((golden / "manifest_full.json").read_text())["tensors"]["keyframe"]
    assert plan.trainable + plan.frozen == sum(math.prod(shape) for shape in listed.values())
    frozen = [k for k in listed if "time_" in k and "time_embed" not in k]
    assert plan.frozen == sum(math.prod(listed[k]) for k in frozen)
    parts = {p.name: p for p in plan.parts}
    assert parts["trainable"].bytes_whole == 4 * plan.trainable
    assert parts["optimizer"].bytes_whole == pytest.approx(8 * plan.trainable, rel=1e-6)
    assert parts["optimizer"].bytes_device == pytest.approx(2 * plan.trainable, rel=0.01)
    assert parts["batch"].bytes_device == parts["batch"].bytes_whole / 8
    # Forward and backward of 448 frames: between 1 and 10 TFLOP a frame.
    assert 448e12 < plan.flops < 4480e12
    assert "trainable 869,661,380" in plan.table()


def test_dry_run_of_a_vae(capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config("configs/vae_tiny.py", ["--config.optimizer.kind=adamw"])
    assert isinstance(config, VAETrainConfig)
    plan = dry_run(config, devices=4)
    count = sum(math.prod(x.shape) for x in shapes(lambda rngs: VAE(config.vae, rngs=rngs))[1].values())
    assert (plan.trainable, plan.frozen) == (count, 0)
    parts = {p.name: p for p in plan.parts}
    assert set(parts) == {"trainable", "optimizer", "moving average", "batch"}
    assert parts["trainable"].bytes_whole == parts["moving average"].bytes_device == 4 * count
    assert parts["optimizer"].bytes_whole == pytest.approx(8 * count, rel=1e-4)
    assert parts["batch"].bytes_device == 32 * 128 * 128 * 4 / 4
    halved = load_config("configs/vae_tiny.py", ["--config.batch_size=16"])
    assert plan.flops == pytest.approx(2 * dry_run(halved).flops, rel=1e-6)
    argv = ["train", "--config", "configs/vae_tiny.py", "--dry-run", "--devices", "4"]
    assert main([*argv, "--config.mesh.fsdp=2"]) == 0
    table = capsys.readouterr().out
    assert "VAE               128 pixels to 16 x 16 x 8, tf32, remat none" in table
    assert "data 2 x fsdp 2 = 4 devices, 32 frames a step" in table
    assert f"trainable {count:,}, frozen 0" in table


def test_dry_run_of_lpips_needs_no_weights() -> None:
    plan = dry_run(load("loss.pixel=lpips"))
    parts = {p.name: p for p in plan.parts}
    # torchvision's VGG16 without its classifier has 14,714,688 parameters, the heads 1,472 weights.
    assert parts["LPIPS"].bytes_whole == 4 * (14_714_688 + 64 + 128 + 256 + 512 + 512)
    with pytest.raises(UserError, match="trunk"):
        dry_run(load("loss.pixel=lpips", "init.lpips_trunk=no_trunk.pth"))


def test_dry_run_of_a_mesh_that_does_not_fit() -> None:
    with pytest.raises(UserError, match="mesh"):
        dry_run(load("mesh.data=3"), devices=8)
    with pytest.raises(UserError, match="2 samples cannot be split"):
        dry_run(load(), devices=8)


@dataclasses.dataclass(frozen=True)
class Device:
    """What a mesh asks a device for."""

    process_index: int
    id: int
    platform: str = "cpu"
    device_kind: str = "cpu"


def test_a_mesh_is_in_process_order() -> None:
    places = [(1, 3), (0, 2), (1, 1), (0, 0)]
    devices: list[Any] = [Device(*place) for place in places]
    grid = make_mesh(MeshConfig(2, 2), 4, devices).devices
    assert [(d.process_index, d.id) for d in grid.flat] == [(0, 0), (0, 2), (1, 1), (1, 3)]


def test_the_command_prints_the_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    overrides = ["--config.batch_size=8"]
    rest = ["--config", "tests/configs/keyframe_toy.py", "--dry-run", "--devices", "8"]
    assert run(parser.parse_args(rest), overrides) == 0
    assert "data 8 x fsdp 1 = 8 devices, 8 clips a step" in capsys.readouterr().out
    with pytest.raises(UserError, match="--devices goes with --dry-run"):
        run(parser.parse_args([*rest[:2], "--workdir", "x", "--devices", "1"]), overrides)
    with pytest.raises(UserError, match=r"--workdir gs://bucket/run: .*keysync_jax\[gcs\]"):
        run(parser.parse_args([*rest[:2], "--workdir", "gs://bucket/run"]), overrides)
    with pytest.raises(UserError, match="--workdir is missing"):
        run(parser.parse_args(rest[:2]), overrides)
    with pytest.raises(UserError, match="go together"):
        run(parser.parse_args([*rest[:2], "--workdir", "x", "--processes", "2"]), overrides)
