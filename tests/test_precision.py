"""What a command says it computed in is what its programs compute in: the precision in their StableHLO.

Nothing is compiled: a program is lowered in the place where its command calls it.
"""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from keysync_jax.config import VAEConfig
from keysync_jax.data.prepare import PrepareSettings, prepare
from keysync_jax.data.records import Dataset, Manifest
from keysync_jax.evaluation.pairs import Pair
from keysync_jax.metrics.mouth import PATCH, MouthReader
from keysync_jax.model import DEFAULT, open_model
from keysync_jax.nn.functional import shapes
from keysync_jax.nn.vae import VAE
from keysync_jax.parity import compare as parity
from keysync_jax.pipeline import dub as dub_module
from keysync_jax.pipeline import latents
from keysync_jax.train import loop
from keysync_jax.train.config import AnyTrainConfig, DataConfig, VAEDataConfig, VAETrainConfig
from keysync_jax.train.new_model import latent_std
from keysync_jax.train.sharding import AnyStep, Run
from tests.clips import write_video, write_voice
from tests.data.preparing import add_clip
from tests.train.smallest_config import smallest
from tests.train.synthetic_dataset import CROP, write_dataset
from tests.train.tiny_training import parameters

PRODUCTS = re.compile(r"stablehlo\.(?:dot_general|convolution)\b.*")
PRECISION = {"fp32": "HIGHEST", "tf32": "HIGH", "bf16": "DEFAULT", "fp16": "DEFAULT"}
VAE_SIZES = VAEConfig(block_out_channels=(8, 8), layers_per_block=1, norm_groups=4)


def precisions(lowered: Any) -> set[str]:
    """Precisions of all products in a lowered program."""
    lines = PRODUCTS.findall(lowered.as_text())
    assert lines
    return {name for line in lines for name in re.findall(r"\b(DEFAULT|HIGH|HIGHEST)\b", line) or ["DEFAULT"]}


class Lowered:
    """Stands in for a jitted function: notes its precisions, and returns zeros."""

    def __init__(self, function: Any):
        self.function, self.found = function, set[str]()

    def __call__(self, *arguments: Any) -> Any:
        self.found |= precisions(self.function.lower(*arguments))
        return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), self.function.eval_shape(*arguments))


@pytest.fixture
def encoder(monkeypatch: pytest.MonkeyPatch) -> Lowered:
    """The VAE's encoder, as `prepare` and `init` call it."""
    stand_in = Lowered(latents._posterior)
    monkeypatch.setattr(latents, "_posterior", stand_in)
    return stand_in


@pytest.mark.parametrize("dtype", ["fp32", "tf32"])
def test_prepare(dtype: Any, encoder: Lowered, tmp_path: Path) -> None:
    add_clip(tmp_path / "clips", "a", 16)
    settings = PrepareSettings(encoders=("logmel",), dtype=dtype)
    prepare(tmp_path / "clips", tmp_path / "data", DEFAULT, settings)
    assert encoder.found == {PRECISION[dtype]}
    assert Manifest.load(tmp_path / "data").settings.dtype == dtype


def test_init(encoder: Lowered, tmp_path: Path) -> None:
    weights = parameters(shapes(lambda rngs: VAE(VAE_SIZES, rngs=rngs))[1])
    folder = write_dataset(tmp_path / "data")
    latent_std(vae_run(folder), weights, [Dataset(folder)])
    assert encoder.found == {"HIGHEST"}


def vae_run(dataset: Path, **changes: Any) -> VAETrainConfig:
    data = VAEDataConfig((str(dataset),))
    return VAETrainConfig(VAE_SIZES, CROP, data, batch_size=2, steps=2, **changes)


class StoppedError(Exception):
    """There is nothing more to see."""


def trained(
    config: AnyTrainConfig, workdir: Path, monkeypatch: pytest.MonkeyPatch, lower: Callable[..., Any]
) -> set[str]:
    """Precisions of the step that `train` is about to run."""
    found = set[str]()

    def jit_step(mesh: Any, step: AnyStep, state: Any) -> Run:
        def run(state: Any, batch: Any) -> Any:
            found.update(precisions(lower(mesh, step, state)[0].lower(state, step.aids, batch)))
            raise StoppedError

        return run

    monkeypatch.setattr(loop, "jit_step", jit_step)
    with pytest.raises(StoppedError):
        loop.train(config, workdir, show=False)
    return found


@pytest.mark.parametrize("dtype", ["fp32", "tf32"])
@pytest.mark.parametrize("kind", ["stage", "VAE"])
def test_train(kind: str, dtype: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from keysync_jax.train.sharding import _jitted

    dataset = write_dataset(tmp_path / "data")
    stage = dataclasses.replace(smallest(), data=DataConfig((str(dataset),), keyframe_stride=2), dtype=dtype)
    config = stage if kind == "stage" else vae_run(dataset, dtype=dtype)
    assert trained(config, tmp_path / "run", monkeypatch, _jitted) == {PRECISION[dtype]}


def test_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    encode, decode = Lowered(latents._encode), Lowered(latents._decode)
    monkeypatch.setattr(latents, "_encode", encode)
    monkeypatch.setattr(latents, "_decode", decode)
    model = open_model(DEFAULT)
    frames = np.zeros((2, model.config.crop_size, model.config.crop_size, 3), np.uint8)
    pair: Any = SimpleNamespace(original=frames, crops=lambda frames, size: frames)
    Pair.reconstructed(pair, model)
    reader = MouthReader.load()
    network = reader._network = Lowered(reader._network)  # type: ignore[assignment]
    reader.read_patches(np.zeros((3, PATCH, PATCH, 3), np.uint8))
    assert encode.found == decode.found == network.found == {"HIGHEST"}


def current() -> str:
    """Precision of a product that is traced here."""
    x = jax.ShapeDtypeStruct((2, 2), "float32")
    return precisions(jax.jit(lambda a, b: a @ b).lower(x, x)).pop()


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_parity(dtype: Any, golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []

    def run(entries: Any, entry: str) -> np.ndarray:
        found.append(current())
        raise StoppedError

    monkeypatch.setattr(parity.StageNetwork, "__call__", run)
    with pytest.raises(StoppedError):
        next(parity.compare(golden / "tiny", dtype))
    assert found == [PRECISION[dtype]]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_dub(dtype: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []

    def geometry(*_: Any) -> None:
        found.append(current())
        raise StoppedError

    monkeypatch.setattr(dub_module, "_landmarks", geometry)
    video, voice = write_video(tmp_path / "a.mp4", 16), write_voice(tmp_path / "a.wav", 0.5)
    with pytest.raises(StoppedError):
        dub_module.dub(video, voice, tmp_path / "out.mp4", DEFAULT, dub_module.DubSettings(dtype=dtype))
    assert found == [PRECISION[dtype]]
