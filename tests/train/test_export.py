"""From a run to a model directory, bit for bit."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from keysync_jax.config import ModelConfig, StageKind
from keysync_jax.data.records import Dataset
from keysync_jax.errors import UserError
from keysync_jax.model import components, open_model
from keysync_jax.train.checkpoint import Checkpoints, settle_config
from keysync_jax.train.config import DataConfig, InitConfig, TrainConfig
from keysync_jax.train.export import export
from keysync_jax.train.inputs import DatasetInput, Inputs, inputs_of
from keysync_jax.train.optimizer import partition
from keysync_jax.train.step import TrainState
from tests.tiny_model import same, tensors
from tests.train.synthetic_dataset import write_dataset


@pytest.fixture(scope="module")
def sizes(tiny_model: Path) -> ModelConfig:
    return open_model(tiny_model).config


def write_run(
    folder: Path, model: Path, sizes: ModelConfig, kind: StageKind, shift: float, **changes: Any
) -> TrainConfig:
    """A run that moved every trainable parameter of the model's stage by `shift` in 7 steps."""
    init = InitConfig("keysync", str(model), str(model))
    config = TrainConfig(**{"stage": sizes.stage(kind), "vae": sizes.vae, "init": init, **changes})
    trainable, frozen = partition(config.optimizer, tensors(model, kind))
    moved = {p: x + np.float32(shift) for p, x in trainable.items()}
    average = {p: x + np.float32(1) for p, x in moved.items()}
    settle_config(folder, config)
    with Checkpoints(folder / "checkpoints", config.checkpoint) as checkpoints:
        checkpoints.save(TrainState(jnp.int32(7), moved, dict(frozen), (), average), 7)
    return config


def test_a_run_becomes_a_model(tiny_model: Path, sizes: ModelConfig, tmp_path: Path) -> None:
    config = write_run(tmp_path / "run", tiny_model, sizes, "keyframe", 0.5)
    made = export([tmp_path / "run"], tmp_path / "model", tiny_model)
    assert open_model(tmp_path / "model").config == made
    assert made.provenance["keyframe"] == "run step 7"
    before, after = tensors(tiny_model, "keyframe"), tensors(tmp_path / "model", "keyframe")
    trainable, frozen = partition(config.optimizer, before)
    assert same({p: after[p] for p in trainable}, {p: x + np.float32(0.5) for p, x in trainable.items()})
    assert same({p: after[p] for p in frozen}, frozen)
    for component in ("interpolation", "vae", "audio_hubert", "audio_wavlm"):
        assert same(tensors(tmp_path / "model", component), tensors(tiny_model, component))


def test_a_run_that_is_saving_is_left_alone(tiny_model: Path, sizes: ModelConfig, tmp_path: Path) -> None:
    write_run(tmp_path / "run", tiny_model, sizes, "keyframe", 0.5)
    under_way = tmp_path / "run/checkpoints/8.orbax-checkpoint-tmp"
    under_way.mkdir()
    export([tmp_path / "run"], tmp_path / "model", tiny_model)
    assert under_way.is_dir()


def test_both_runs_and_their_averages(tiny_model: Path, sizes: ModelConfig, tmp_path: Path) -> None:
    write_run(tmp_path / "a", tiny_model, sizes, "keyframe", 0.5)
    between = dataclasses.replace(sizes.interpolation, audio_encoder="hubert")
    write_run(tmp_path / "b", tiny_model, sizes, "interpolation", 0.25, stage=between)
    made = export([tmp_path / "a", tmp_path / "b"], tmp_path / "model", tiny_model, average=True)
    # Nothing asks for WavLM any more.
    assert components(made) == ["keyframe", "interpolation", "vae", "audio_hubert"]
    assert made.provenance.keys() == set(components(made))
    assert made.provenance["interpolation"] == "b step 7 moving average"
    before, after = tensors(tiny_model, "keyframe"), tensors(tmp_path / "model", "keyframe")
    np.testing.assert_array_equal(
        after["unet.conv_in.kernel"], before["unet.conv_in.kernel"] + np.float32(0.5) + 1
    )


def test_a_run_that_does_not_fit_is_refused(tiny_model: Path, sizes: ModelConfig, tmp_path: Path) -> None:
    def refused(sentence: str, *runs: str) -> None:
        with pytest.raises(UserError, match=sentence):
            export([tmp_path / run for run in runs], tmp_path / "model", tiny_model)
        assert not (tmp_path / "model").exists()

    settle_config(tmp_path / "empty", TrainConfig(sizes.keyframe, sizes.vae))
    refused("the run has no checkpoint yet", "empty")
    refused("a second run of the keyframe stage", "empty", "empty")
    refused("not the folder of a training run", "none")
    settle_config(tmp_path / "mask", TrainConfig(sizes.keyframe, sizes.vae, data=DataConfig(mask="full")))
    refused(r"trained with different masks \(box, full\)", "mask")
    data = DataConfig((str(write_dataset(tmp_path / "data", audio="0" * 64)),))
    settle_config(tmp_path / "other", TrainConfig(sizes.keyframe, sizes.vae, data=data))
    refused("was prepared with another audio_hubert.safetensors", "other")
    settle_config(tmp_path / "vae", TrainConfig(sizes.keyframe))
    refused("a VAE of other sizes", "vae")


def test_a_run_is_asked_for_the_encoder_of_its_data_not_the_data(
    tiny_model: Path, sizes: ModelConfig, tmp_path: Path
) -> None:
    write_dataset(tmp_path / "place", audio="0" * 64)
    data = DataConfig((str(tmp_path / "place"),))
    config = write_run(tmp_path / "run", tiny_model, sizes, "keyframe", 0.5, data=data)
    settle_config(tmp_path / "run", config, inputs_of([Dataset(tmp_path / "place")], "hubert", {}))
    refusal = r"run: its data was prepared with another audio_hubert.safetensors than that of"
    for _ in range(2):
        with pytest.raises(UserError, match=refusal):
            export([tmp_path / "run"], tmp_path / "model", tiny_model)
        # A dataset that would fit lies in that place now; the run was not trained on it.
        shutil.rmtree(tmp_path / "place")
        write_dataset(tmp_path / "place")
    assert not (tmp_path / "model").exists()
    known = open_model(tiny_model).hashes["audio_hubert.safetensors"]
    fitting = Inputs((DatasetInput("1" * 64, {"audio_hubert.safetensors": known}),), {})
    fitting.save(tmp_path / "run")
    shutil.rmtree(tmp_path / "place")
    write_dataset(tmp_path / "place", audio="0" * 64)
    export([tmp_path / "run"], tmp_path / "model", tiny_model)
