"""Training a VAE: what its loss says, that a run resumes, that a new model holds what was trained."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from keysync_jax.config import LogMelConfig, StageConfig, StageKind, UNetConfig, VAEConfig, to_dict
from keysync_jax.data.arrayrecord import RecordWriter
from keysync_jax.data.records import (
    ClipInfo,
    Dataset,
    Manifest,
    Settings,
    ShardInfo,
    encode_frame,
)
from keysync_jax.errors import UserError
from keysync_jax.files import sha256_of
from keysync_jax.media.masks import mouth_region
from keysync_jax.model import Network, open_model
from keysync_jax.nn.functional import shapes
from keysync_jax.nn.vae import VAE, Posterior
from keysync_jax.pipeline.latents import decode_latents, encode_frames
from keysync_jax.tensorfile import TensorFile
from keysync_jax.train.autoencoder import FrameSamples, divergence, psnr
from keysync_jax.train.checkpoint import Checkpoints, read_config
from keysync_jax.train.config import (
    CheckpointConfig,
    InitConfig,
    LogConfig,
    OptimizerConfig,
    TrainConfig,
    VAEDataConfig,
    VAETrainConfig,
    train_config_from,
)
from keysync_jax.train.loop import train
from keysync_jax.train.new_model import new_model
from tests.clips import face_landmarks
from tests.prepared import write_clip

SIZE, FRAMES = 16, 12
SIZES = VAEConfig(block_out_channels=(8, 16), layers_per_block=1, norm_groups=4)


def write_faces(folder: Path, count: int = FRAMES) -> Path:
    """A dataset of frames alone, as `prepare --crop 16` makes it."""
    folder.mkdir()
    path, rng = folder / "00000.arrayrecord", np.random.default_rng(0)
    settings, frames = Settings(SIZE, 0, "none", True, None, {}, "given"), []
    for points in face_landmarks(count, SIZE, SIZE):
        picture = np.full((SIZE, SIZE, 3), rng.integers(40, 200, 3), np.uint8)
        points = (points - points.min(axis=0)) / np.ptp(points, axis=0) * (SIZE - 2)
        frames.append({"landmarks": points.astype(np.float32), "frame": encode_frame(picture)})
    with RecordWriter(path) as writer:
        write_clip(writer, Manifest(settings, (), ()), frames)
    shard = ShardInfo(path.name, writer.records, path.stat().st_size, sha256_of(path))
    clip = ClipInfo("clip", "clip.mp4", "0" * 64, count, 0, 0)
    Manifest(settings, (shard,), (clip,)).save(folder)
    return folder


def vae_config(faces: Path, **changes: object) -> VAETrainConfig:
    config = VAETrainConfig(
        SIZES,
        SIZE,
        data=VAEDataConfig(paths=(str(faces),)),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup=2, ema=0.5, frozen=()),
        checkpoint=CheckpointConfig(every=5, keep=3, keep_every=0),
        log=LogConfig(every=1),
        batch_size=4,
        steps=10,
    )
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_faces(tmp_path_factory.mktemp("data") / "faces")


@pytest.fixture(scope="module")
def run(faces: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    workdir = tmp_path_factory.mktemp("runs") / "vae"
    assert train(vae_config(faces), workdir, show=False).step == 10
    return workdir


def losses(workdir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_divergence_is_that_of_two_gaussians() -> None:
    none = divergence(Posterior(jnp.zeros(1), jnp.zeros(1)))
    assert float(none[0]) == 0
    # KL(N(2, 9) | N(0, 1)) = (9 + 4 - 1) / 2 - ln 3
    some = divergence(Posterior(jnp.array([2.0]), jnp.log(jnp.array([9.0]))))
    assert float(some[0]) == pytest.approx(6 - np.log(3), abs=1e-5)


def test_psnr_counts_the_region_alone() -> None:
    truth = jnp.zeros((1, 2, 2, 3))
    frames = truth.at[0, 0, 0].set(0.2).at[0, 1, 1].set(0.9)
    region = jnp.zeros((1, 2, 2, 1)).at[0, 0].set(1)
    # Mean square over two pixels: 0.04 / 2; the range is 2.
    assert float(psnr(frames, truth, region)) == pytest.approx(10 * np.log10(4 / 0.02), abs=1e-4)


def test_the_mouth_region_holds_the_mouth_with_a_margin() -> None:
    landmarks = np.full((68, 2), 1.0)
    landmarks[48:] = [[20, 30], [40, 36]] * 10
    region = mouth_region(landmarks, 64)
    rows, columns = np.nonzero(region)
    assert (rows.min(), rows.max()) == (25, 40)
    assert (columns.min(), columns.max()) == (15, 44)


def test_a_sample_is_a_function_of_its_number(faces: Path) -> None:
    config = vae_config(faces)
    samples = FrameSamples(config, [Dataset(faces)])
    first = [samples(number).frame for number in range(8)]
    again = [FrameSamples(config, [Dataset(faces)])(number).frame for number in range(8)]
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert len({frame.tobytes() for frame in first}) > 1


def test_training_learns_and_goes_on_where_it_was(faces: Path, run: Path, tmp_path: Path) -> None:
    assert losses(run)[-1] < losses(run)[0]
    half = tmp_path / "half"
    train(vae_config(faces, steps=5), half, show=False)
    train(vae_config(faces), half, show=False)
    assert losses(half) == losses(run)


def test_the_stored_config_is_read_back(faces: Path, run: Path) -> None:
    assert read_config(run) == vae_config(faces)
    values = to_dict(vae_config(faces))
    values["crop_sice"] = values.pop("crop_size")
    with pytest.raises(UserError, match="did you mean 'crop_size'"):
        train_config_from(values, "config")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"crop_size": 15}, "not a multiple of the VAE's factor 2"),
        ({"log": LogConfig(preview_every=1)}, "logs its PSNR instead"),
        ({"crop_size": 32}, "holds crops of side 16"),
        ({"data": VAEDataConfig()}, "data.paths is empty"),
    ],
)
def test_what_cannot_be_trained_is_said(
    faces: Path, change: dict[str, object], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=sentence):
        train(vae_config(faces, **change), tmp_path / "run", show=False)


def stage_config(kind: StageKind, **changes: object) -> TrainConfig:
    unet = UNetConfig(
        in_channels=8 if kind == "keyframe" else 9,
        block_out_channels=(16,),
        layers_per_block=1,
        attention_levels=(),
        head_dim=8,
        cross_attention_dim=8,
        addition_embed_dim=8,
        norm_groups=4,
    )
    stage = StageConfig(kind, "logmel", unet, LogMelConfig().hidden_size, latent_size=SIZE // 2)
    config = TrainConfig(stage, dataclasses.replace(SIZES, scale_factor=1.0), dtype="fp32")
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


def test_a_new_model_decodes_what_the_run_does_from_latents_of_unit_spread(
    faces: Path, run: Path, tmp_path: Path
) -> None:
    new_model(run, stage_config("keyframe"), stage_config("interpolation"), tmp_path / "model")
    model = open_model(tmp_path / "model")
    assert model.config.vae.scale_factor == 1
    with Checkpoints(run / "checkpoints", vae_config(faces).checkpoint, read_only=True) as checkpoints:
        _, weights = checkpoints.restore_weights(False)
    samples = FrameSamples(vae_config(faces), [Dataset(faces)])
    frames = [samples(number).frame for number in range(40)]
    graphdef, _ = shapes(lambda rngs: VAE(SIZES, rngs=rngs))
    trained = Network(graphdef, {path: jnp.asarray(x) for path, x in weights.items()})
    before = decode_latents(trained, np.concatenate(list(encode_frames(trained, frames))))
    latents = np.concatenate(list(encode_frames(model.load("vae"), frames)))
    after = decode_latents(model.load("vae"), latents)
    np.testing.assert_allclose(after, before, atol=0.02)
    np.testing.assert_allclose(latents.std(axis=(0, 1, 2)), 1, atol=1e-3)


def test_a_new_models_posterior_is_scaled_with_its_mean(faces: Path, run: Path, tmp_path: Path) -> None:
    from keysync_jax.train.new_model import normalised

    new_model(run, stage_config("keyframe"), stage_config("interpolation"), tmp_path / "model")
    weights = dict(TensorFile(tmp_path / "model" / "vae.safetensors"))
    std = np.array([0.5, 2.0, 1.0, 4.0], np.float32)
    graphdef, _ = shapes(lambda rngs: VAE(SIZES, rngs=rngs))
    frames = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (1, SIZE, SIZE, 3)), jnp.float32)

    def posterior(params: dict[str, np.ndarray]) -> Posterior:
        from keysync_jax.nn.functional import bind

        return jax.jit(lambda p: bind(graphdef, p).encode(frames))(params)

    plain, scaled = posterior(weights), posterior(normalised(weights, std))
    np.testing.assert_allclose(scaled.mean, plain.mean / std, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(scaled.logvar, plain.logvar - 2 * np.log(std), rtol=1e-4, atol=1e-4)


def test_a_new_model_measures_its_latents_on_the_data_of_the_run(run: Path, tmp_path: Path) -> None:
    copied, place = tmp_path / "run", tmp_path / "place"
    shutil.copytree(run, copied)
    config = json.loads((copied / "config.json").read_text())
    place.symlink_to(config["data"]["paths"][0])
    config["data"]["paths"] = [str(place)]
    (copied / "config.json").write_text(json.dumps(config))
    new_model(copied, stage_config("keyframe"), stage_config("interpolation"), tmp_path / "model")
    place.unlink()
    write_faces(place, FRAMES - 1)
    with pytest.raises(UserError, match=r"place: is not the dataset that .*/run was started with"):
        new_model(copied, stage_config("keyframe"), stage_config("interpolation"), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_stages_begin_with_what_fits_of_another_model(run: Path, tmp_path: Path) -> None:
    first, second = stage_config("keyframe"), stage_config("interpolation")
    new_model(run, first, second, tmp_path / "old")
    wider = dataclasses.replace(
        first.stage, unet=dataclasses.replace(first.stage.unet, addition_embed_dim=16)
    )
    changed = dataclasses.replace(first, seed=1, stage=wider)
    made = new_model(run, changed, second, tmp_path / "new", stages_from=tmp_path / "old")
    old, new = (dict(TensorFile(tmp_path / name / "keyframe.safetensors")) for name in ("old", "new"))
    same = {path for path in new if new[path].shape == old[path].shape}
    assert 0 < len(same) < len(new)
    assert f"{len(same)} of {len(new)} tensors" in made.provenance["keyframe"]
    for path, x in new.items():
        if path in same:
            np.testing.assert_array_equal(x, old[path])
    with pytest.raises(UserError, match="not a model directory"):
        new_model(run, first, second, tmp_path / "more", stages_from=tmp_path / "nothing")
    assert not (tmp_path / "more").exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"init": InitConfig(kind="svd")}, "a new model is random"),
        ({"stage": dataclasses.replace(stage_config("keyframe").stage, kind="interpolation")}, "is that of"),
        ({"stage": dataclasses.replace(stage_config("keyframe").stage, audio_encoder="hubert")}, "log-mel"),
    ],
)
def test_stages_that_make_no_new_model_are_refused(
    run: Path, changes: dict[str, object], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=sentence):
        new_model(run, stage_config("keyframe", **changes), stage_config("interpolation"), tmp_path / "model")
    assert not (tmp_path / "model").exists()
