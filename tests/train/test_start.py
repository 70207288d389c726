"""Where a new run's weights come from."""

import dataclasses
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from keysync_jax.config import StageKind
from keysync_jax.convert.table import Row, Table
from keysync_jax.convert.unet import UNET_PREFIX, diffusers_unet_table, stage_table
from keysync_jax.convert.vae import diffusers_vae_table, engine_vae_table
from keysync_jax.errors import UserError
from keysync_jax.model import open_model
from keysync_jax.parity.golden import Golden
from keysync_jax.tensorfile import TensorFile, write_tensors
from keysync_jax.train.config import DataConfig, InitConfig, LogConfig, TrainConfig
from keysync_jax.train.loop import _StageJob
from keysync_jax.train.start import first_weights, load_vae, stage_shapes, vae_shapes
from tests.tiny_model import Hashed, rule_tensors
from tests.train.synthetic_dataset import write_dataset

NEW = {
    "keyframe": {"unet.add_embedding.linear_1.kernel", "audio_projection.kernel", "audio_projection.bias"},
    "interpolation": {
        "unet.add_embedding.linear_1.kernel",
        "unet.conv_in.kernel",
        "audio_projection.kernel",
        "audio_projection.bias",
        "z_m",
    },
}


def train_config(golden: Path, stage: StageKind, **init: str) -> TrainConfig:
    numbers = Golden(golden / "tiny")
    vae = numbers.vae_config()
    return TrainConfig(numbers.stage_config(stage), vae, init=InitConfig(**init), dtype="fp32", remat="none")  # type: ignore[arg-type]


def svd_tensors(golden: Path) -> dict[str, np.ndarray]:
    """SVD's single file: an 8-channel U-Net with another embedding, a VAE, conditioners."""
    listed = json.loads((golden / "tiny.manifest.json").read_text())["tensors"]
    unet = {k: v for k, v in listed["keyframe"].items() if k.startswith(UNET_PREFIX)}
    unet[UNET_PREFIX + "label_emb.0.0.weight"] = [128, 24]
    other = {"conditioner.embedders.0.open_clip.model.x": [3]}
    return rule_tensors({**unet, **listed["first_stage"], **other})


def write_svd(folder: Path, golden: Path, layout: str) -> Path:
    """SVD as one file, or as diffusers' pipeline."""
    tensors = svd_tensors(golden)
    if layout == "engine":
        write_tensors(folder / "svd.safetensors", tensors)
        return folder / "svd.safetensors"
    config = train_config(golden, "keyframe")
    wanted = stage_shapes(config.stage)
    inner = {p.removeprefix("unet."): s for p, s in wanted.items() if p.startswith("unet.")}
    inner["add_embedding.linear_1.kernel"] = (24, 128)
    rows = [r for r in stage_table(config.stage, wanted).rows if r.path.startswith("unet.")]
    engine = Table([Row(r.torch, r.path.removeprefix("unet."), r.op) for r in rows], ignore=(".*",))
    diffusers = diffusers_unet_table(config.stage.unet, inner).to_torch(engine.to_jax(tensors, inner))
    write_component(folder / "unet", diffusers, "UNetSpatioTemporalConditionModel")
    sizes = {p: leaf.shape for p, leaf in vae_shapes(config).params.items()}
    vae = engine_vae_table(config.vae, sizes).to_jax(tensors, sizes)
    quant = {
        "quant_conv.weight": np.ones((8, 8, 1, 1), np.float32),
        "quant_conv.bias": np.ones(8, np.float32),
    }
    decoder = diffusers_vae_table(config.vae, sizes).to_torch(vae)
    write_component(folder / "vae", {**decoder, **quant}, "AutoencoderKLTemporalDecoder")
    (folder / "model_index.json").write_text("{}")
    return folder


def write_component(folder: Path, tensors: Mapping[str, np.ndarray], name: str) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"_class_name": name}))
    write_tensors(folder / "diffusion_pytorch_model.safetensors", tensors)


