"""A run knows what it reads by content: paths may change, data and networks may not."""

import dataclasses
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from keysync_jax.data.records import Dataset
from keysync_jax.errors import UserError
from keysync_jax.model import Network
from keysync_jax.train.checkpoint import read_config, settle_config
from keysync_jax.train.config import DataConfig, InitConfig, TrainConfig
from keysync_jax.train.inputs import DatasetInput, Inputs, digest, inputs_of, read_inputs
from tests.train.smallest_config import pretend_checkpoint, smallest
from tests.train.synthetic_dataset import write_dataset
from tests.train.tiny_training import vae

VAE, AUDIO = "a" * 64, "b" * 64


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two datasets, `a` and `b`."""
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder / "a", vae=VAE, audio=AUDIO)
    write_dataset(folder / "b", lengths=(31,))
    return folder


def config_of(*paths: Path, **init: Any) -> TrainConfig:
    given = DataConfig(tuple(map(str, paths)), keyframe_stride=2)
    return dataclasses.replace(smallest(), data=given, init=InitConfig(**init))


def settle(run: Path, config: TrainConfig, network: Network | None = None) -> None:
    """As the loop begins or goes on with a run; it has a checkpoint afterwards."""
    datasets = [Dataset(path) for path in config.data.paths]
    settle_config(run, config, inputs_of(datasets, config.audio_encoder, {"VAE": network}))
    pretend_checkpoint(run / "checkpoints/5")


def contents(run: Path) -> list[bytes]:
    return [(run / name).read_bytes() for name in ("config.json", "inputs.json")]


def test_what_is_noted(data: Path, tmp_path: Path) -> None:
    network = vae()
    settle(tmp_path, config_of(data / "a", data / "b"), network)
    a, b = (Dataset(data / name).sha256 for name in "ab")
    assert read_inputs(tmp_path) == Inputs(
        (
            DatasetInput(a, {"vae.safetensors": VAE, "audio_hubert.safetensors": AUDIO}),
            DatasetInput(b, {}),
        ),
        {"VAE": digest(network.params)},
    )
    assert read_inputs(tmp_path / "nothing") is None


def test_the_same_data_in_another_place(data: Path, tmp_path: Path) -> None:
    settle(tmp_path / "run", config_of(data / "a", data / "b", vae="here"), vae())
    (tmp_path / "moved").symlink_to(data / "a")
    later = config_of(tmp_path / "moved", data / "b", vae="there", lpips_trunk="x", lpips_heads="y")
    settle(tmp_path / "run", later, vae())
    assert read_config(tmp_path / "run") == later


def test_other_data_in_the_same_place(data: Path, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.symlink_to(data / "a")
    settle(tmp_path / "run", config_of(place))
    before = contents(tmp_path / "run")
    place.unlink()
    place.symlink_to(data / "b")
    with pytest.raises(UserError, match=r"place: is not the dataset that .*/run was started with"):
        settle(tmp_path / "run", config_of(place))
    assert contents(tmp_path / "run") == before
    # Nothing was trained yet: the run begins anew with what is there.
    shutil.rmtree(tmp_path / "run/checkpoints/5")
    settle(tmp_path / "run", config_of(place))
    assert contents(tmp_path / "run") != before


def test_other_datasets_are_refused(data: Path, tmp_path: Path) -> None:
    a, b = data / "a", data / "b"
    settle(tmp_path, config_of(a, b))
    for paths, sentence in (
        ((b, a), "has the datasets of this run in another order"),
        ((a,), "was started with 2 datasets, not 1"),
        ((a, b, b), "was started with 2 datasets, not 3"),
        ((a, a), r"/a: is not the dataset that"),
    ):
        with pytest.raises(UserError, match=sentence):
            settle(tmp_path, config_of(*paths))


def test_another_network_is_refused(data: Path, tmp_path: Path) -> None:
    settle(tmp_path, config_of(data / "a", vae="here"), vae())
    other = {path: x + np.float32(path == "decoder.conv_out.bias") for path, x in vae().params.items()}
    assert digest(other) != digest(vae().params)
    with pytest.raises(UserError, match=r"was started with another VAE than config.init gives now"):
        settle(tmp_path, config_of(data / "a", vae="here"), Network(vae().graphdef, other))


def test_a_setting_that_is_no_place_stays(data: Path, tmp_path: Path) -> None:
    settle(tmp_path, config_of(data / "a"))
    with pytest.raises(UserError, match="was started with batch_size = 2, not 4"):
        settle(tmp_path, dataclasses.replace(config_of(data / "a"), batch_size=4))


def test_a_run_from_before_inputs_were_noted(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settle(tmp_path, config_of(data / "a", vae="here"), vae())
    (tmp_path / "inputs.json").unlink()
    for config in (config_of(data / "b", vae="here"), config_of(data / "a", vae="there")):
        with pytest.raises(UserError, match=r"was started with (data\.paths|init\.vae) = "):
            settle(tmp_path, config, vae())
    assert not (tmp_path / "inputs.json").exists()
    with caplog.at_level(logging.WARNING):
        settle(tmp_path, config_of(data / "a", vae="here"), vae())
    assert "was started when runs did not note what they read" in caplog.text
    caplog.clear()
    settle(tmp_path, config_of(data / "a", vae="there"), vae())
    assert not caplog.text


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "inputs.json: cannot be read"),
        ("{}", "inputs.json: not the inputs of a training run"),
        (json.dumps({"format": "keysync-inputs-1", "data": []}), "key 'networks' is missing"),
    ],
)
def test_damaged_notes_are_named(tmp_path: Path, content: str, sentence: str) -> None:
    (tmp_path / "inputs.json").write_text(content)
    with pytest.raises(UserError, match=sentence):
        read_inputs(tmp_path)


def test_a_digest_tells_paths_types_shapes_and_values() -> None:
    x = np.arange(6, dtype=np.float32)
    some: list[dict[str, Any]] = [
        {"a": x, "b": x[:1]},
        {"b": x, "a": x[:1]},
        {"a": x.reshape(2, 3), "b": x[:1]},
        {"a": x.astype(ml_dtypes.bfloat16), "b": x[:1]},
        {"a": -x, "b": x[:1]},
        {"a": x, "b": x[0]},
    ]
    assert len({digest(params) for params in some}) == len(some)
    same = [{"b": x[:1], "a": x}, {"a": jnp.asarray(x), "b": x[:1]}, {"a": np.repeat(x, 2)[::2], "b": x[:1]}]
    assert {digest(params) for params in same} == {digest(some[0])}
