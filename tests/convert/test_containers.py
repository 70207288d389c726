"""The checkpoint containers: each is recognised, read bit for bit, or refused in one sentence."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from keysync_jax.convert.containers import Container, Tensors, open_tensors
from keysync_jax.errors import UserError
from keysync_jax.tensorfile import write_tensors
from tests.convert.checkpoints import save_bare, save_deepspeed, save_lightning, save_microsoft


def some_tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 256, (4, 6), np.uint8)
    return {
        "model.diffusion_model.out.2.weight": rng.standard_normal((4, 3, 2)).astype(np.float32),
        "model.learned_mask": bits.view(np.float16),
        "conditioner.embedders.2.linear.weight": bits.view(ml_dtypes.bfloat16),
        "steps": np.int64(7).reshape(()),
    }


def assert_same(read: Tensors, expected: dict[str, np.ndarray]) -> None:
    assert set(read) == set(expected)
    assert len(read) == len(expected)
    for name, x in expected.items():
        assert read[name].dtype == x.dtype
        assert read[name].shape == read.shapes[name] == x.shape
        assert read[name].tobytes() == x.tobytes()
        assert not read[name].flags.writeable


def test_safetensors(tmp_path):
    write_tensors(tmp_path / "svd.safetensors", some_tensors())
    read = open_tensors(tmp_path / "svd.safetensors")
    assert read.container is Container.SAFETENSORS
    assert_same(read, some_tensors())


@pytest.mark.parametrize("name", ["keyframe.bin", "keyframe.pt", "keyframe.pth"])
def test_bare_pickle(tmp_path, name):
    pytest.importorskip("torch")
    read = open_tensors(save_bare(tmp_path / name, some_tensors()))
    assert read.container is Container.BARE
    assert_same(read, some_tensors())
    assert read.config == {}


def test_pickle_from_before_torch_1_6(tmp_path):
    pytest.importorskip("torch")
    path = save_bare(tmp_path / "old.pt", some_tensors(), _use_new_zipfile_serialization=False)
    assert_same(open_tensors(path), some_tensors())


def test_lightning(tmp_path):
    pytest.importorskip("torch")
    read = open_tensors(save_lightning(tmp_path / "last.ckpt", some_tensors()))
    assert read.container is Container.LIGHTNING
    assert_same(read, some_tensors())


def test_deepspeed_loses_its_prefix(tmp_path):
    pytest.importorskip("torch")
    read = open_tensors(save_deepspeed(tmp_path / "keyframe_dub.pt", some_tensors()))
    assert read.container is Container.DEEPSPEED
    assert_same(read, some_tensors())


def test_microsoft_gives_its_sizes(tmp_path):
    pytest.importorskip("torch")
    cfg = {"encoder_layers": 12, "conv_feature_layers": "[(512,10,5)]", "normalize": False}
    read = open_tensors(save_microsoft(tmp_path / "WavLM-Base+.pt", some_tensors(), cfg))
    assert read.container is Container.MICROSOFT
    assert read.config == cfg
    assert_same(read, some_tensors())


def test_pickled_tensors_are_views_of_the_file(tmp_path):
    pytest.importorskip("torch")
    read = open_tensors(save_bare(tmp_path / "a.pt", some_tensors()))
    for name in read:
        assert np.shares_memory(read[name], read[name])


def test_parameters_and_strided_tensors_are_read(tmp_path):
    torch = pytest.importorskip("torch")
    x = torch.arange(6.0).reshape(2, 3)
    torch.save({"p": torch.nn.Parameter(x), "t": x.T, "b": x.bfloat16().T}, tmp_path / "a.pt")
    read = open_tensors(tmp_path / "a.pt")
    np.testing.assert_array_equal(read["p"], x.numpy())
    np.testing.assert_array_equal(read["t"], x.numpy().T)
    np.testing.assert_array_equal(read["b"].astype(np.float32), x.numpy().T)


def make_folder(folder: Path, config: dict) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_shards(folder: Path, index: str, tensors: dict[str, np.ndarray], stem: str = "shard") -> None:
    """Two shards, and the index that names each tensor's."""
    names = list(tensors)
    weight_map = {}
    for i, part in enumerate((names[:2], names[2:])):
        shard = f"{stem}-{i}.safetensors"
        write_tensors(folder / shard, {name: tensors[name] for name in part})
        weight_map |= dict.fromkeys(part, shard)
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