def test_a_start_hashes_what_it_uses_and_that_once(
    golden: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, VAE and previews of one model, whose hashes the datasets are checked against."""
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    hashes = open_model(model).hashes
    data = write_dataset(
        tmp_path / "data", vae=hashes["vae.safetensors"], audio=hashes["audio_hubert.safetensors"]
    )
    config = train_config(golden, "keyframe", kind="keysync", path=str(model), vae=str(model))
    config = dataclasses.replace(
        config,
        data=DataConfig(paths=(str(data),), keyframe_stride=1),
        log=LogConfig(preview_every=1, preview_data=str(data)),
    )
    for path in model.glob("*.safetensors"):
        path.touch()  # What the test itself has opened does not count.
    hashed = Hashed(monkeypatch)
    job = _StageJob(config)
    job.first_weights()
    assert job.preview is not None
    used = ("vae.safetensors", "keyframe.safetensors")
    assert hashed.bytes == {name: (model / name).stat().st_size for name in used}


@pytest.mark.parametrize("layout", ["engine", "diffusers"])
@pytest.mark.parametrize("kind", ["keyframe", "interpolation"])
def test_svd(golden: Path, tmp_path: Path, kind: StageKind, layout: str) -> None:
    path = write_svd(tmp_path, golden, layout)
    config = train_config(golden, kind, kind="svd", path=str(path), vae=str(path))
    weights, wanted = first_weights(config), stage_shapes(config.stage)
    assert {p: x.shape for p, x in weights.items()} == wanted
    assert all(x.dtype == np.float32 for x in weights.values())
    back = stage_table(config.stage, wanted).to_torch(weights)
    tensors = svd_tensors(golden)
    kept = [r for r in stage_table(config.stage, wanted).rows if r.path not in NEW[kind]]
    assert kept
    for row in kept:
        np.testing.assert_array_equal(back[row.torch], tensors[row.torch], row.torch)
    for path_ in NEW[kind] - {"z_m"}:
        bound = 1 / math.sqrt(math.prod(wanted[path_.replace(".bias", ".kernel")][:-1]))
        assert 0.9 * bound < np.abs(weights[path_]).max() <= bound, path_
    assert not weights.get("z_m", np.zeros(1)).any()
    again = first_weights(config)
    assert all(np.array_equal(again[p], weights[p]) for p in weights)
    vae = load_vae(config).params
    decoder = engine_vae_table(config.vae, {p: x.shape for p, x in vae.items() if "quant" not in p})
    for key, tensor in decoder.to_torch(vae).items():
        np.testing.assert_array_equal(tensor, tensors[key], key)


def test_svd_that_lacks_a_tensor(golden: Path, tmp_path: Path) -> None:
    tensors = svd_tensors(golden)
    del tensors[UNET_PREFIX + "out.0.bias"]
    write_tensors(tmp_path / "svd.safetensors", tensors)
    path = str(tmp_path / "svd.safetensors")
    with pytest.raises(
        UserError, match=r"svd.safetensors: tensor 'model.diffusion_model.out.0.bias' is missing"
    ):
        first_weights(train_config(golden, "keyframe", kind="svd", path=path))
    # The release's own file comes without the tensor that is new anyway.
    tensors = svd_tensors(golden)
    del tensors[UNET_PREFIX + "label_emb.0.0.weight"]
    write_tensors(tmp_path / "svd.safetensors", tensors)
    first_weights(train_config(golden, "keyframe", kind="svd", path=path))


def test_keysync(golden: Path, tiny_model: Path) -> None:
    config = train_config(golden, "keyframe", kind="keysync", path=str(tiny_model), vae=str(tiny_model))
    weights = first_weights(config)
    stored = TensorFile(tiny_model / "keyframe.safetensors")
    assert weights.keys() == stored.keys()
    assert all(np.array_equal(weights[p], stored[p]) for p in stored)
    loaded = open_model(tiny_model).load("vae").params
    vae = load_vae(config).params
    assert all(np.array_equal(vae[p], loaded[p]) for p in loaded)
    half = load_vae(dataclasses.replace(config, dtype="bf16")).params
    loaded = open_model(tiny_model).load("vae", "bf16").params
    assert all(half[p].dtype == loaded[p].dtype and np.array_equal(half[p], loaded[p]) for p in loaded)


def test_what_does_not_fit_is_refused(golden: Path, tiny_model: Path) -> None:
    config = train_config(golden, "keyframe", kind="keysync", path=str(tiny_model), vae=str(tiny_model))
    wrong = dataclasses.replace(config, stage=dataclasses.replace(config.stage, audio_encoder="wavlm"))
    with pytest.raises(
        UserError, match=r"audio_encoder is 'hubert' there, the config says 'wavlm'; sync would"
    ):
        first_weights(wrong)
    unet = dataclasses.replace(config.stage.unet, layers_per_block=2)
    wrong = dataclasses.replace(config, stage=dataclasses.replace(config.stage, unet=unet))
    with pytest.raises(UserError, match=r"keyframe.unet.layers_per_block is 1 there, the config says 2"):
        first_weights(wrong)
    wrong = dataclasses.replace(config, vae=dataclasses.replace(config.vae, layers_per_block=3))
    with pytest.raises(UserError, match=r"vae.layers_per_block is 1 there, the config says 3"):
        load_vae(wrong)
    with pytest.raises(UserError, match="needs a checkpoint"):
        first_weights(train_config(golden, "keyframe", kind="svd"))


def test_random_weights_follow_from_the_seed(golden: Path) -> None:
    config = train_config(golden, "interpolation")
    weights, wanted = first_weights(config), stage_shapes(config.stage)
    assert {p: x.shape for p, x in weights.items()} == wanted
    assert all(np.array_equal(x, first_weights(config)[p]) for p, x in list(weights.items())[:5])
    other = first_weights(dataclasses.replace(config, seed=1))
    assert not np.array_equal(weights["unet.conv_in.kernel"], other["unet.conv_in.kernel"])
    assert load_vae(config).params.keys() == vae_shapes(config).params.keys()
