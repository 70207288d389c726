"""The small decoder: its work, what it is trained towards, and that it stays with its VAE."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from keysync_jax.config import DecoderConfig, LogMelConfig, ModelConfig, StageConfig, VAEConfig
from keysync_jax.errors import UserError
from keysync_jax.model import components, network_shapes, open_model, save_model
from keysync_jax.nn.functional import bind
from keysync_jax.pipeline.dub import DubSettings
from keysync_jax.pipeline.latents import decode_latents
from keysync_jax.pipeline.memory import batches
from keysync_jax.pipeline.programs import programs
from keysync_jax.pipeline.sampling import sigmas_of
from keysync_jax.pipeline.warm import local_devices, sampling_of
from keysync_jax.pipeline.windows import make_plan
from keysync_jax.tensorfile import TensorFile
from keysync_jax.train.export import export
from keysync_jax.train.flops import training_flops
from keysync_jax.train.loop import train
from tests.train.smallest_config import UNET
from tests.train.test_autoencoder import SIZES, losses, vae_config, write_faces
from tests.train.tiny_training import parameters

SMALL = DecoderConfig((4, 8), 1, 4)
LOGMEL = LogMelConfig(bands=4, context=0)


def model_config(vae: VAEConfig, small: DecoderConfig | None = None) -> ModelConfig:
    keyframe = StageConfig("keyframe", "logmel", UNET, 4, 14, 8)
    wider = dataclasses.replace(UNET, in_channels=9)
    between = dataclasses.replace(keyframe, kind="interpolation", unet=wider)
    return ModelConfig(keyframe, between, vae, {"logmel": LOGMEL}, decoder_small=small)


def write_model(folder: Path, seed: int = 0) -> Path:
    config = model_config(SIZES)
    names = components(config)
    shapes = {name: network_shapes(config, name).params for name in names}
    save_model(folder, config, {n: parameters(shapes[n], seed + i) for i, n in enumerate(names)})
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("teacher") / "model")


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_faces(tmp_path_factory.mktemp("data") / "faces")


@pytest.fixture(scope="module")
def run(teacher: Path, faces: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("runs") / "decoder"
    assert train(vae_config(faces, decoder=SMALL, teacher=str(teacher)), workdir, show=False).step == 10
    return workdir


def operations(config: ModelConfig, component: str, side: int = 64) -> int:
    """Of one decoded frame, from shapes alone."""
    network = network_shapes(config, component)
    latents = jax.ShapeDtypeStruct((1, 1, side, side, config.vae.latent_channels), np.float32)

    def decode(params: Any, latents: Any) -> Any:
        return bind(network.graphdef, params).decode(latents)

    jaxpr = jax.make_jaxpr(decode)(dict(network.params), latents).jaxpr
    return training_flops(jaxpr, [False] * len(jaxpr.invars))[0]


def test_it_does_about_a_tenth_of_the_work_at_full_size() -> None:
    config = model_config(VAEConfig(), DecoderConfig())
    small, full = operations(config, "decoder_small"), operations(config, "vae")
    assert 2.9e12 < full < 3.2e12
    assert 0.05 < small / full < 0.13


def test_a_run_learns_the_pictures_of_the_full_decoder_and_becomes_a_component(
    run: Path, teacher: Path, tmp_path: Path
) -> None:
    assert losses(run)[-1] < losses(run)[0]
    made = export([run], tmp_path / "model", teacher)
    assert made.decoder_small == SMALL
    model = open_model(tmp_path / "model")
    assert model.config.provenance["decoder_small"] == "decoder step 10"
    file = TensorFile(tmp_path / "model/decoder_small.safetensors")
    assert file.metadata["vae"] == open_model(teacher).hashes["vae.safetensors"]
    latents = np.random.default_rng(0).standard_normal((3, 8, 8, 4)).astype(np.float32)
    together = decode_latents(model.load("decoder_small"), latents, 2)
    assert together.shape == (3, 16, 16, 3)
    # Each frame alone: what is decoded beside it changes nothing.
    reversed_ = decode_latents(model.load("decoder_small"), latents[::-1], 2)[::-1]
    np.testing.assert_allclose(together, reversed_, atol=1e-3)
    again = export([run], tmp_path / "again", tmp_path / "model")
    assert again.decoder_small == SMALL


def test_a_dub_decodes_with_it_where_it_is_asked_for(teacher: Path) -> None:
    small, config = DubSettings(decoder="small"), open_model(teacher).config
    with pytest.raises(UserError, match="has no small decoder"):
        small.component(config)
    with pytest.raises(UserError, match="full or small, not tiny"):
        DubSettings(decoder="tiny")  # type: ignore[arg-type]
    own = dataclasses.replace(config, decoder_small=SMALL)
    assert (small.component(own), DubSettings().component(own)) == ("decoder_small", "vae")
    sampling = sampling_of(own, small, local_devices(1), batches("balanced", own, "fp32"))
    assert len(sigmas_of(own)) == len(sampling.sigmas)
    phases = programs(own, "fp32", sampling, 2, make_plan(14), decoder=small.component(own))
    lowered = phases["compose"][0]().as_text()
    assert lowered.count("stablehlo.convolution") == len(SMALL.block_out_channels) * 2 + 1 + 1 + 1 + 1


def test_another_vae_is_refused(run: Path, teacher: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", seed=5)
    with pytest.raises(UserError, match="distilled from another VAE"):
        export([run], tmp_path / "mixed", other)
    export([run], tmp_path / "model", teacher)
    # As of one whose VAE was exchanged, with its hash.
    config = json.loads((tmp_path / "model/config.json").read_bytes())
    (tmp_path / "model/vae.safetensors").write_bytes((other / "vae.safetensors").read_bytes())
    config["files"]["vae.safetensors"] = open_model(other).hashes["vae.safetensors"]
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"from another VAE than vae\.safetensors"):
        open_model(tmp_path / "model")


def test_settings_that_do_not_fit(faces: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has 1 levels, the VAE 2"):
        vae_config(faces, decoder=DecoderConfig((8,), 1, 4))
    with pytest.raises(UserError, match="teacher is empty"):
        train(vae_config(faces, decoder=SMALL), tmp_path / "run", show=False)