DIFFUSERS = {"_class_name": "UNetSpatioTemporalConditionModel", "in_channels": 8}
TRANSFORMERS = {"model_type": "hubert", "hidden_size": 768}


@pytest.mark.parametrize(
    ("config", "weights", "container"),
    [
        (TRANSFORMERS, "model.safetensors", Container.TRANSFORMERS),
        (DIFFUSERS, "diffusion_pytorch_model.safetensors", Container.DIFFUSERS),
        (DIFFUSERS, "diffusion_pytorch_model.fp16.safetensors", Container.DIFFUSERS),
    ],
)
def test_folder(tmp_path, config, weights, container):
    folder = make_folder(tmp_path / "model", config)
    write_tensors(folder / weights, some_tensors())
    read = open_tensors(folder)
    assert read.container is container
    assert read.config == config
    assert_same(read, some_tensors())


@pytest.mark.parametrize(
    ("config", "index"),
    [
        (TRANSFORMERS, "model.safetensors.index.json"),
        (DIFFUSERS, "diffusion_pytorch_model.safetensors.index.json"),
        (DIFFUSERS, "diffusion_pytorch_model.safetensors.index.fp16.json"),
    ],
)
def test_folder_in_shards(tmp_path, config, index):
    folder = make_folder(tmp_path / "model", config)
    write_shards(folder, index, some_tensors())
    assert_same(open_tensors(folder), some_tensors())


def test_folder_with_a_pickle(tmp_path):
    pytest.importorskip("torch")
    folder = make_folder(tmp_path / "hubert", TRANSFORMERS)
    save_bare(folder / "pytorch_model.bin", some_tensors())
    read = open_tensors(folder)
    assert read.container is Container.TRANSFORMERS
    assert_same(read, some_tensors())


def test_full_precision_goes_before_fp16(tmp_path):
    folder = make_folder(tmp_path / "unet", DIFFUSERS)
    write_tensors(folder / "diffusion_pytorch_model.fp16.safetensors", {"x": np.zeros(3, np.float16)})
    write_shards(folder, "diffusion_pytorch_model.safetensors.index.json", some_tensors())
    assert_same(open_tensors(folder), some_tensors())


