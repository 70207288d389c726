"""Conversion: bit-equal both ways, total, and in one sentence when something does not fit."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keysync_jax.config import MaskKind
from keysync_jax.convert.checkpoint import AudioSource, Checkpoints, convert
from keysync_jax.convert.containers import open_tensors
from keysync_jax.convert.table import CHW, CONV1X1, CONV2D, CONV_TIME, KEEP, LINEAR, Op, Row, Table
from keysync_jax.convert.unet import stage_config, stage_table
from keysync_jax.convert.vae import engine_vae_table, vae_config
from keysync_jax.errors import UserError
from keysync_jax.model import maker, open_model
from keysync_jax.nn.functional import shapes
from keysync_jax.nn.stages import stage
from keysync_jax.nn.vae import VAE
from keysync_jax.parity import rules
from tests.convert.checkpoints import save_deepspeed
from tests.tiny_model import HEAD_DIM


@pytest.mark.parametrize(
    ("op", "torch_shape", "our_shape"),
    [
        (KEEP, (3,), (3,)),
        (LINEAR, (5, 3), (3, 5)),
        (CONV2D, (5, 3, 2, 4), (2, 4, 3, 5)),
        (CONV_TIME, (5, 3, 2, 1, 1), (2, 1, 3, 5)),
        (CONV1X1, (5, 3, 1, 1), (3, 5)),
        (CHW, (4, 6, 7), (6, 7, 4)),
    ],
)
def test_every_operation_has_its_inverse(
    op: Op, torch_shape: tuple[int, ...], our_shape: tuple[int, ...]
) -> None:
    x = rules.array("x", torch_shape)
    ours = op.to_jax(x)
    assert ours.shape == our_shape
    np.testing.assert_array_equal(op.to_torch(ours), x)


def tiny(golden: Path, part: str) -> tuple[dict[str, np.ndarray], Table, dict[str, tuple[int, ...]]]:
    listed = json.loads((golden / "tiny.manifest.json").read_text())["tensors"][part]
    tensors = {k: rules.weight(k, v) for k, v in listed.items()}
    if part == "first_stage":
        vae = vae_config(tensors, part)
        wanted = {k: v.shape for k, v in shapes(lambda rngs: VAE(vae, rngs=rngs))[1].items()}
        return tensors, engine_vae_table(vae, wanted), wanted
    config = stage_config(part, tensors, "hubert", HEAD_DIM, part)
    wanted = {k: v.shape for k, v in shapes(lambda rngs: stage(config, rngs=rngs))[1].items()}
    return tensors, stage_table(config, wanted), wanted


@pytest.mark.parametrize("part", ["keyframe", "interpolation", "first_stage"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_to_torch_of_to_jax_is_bit_equal(golden: Path, part: str, dtype: Any) -> None:
    tensors, table, wanted = tiny(golden, part)
    tensors = {k: v.astype(dtype) for k, v in tensors.items()}
    back = table.to_torch(table.to_jax(tensors, wanted))
    assert list(back)
    assert back.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert back[key].dtype == dtype
        assert back[key].tobytes() == tensor.tobytes(), key


def test_missing_surplus_and_misshapen_tensors_are_named(golden: Path) -> None:
    tensors, table, wanted = tiny(golden, "keyframe")
    key = "model.diffusion_model.middle_block.1.proj_in.weight"
    with pytest.raises(UserError, match=f"k.pt: tensor '{key}' is missing"):
        table.to_jax({k: v for k, v in tensors.items() if k != key}, wanted, "k.pt")
    with pytest.raises(UserError, match=r"tensor 'model.extra' is not part of this network"):
        table.to_jax({**tensors, "model.extra": np.zeros(1)}, wanted)
    with pytest.raises(
        UserError, match=rf"tensor '{key}' has shape \[64, 63\], the network needs \[64, 64\]"
    ):
        table.to_jax({**tensors, key: tensors[key][:, 1:]}, wanted)
    surplus = {"first_stage_model.decoder.x": np.zeros(1), "conditioner.embedders.0.encoder.y": np.zeros(1)}
    assert table.to_jax({**tensors, **surplus}, wanted).keys() == wanted.keys()


def test_a_table_that_names_a_tensor_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="torch key 'a' twice"):
        Table([Row("a", "x"), Row("a", "y")])
    with pytest.raises(ValueError, match="path 'x' twice"):
        Table([Row("a", "x"), Row("b", "x")])


def test_a_model_directory_holds_every_tensor_of_its_checkpoints(
    checkpoints: Checkpoints, tiny_model: Path
) -> None:
    model = open_model(tiny_model)
    assert model.config.keyframe.audio_encoder == "hubert"
    assert model.config.interpolation.audio_encoder == "wavlm"
    assert model.config.keyframe.latent_size == model.config.interpolation.latent_size == 8
    assert model.config.provenance["audio_wavlm"].startswith("wavlm.pt sha256:")
    tensors = open_tensors(checkpoints.keyframe)
    wanted = {k: v.shape for k, v in shapes(maker(model.config, "keyframe"))[1].items()}
    back = stage_table(model.config.keyframe, wanted).to_torch(model.load("keyframe").params)
    assert all(np.array_equal(back[k], tensors[k]) for k in back)


def refused(
    checkpoints: Checkpoints, folder: Path, match: str, mask: MaskKind = "box", **changes: Any
) -> None:
    """The conversion stops with this sentence and leaves nothing behind."""
    before = sorted(folder.iterdir())
    with pytest.raises(UserError, match=match):
        convert(dataclasses.replace(checkpoints, **changes), folder / "model", HEAD_DIM, mask)
    assert sorted(folder.iterdir()) == before


def test_checkpoints_that_do_not_fit_are_refused(checkpoints: Checkpoints, tmp_path: Path) -> None:
    refused(checkpoints, tmp_path, "checkpoints swapped", keyframe=checkpoints.interpolation)
    refused(checkpoints, tmp_path, "tensor 'encoder.down_blocks.0.resnets.0.conv1.weight' is missing",
            vae=checkpoints.audio["keyframe"].path)  # fmt: skip
    wavlm = checkpoints.audio["interpolation"]
    as_hubert = AudioSource("hubert", wavlm.path)
    refused(checkpoints, tmp_path, "this is a wavlm encoder, not hubert",
            audio={"keyframe": as_hubert, "interpolation": as_hubert})  # fmt: skip
    two = {"keyframe": checkpoints.audio["keyframe"], "interpolation": as_hubert}
    refused(checkpoints, tmp_path, "two checkpoints", audio=two)


def test_a_stage_without_one_tensor_is_refused(checkpoints: Checkpoints, tmp_path: Path) -> None:
    tensors = dict(open_tensors(checkpoints.keyframe))
    key = "model.diffusion_model.out.0.bias"
    source = tmp_path / "source"
    source.mkdir()
    broken = save_deepspeed(source / "broken.pt", {k: v for k, v in tensors.items() if k != key})
    refused(checkpoints, tmp_path, f"tensor '{key}' is missing", keyframe=broken)
    broken = save_deepspeed(source / "misshapen.pt", {**tensors, key: tensors[key][1:]})
    refused(checkpoints, tmp_path, rf"tensor '{key}' has shape \[31\]", keyframe=broken)


@pytest.mark.parametrize(
    "key",
    [
        "model.diffusion_model.input_blocks.0.0.weight",
        "model.diffusion_model.input_blocks.1.0.in_layers.2.weight",
        "model.learned_mask",
    ],
)
def test_a_stage_whose_sizes_cannot_be_told_is_refused(golden: Path, key: str) -> None:
    tensors = tiny(golden, "interpolation")[0]
    with pytest.raises(UserError, match=rf"source: tensor '{key}' has shape \[\], not"):
        stage_config("interpolation", {**tensors, key: np.zeros(())}, "hubert", HEAD_DIM, "source")
    begin = f"{key.rpartition('.')[0]}." if "blocks" in key else key
    without = {k: v for k, v in tensors.items() if not k.startswith(begin)}
    with pytest.raises(UserError, match=rf"source: tensor '{key}' is missing"):
        stage_config("interpolation", without, "hubert", HEAD_DIM, "source")


def test_a_vae_whose_sizes_cannot_be_told_is_refused(golden: Path) -> None:
    tensors = tiny(golden, "first_stage")[0]
    key = "first_stage_model.decoder.conv_in.weight"
    with pytest.raises(UserError, match=rf"source: tensor '{key}' has shape \[3\], not 4 axes"):
        vae_config({**tensors, key: np.zeros(3)}, "source")


def test_released_weights_fed_by_the_wrong_encoder_are_refused(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    released = source / "keyframe_dub.pt"
    released.write_bytes(checkpoints.keyframe.read_bytes())
    wavlm = checkpoints.audio["interpolation"]
    refused(checkpoints, tmp_path, "were trained on hubert features, not wavlm", keyframe=released,
            audio={"keyframe": wavlm, "interpolation": wavlm})  # fmt: skip


def test_a_head_size_that_cannot_be_is_refused(checkpoints: Checkpoints, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="width of 32 is not a multiple of the head size 64"):
        convert(checkpoints, tmp_path / "model")
    with pytest.raises(UserError, match="a U-Net: head_dim is 0"):
        convert(checkpoints, tmp_path / "model", head_dim=0)


def test_an_existing_folder_is_not_overwritten(checkpoints: Checkpoints, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists already"):
        convert(checkpoints, tmp_path, HEAD_DIM)


@pytest.mark.parametrize("text", ["hubert", "=x", "hubert=", "whisper=x"])
def test_audio_encoders_are_named_kind_and_path(text: str) -> None:
    with pytest.raises(UserError, match="KIND=PATH with KIND one of hubert, wav2vec2, wavlm"):
        AudioSource.parse(text)
