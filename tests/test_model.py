"""A model directory that is incomplete, altered or inconsistent is refused in words."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from keysync_jax.config import StageConfig, UNetConfig, VAEConfig, from_dict, to_dict
from keysync_jax.errors import UserError
from keysync_jax.model import model_bytes, open_model
from tests.tiny_model import Hashed


@pytest.fixture
def copy(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_an_intact_model_opens_and_loads(tiny_model: Path) -> None:
    model = open_model(tiny_model)
    half = model.load("keyframe", "bf16").params
    assert half["unet.conv_in.kernel"].dtype == jnp.bfloat16
    assert half["unet.conv_in.bias"].dtype == jnp.float32
    assert model.load("vae").params["encoder.conv_in.kernel"].dtype == jnp.float32


def test_what_makes_another_model(copy: Path) -> None:
    """Settings that are under no file's hash do, where it came from does not."""
    first = open_model(copy)
    config = first.config
    unet = replace(config.keyframe.unet, head_dim=8)
    others = {
        replace(first, config=changed).fingerprint
        for changed in (
            replace(config, vae=replace(config.vae, scale_factor=0.2)),
            replace(config, keyframe=replace(config.keyframe, unet=unet)),
            replace(config, guidance=replace(config.guidance, audio=4.0)),
            replace(config, steps=20),
            replace(config, mask="mouth"),
        )
    }
    others.add(replace(first, hashes={**first.hashes, "vae.safetensors": "0" * 64}).fingerprint)
    assert len({first.fingerprint, *others}) == 7
    assert replace(first, config=replace(config, provenance={"vae": "x"})).fingerprint == first.fingerprint
    edit(copy, lambda c: c["keyframe"]["unet"].update(head_dim=8))
    edited = open_model(copy)
    assert edited.hashes == first.hashes
    assert edited.fingerprint in others


def test_a_process_hashes_a_model_once(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed, told = Hashed(monkeypatch), list[int]()
    sizes = {path.name: path.stat().st_size for path in copy.glob("*.safetensors")}
    assert len(sizes) == 5
    open_model(copy)
    open_model(copy, told.append).load("vae")
    assert hashed.bytes == sizes
    assert sum(told) == model_bytes(copy)


def test_only_what_is_used_is_hashed(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, hashed = open_model(copy), Hashed(monkeypatch)
    for path in copy.glob("*.safetensors"):
        path.touch()
    assert open_model(copy, only=()).fingerprint == whole.fingerprint
    assert not hashed.bytes
    open_model(copy, only=["vae"])
    assert set(hashed.bytes) == {"vae.safetensors"}
    (copy / "keyframe.safetensors").unlink()
    open_model(copy, only=["vae"])
    with pytest.raises(UserError, match=r"keyframe.safetensors: this component of the model is missing"):
        open_model(copy, only=["keyframe"])


def test_a_component_that_changes_under_a_run_is_not_loaded(copy: Path) -> None:
    model, path = open_model(copy), copy / "vae.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"vae.safetensors: was altered"):
        model.load("vae")


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a model directory"):
        open_model(tmp_path)


def test_a_missing_component(copy: Path) -> None:
    (copy / "vae.safetensors").unlink()
    with pytest.raises(UserError, match=r"vae.safetensors: this component of the model is missing"):
        open_model(copy)


def test_a_truncated_component(copy: Path) -> None:
    path = copy / "keyframe.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"keyframe.safetensors: .*truncated"):
        open_model(copy)


def test_one_altered_bit(copy: Path) -> None:
    path = copy / "audio_wavlm.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"audio_wavlm.safetensors: was altered"):
        open_model(copy)


def test_a_stage_fed_by_the_wrong_encoder(copy: Path) -> None:
    edit(copy, lambda c: c["keyframe"].update(audio_encoder="wavlm"))
    with pytest.raises(
        UserError, match=r"were trained on hubert features, config.json would feed them wavlm"
    ):
        open_model(copy)


def test_a_stage_whose_encoder_is_not_there(copy: Path) -> None:
    edit(copy, lambda c: c["encoders"].pop("wavlm"))
    with pytest.raises(
        UserError, match="interpolation stage was trained on wavlm features, but the model has only hub"
    ):
        open_model(copy)


def test_swapped_components(copy: Path) -> None:
    (copy / "keyframe.safetensors").write_bytes((copy / "vae.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"keyframe.safetensors: holds the component 'vae'"):
        open_model(copy)


def test_sizes_that_are_not_the_tensors(copy: Path) -> None:
    edit(copy, lambda c: c["vae"].update(layers_per_block=2))
    with pytest.raises(UserError, match=r"vae.safetensors: tensor .* is missing"):
        open_model(copy)


def test_an_unknown_key_names_the_nearest(copy: Path) -> None:
    edit(copy, lambda c: c["guidance"].update(audios=3))
    with pytest.raises(UserError, match=r"guidance: unknown key 'audios', did you mean 'audio'\?"):
        open_model(copy)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"frames": "14"}, "frames: '14' is not int"),
        ({"kind": "frame"}, "kind: 'frame' is not 'keyframe' or 'interpolation'"),
        ({"unet": {"block_out_channels": [32, True]}}, "True is not int"),
        ({"unet": {"head_dim": 48}}, "not a multiple of the head size 48"),
        ({"unet": {"layers_per_block": 10**9}}, "layers_per_block is 1000000000, not 1 to 256"),
        ({"unet": {"block_out_channels": []}}, "block_out_channels has 0 entries"),
        ({"frames": 0}, "the keyframe stage: frames is 0"),
    ],
)
def test_a_config_of_the_wrong_types(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        from_dict(
            StageConfig, {"kind": "keyframe", "audio_encoder": "hubert", "unet": {}, **change}, "config"
        )


def test_configs_survive_json() -> None:
    for config in (StageConfig("keyframe", "wavlm", UNetConfig(in_channels=9)), VAEConfig(quant_conv=True)):
        assert from_dict(type(config), json.loads(json.dumps(to_dict(config))), "x") == config