def test_what_the_libraries_save_is_read(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    sizes = {"encoder_block_out_channels": (8,), "num_encoder_blocks": (1,)}
    model = diffusers.AutoencoderTiny(
        decoder_block_out_channels=(8,), num_decoder_blocks=(1,), latent_channels=4, **sizes
    )
    expected = {name: x.numpy() for name, x in model.state_dict().items()}
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="4KB")
    model.save_pretrained(tmp_path / "variant", variant="fp16", max_shard_size="4KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    for name in ("whole", "shards", "variant"):
        read = open_tensors(tmp_path / name)
        assert read.container is Container.DIFFUSERS
        assert_same(read, expected)


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as error:
        open_tensors(path)
    message = str(error.value)
    assert message.startswith(str(path.parent))
    assert "\n" not in message
    return message


def test_a_name_with_and_without_the_prefix_is_doubled(tmp_path):
    pytest.importorskip("torch")
    x = np.zeros(2, np.float32)
    path = save_bare(tmp_path / "a.bin", {"m.w": x, "_forward_module.m.w": x})
    assert "tensor 'm.w' is there twice" in refusal(path)


def test_a_name_in_two_shards_is_doubled(tmp_path):
    folder = make_folder(tmp_path / "unet", TRANSFORMERS)
    write_shards(folder, "model.safetensors.index.json", some_tensors())
    write_tensors(folder / "shard-0.safetensors", some_tensors())
    assert "is there twice" in refusal(folder)


def test_every_other_file_is_refused(tmp_path):
    pytest.importorskip("torch")
    for name in ("a.pt", "a.safetensors"):
        (tmp_path / name).write_bytes(b"")
        assert "is empty" in refusal(tmp_path / name)
        (tmp_path / name).unlink()
        assert "cannot be read" in refusal(tmp_path / name)
    (tmp_path / "weights.h5").write_bytes(b"x")
    assert "ends in one of .safetensors" in refusal(tmp_path / "weights.h5")
    (tmp_path / "page.bin").write_bytes(b"<!doctype html>" * 99)
    assert "not a PyTorch file" in refusal(tmp_path / "page.bin")


def test_every_truncation_is_noticed(tmp_path):
    pytest.importorskip("torch")
    path = save_deepspeed(tmp_path / "a.pt", some_tensors())
    whole = path.read_bytes()
    for length in range(1, len(whole), len(whole) // 50):
        path.write_bytes(whole[:length])
        assert "truncated or damaged" in refusal(path)


def test_a_pickle_of_anything_but_tensors_is_refused(tmp_path):
    torch = pytest.importorskip("torch")
    weights = {"w": torch.zeros(2)}
    for harmful in (Path("x"), subprocess.run, Container.BARE):
        torch.save({"state_dict": weights, "callbacks": harmful}, tmp_path / "a.ckpt")
        message = refusal(tmp_path / "a.ckpt")
        assert "only tensors and plain values are read from pickles" in message
        assert "Path" in message or "run" in message or "Container" in message


class Harmful:
    def __reduce__(self):
        return exec, ("open('executed', 'w')",)


def test_no_pickle_runs_code(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    torch.save({"w": torch.zeros(2), "x": Harmful()}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Harmful(), protocol=2))
    for name in ("a.pt", "b.pt"):
        assert "only tensors" in refusal(tmp_path / name)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds no dictionary"),
        ({}, "no tensors"),
        ({"state_dict": {}}, "no tensors"),
        ({"model": {}, "iteration": 3}, "its entry 'model' is no tensor"),
        ({"module": {"w": 1.5}}, "its entry 'w' is no tensor"),
        ({3: None}, "its entry 3 is no tensor"),
    ],
)
def test_pickles_that_are_no_checkpoint(tmp_path, content, message):
    torch = pytest.importorskip("torch")
    torch.save(content, tmp_path / "a.pt")
    assert message in refusal(tmp_path / "a.pt")


def test_sparse_tensors_are_refused_by_name(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"s": torch.eye(2).to_sparse()}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="tensor 's' is not a dense array"):
        open_tensors(tmp_path / "a.pt")["s"]


def test_a_tensor_larger_than_its_file_is_refused_by_name(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"s": torch.zeros(1).expand(10**12)}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="tensor 's' is larger than what the file holds of it"):
        open_tensors(tmp_path / "a.pt")["s"]
    torch.save({"s": torch.arange(6.0).reshape(2, 3).T}, tmp_path / "b.pt")
    np.testing.assert_array_equal(open_tensors(tmp_path / "b.pt")["s"], [[0, 3], [1, 4], [2, 5]])


def test_folders_that_are_no_model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    assert "config.json: cannot be read" in refusal(folder)
    (folder / "config.json").write_text("{")
    assert "not JSON" in refusal(folder)
    (folder / "config.json").write_text("[]")
    assert "not a JSON object" in refusal(folder)
    (folder / "config.json").write_text("{}")
    assert "no model.safetensors or pytorch_model.bin" in refusal(folder)
    (folder / "model_index.json").write_text("{}")
    assert "name the folder of one of its models" in refusal(folder)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({}, "names no tensors"),
        ({"w": "../other.safetensors"}, "is not the name of a file beside it"),
        ({"w": 3}, "is not the name of a file beside it"),
        ({"w": ["a"]}, "is not the name of a file beside it"),
        ({"w": "absent.safetensors"}, "absent.safetensors: cannot be read"),
        ({"w": "a.safetensors", "v": "a.safetensors"}, "tensor 'v' is missing"),
    ],
)
def test_indexes_that_are_not_whole(tmp_path, weight_map, message):
    folder = make_folder(tmp_path / "model", TRANSFORMERS)
    write_tensors(tmp_path / "other.safetensors", {"w": np.zeros(2)})
    write_tensors(folder / "a.safetensors", {"w": np.zeros(2)})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert message in refusal(folder)


def test_without_torch_the_extra_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.pt").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "pip install 'keysync_jax[convert]'" in refusal(tmp_path / "a.pt")
