"""From a model directory to PyTorch's layouts and back, bit for bit."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from keysync_jax.config import ModelConfig
from keysync_jax.convert.checkpoint import Checkpoints as Sources
from keysync_jax.convert.checkpoint import convert
from keysync_jax.convert.containers import open_tensors
from keysync_jax.convert.export import export_torch
from keysync_jax.convert.unet import diffusers_unet_table
from keysync_jax.convert.vae import diffusers_vae_table
from keysync_jax.errors import UserError
from keysync_jax.model import components, open_model
from keysync_jax.tensorfile import TensorFile
from keysync_jax.train.start import stage_shapes
from tests.tiny_model import HEAD_DIM, same, tensors


@pytest.fixture(scope="module")
def sizes(tiny_model: Path) -> ModelConfig:
    return open_model(tiny_model).config


@pytest.mark.parametrize("pickled", [False, True])
def test_the_reference_layout_converts_back(
    checkpoints: Sources, tiny_model: Path, sizes: ModelConfig, tmp_path: Path, pickled: bool
) -> None:
    files = export_torch(tiny_model, tmp_path / "torch", pickled=pickled)
    suffix = ".pt" if pickled else ".safetensors"
    assert [f.name for f in files] == [f"{n}{suffix}" for n in ("interpolation", "keyframe", "vae")]
    interpolation, keyframe, vae = files
    convert(Sources(keyframe, interpolation, vae, checkpoints.audio), tmp_path / "model", HEAD_DIM)
    for component in components(sizes):
        assert same(tensors(tmp_path / "model", component), tensors(tiny_model, component)), component
    original, back = open_tensors(checkpoints.keyframe), open_tensors(keyframe)
    assert all(np.array_equal(back[key], original[key]) for key in back)


def test_the_diffusers_layout(tiny_model: Path, sizes: ModelConfig, tmp_path: Path) -> None:
    export_torch(tiny_model, tmp_path / "torch", "diffusers")
    for kind in ("keyframe", "interpolation"):
        stage, params = sizes.stage(kind), tensors(tiny_model, kind)
        inner = {p.removeprefix("unet."): s for p, s in stage_shapes(stage).items() if p.startswith("unet.")}
        folder = open_tensors(tmp_path / "torch" / kind / "unet")
        back = diffusers_unet_table(stage.unet, inner).to_jax(folder, inner)
        assert same(back, {p: params[f"unet.{p}"] for p in inner})
        rest = TensorFile(tmp_path / "torch" / kind / "keysync.safetensors")
        assert len(rest) + len(inner) == len(params)
    vae, params = open_tensors(tmp_path / "torch/vae"), tensors(tiny_model, "vae")
    with_quant = dataclasses.replace(sizes.vae, quant_conv=True)
    wanted = {p: x.shape for p, x in params.items()}
    wanted |= {"quant_conv.kernel": (1, 1, 8, 8), "quant_conv.bias": (8,)}
    back = diffusers_vae_table(with_quant, wanted).to_jax(vae, wanted)
    np.testing.assert_array_equal(back.pop("quant_conv.kernel")[0, 0], np.eye(8))
    assert not back.pop("quant_conv.bias").any()
    assert same(back, params)


def test_diffusers_loads_its_layout(tiny_model: Path, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    export_torch(tiny_model, tmp_path / "torch", "diffusers")
    for name, folder in (
        ("UNetSpatioTemporalConditionModel", "interpolation/unet"),
        ("AutoencoderKLTemporalDecoder", "vae"),
    ):
        path = tmp_path / "torch" / folder
        loaded, report = getattr(diffusers, name).from_pretrained(path, output_loading_info=True)
        # A tiny VAE has a resnet more than diffusers', whose middle block has as many as a level has layers.
        surplus = [k for k in report.pop("unexpected_keys") if "decoder.mid_block.resnets.1." not in k]
        assert not surplus
        assert not any(report.values()), report
        stored = open_tensors(path)
        assert all(stored.shapes[k] == tuple(v.shape) for k, v in loaded.state_dict().items())
    heads = json.loads((tmp_path / "torch/keyframe/unet/config.json").read_text())["num_attention_heads"]
    assert heads == [32 // HEAD_DIM, 64 // HEAD_DIM]


def test_an_export_that_cannot_be_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists already"):
        export_torch(tiny_model, tmp_path)
    with pytest.raises(UserError, match=r"\.pt is for the reference's layout"):
        export_torch(tiny_model, tmp_path / "x", "diffusers", pickled=True)
    assert not list(tmp_path.iterdir())
