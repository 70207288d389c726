"""From a run to a model directory and on to PyTorch's layouts, bit for bit."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from keysync_jax.config import ModelConfig, StageKind
from keysync_jax.convert.checkpoint import Checkpoints as Sources
from keysync_jax.convert.checkpoint import convert
from keysync_jax.convert.containers import open_tensors
from keysync_jax.convert.unet import diffusers_unet_table
from keysync_jax.convert.vae import diffusers_vae_table
from keysync_jax.errors import UserError
from keysync_jax.model import components, open_model
from keysync_jax.tensorfile import TensorFile
from keysync_jax.train.checkpoint import Checkpoints, settle_config
from keysync_jax.train.config import DataConfig, InitConfig, TrainConfig
from keysync_jax.train.export import export, export_torch
from keysync_jax.train.optimizer import partition
from keysync_jax.train.start import stage_shapes
from keysync_jax.train.step import TrainState
from tests.tiny_model import HEAD_DIM
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


def tensors(model: Path, component: str) -> dict[str, np.ndarray]:
    return dict(TensorFile(model / f"{component}.safetensors"))


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(
        x.dtype == b[k].dtype and np.ascontiguousarray(x).tobytes() == np.ascontiguousarray(b[k]).tobytes()
        for k, x in a.items()
    )


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
