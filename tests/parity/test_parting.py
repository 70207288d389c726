"""A layer that is not the reference's is found and named; the reference here is our own network, unbroken."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from keysync_jax.config import StageConfig, UNetConfig, VAEConfig, to_dict
from keysync_jax.nn.functional import bind, shapes
from keysync_jax.nn.layers import Record
from keysync_jax.parity import engine, ours
from keysync_jax.parity.bounds import (
    CEILINGS,
    MULTIPLE,
    ROUNDING,
    Bounds,
    kind_of,
    scales,
    stored_bound,
    stored_floors,
)
from keysync_jax.parity.compare import Comparison, compare, first_parting
from keysync_jax.parity.golden import Golden, RuleWeights, stacked
from keysync_jax.parity.inputs import inputs
from keysync_jax.parity.report import held, markdown, report, write_report
from keysync_jax.parity.sizes import Networks
from keysync_jax.tensorfile import write_tensors

RESNET = "down_blocks.0.resnets.0"
NORM = f"layer/unet.{RESNET}.spatial_res_block.norm2"
ORDER = (
    "layer/unet.time_embedding.linear_2",
    "block/conv_in",
    f"layer/unet.{RESNET}.spatial_res_block.norm1",
    f"layer/unet.{RESNET}.spatial_res_block.conv1",
    NORM,
    f"layer/unet.{RESNET}.spatial_res_block.conv2",
    f"layer/unet.{RESNET}.temporal_res_block.conv1",
    f"block/{RESNET}",
    "block/mid_block.attentions.0",
    "block/conv_out",
)


def smallest() -> Networks:
    """One level; its only transformer is the middle block's."""
    unet = UNetConfig(8, 4, (64,), 1, (), head_dim=32, cross_attention_dim=32, addition_embed_dim=32)
    stage = StageConfig("keyframe", "hubert", unet, audio_dim=16, latent_size=4)
    other = dataclasses.replace(stage, kind="interpolation", unet=dataclasses.replace(unet, in_channels=9))
    return Networks("smallest", stage, other, VAEConfig((32,), 1), clips=2)


def torch_shape(x: jax.Array, entry: str, b: int, t: int) -> tuple[int, ...]:
    """The shape that torch's module returns."""
    if "time_embedding" in entry:
        return (b * t, x.shape[-1])
    if "temporal" in entry:
        return (b, x.shape[-1], t, 4, 4)
    return (b * t, x.shape[-1], 4, 4)


def write_own_golden(folder: Path) -> Path:
    """A golden file of our keyframe stage: its blocks and some of its layers."""
    networks = smallest()
    config = networks.keyframe
    given = inputs(networks)
    manifest: dict[str, Any] = {
        "config": {name: to_dict(networks[name]) for name in ("keyframe", "interpolation", "vae")},
        "tensors": {"keyframe": engine.torch_shapes(config)},
        "order": [f"keyframe/{entry}" for entry in ORDER],
    }
    manifest["config"]["batch"] = networks.clips
    (folder / "live.manifest.json").write_text(json.dumps(manifest))
    table, wanted = engine.table_of(config)
    params = table.to_jax(RuleWeights(engine.torch_shapes(config)), wanted, place=jnp.asarray)
    write_tensors(folder / "live.safetensors", given | {"keyframe/out/network": np.zeros((28, 4, 4, 4))})
    x = ours.StageNetwork(Golden(folder / "live"), "keyframe", "fp32").x
    graphdef, _ = shapes(engine.make(config))

    @jax.jit
    def run(params: Any) -> Record:
        model, blocks, record = bind(graphdef, params), {}, {}  # type: tuple[Any, Record, Record]
        ours.watch(model, record, ORDER)
        model(x.x, x.c_noise, model.project_audio(x.audio), x.reference, record=blocks)
        return record | {f"block/{name}": x for name, x in blocks.items() if f"block/{name}" in ORDER}

    with jax.default_matmul_precision("highest"):
        record = run(params)
    arrays = {}
    for entry in ORDER:
        out = record[entry]
        shape = torch_shape(out, entry, 2, 14)
        arrays[f"keyframe/{entry}"] = (
            stacked(out) if entry.startswith("block/") else ours.torch_layout(entry, out, shape)
        )
    write_tensors(folder / "live.safetensors", given | arrays)
    return folder / "live"


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_own_golden(tmp_path_factory.mktemp("own"))


def broken(monkeypatch: pytest.MonkeyPatch, epsilon: float) -> None:
    """Our networks with another epsilon in one norm."""

    def bind_broken(graphdef: Any, params: Any) -> Any:
        model = bind(graphdef, params)
        model.unet.down_blocks[0].resnets[0].spatial_res_block.norm2.epsilon = epsilon
        return model

    monkeypatch.setattr(ours, "bind", bind_broken)


def test_an_unbroken_network_parts_nowhere(own: Path) -> None:
    done = list(compare(own))
    assert [c.entry for c in done] == [f"keyframe/{entry}" for entry in ORDER]
    assert held(done)
    assert first_parting(done) is None
    assert max(c.error for c in done) < 1e-6


def test_one_epsilon_is_found_and_its_layer_named(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, 1e-3)  # 1e-5 in the release
    said: list[str] = []
    done = report(compare(own), said.append)
    parting = first_parting(done)
    assert parting is not None
    assert parting.entry == f"keyframe/{NORM}"
    assert said[-1] == f"first place where the two part: keyframe/{NORM}"
    assert all(c.ok for c in done[: ORDER.index(NORM)])
    assert not any(c.ok for c in done[ORDER.index(NORM) :])
    assert not held(done)


def test_what_is_kept_of_a_comparison(own: Path, tmp_path: Path) -> None:
    done = list(compare(own))
    done[4] = dataclasses.replace(done[4], error=0.5, difference=0.5)
    write_report(tmp_path, done, {"title": "smallest, fp32, cpu", "notes": ["a note"]})
    text = (tmp_path / "report.md").read_text()
    assert "smallest, fp32, cpu:" in text
    assert "| layers | 6 | 5.0e-01 |" in text
    assert f"9 of 10 entries are within their bounds; the first beyond it is `keyframe/{NORM}`." in text
    assert "- a note" in text
    content = json.loads((tmp_path / "report.json").read_text())
    assert [entry["entry"] for entry in content["entries"]] == [c.entry for c in done]
    picture = cv2.imread(str(tmp_path / "errors.png"))
    red = (picture[..., 2] > 180) & (picture[..., 0] < 90) & (picture[..., 1] < 90)
    dots = cv2.connectedComponentsWithStats(red[60:].astype(np.uint8))[2][1:]
    assert sum(area > 80 for *_, area in dots) == 1  # the one dot of the one entry beyond its bound


def test_a_comparison_without_a_number_is_none_within_its_bound() -> None:
    lost = Comparison("keyframe/out/network", float("nan"), float("nan"), None, 1.0)
    assert not lost.ok
    assert "nan" in markdown([lost], {"title": "x"})


def test_a_gradient_that_cancels_is_measured_by_the_largest() -> None:
    arrays = {
        "keyframe/train/grad/a": np.array([0.5, -2.0]),
        "keyframe/train/grad/b": np.array([1e-9, 3e-17]),
        "keyframe/train/grad/c": np.array([1e-4]),
        "keyframe/grad/b": np.array([1e-9]),
        "keyframe/out/network": np.array([1e-9]),
        "keyframe/uncond/concat": np.zeros(3),
    }
    assert scales(arrays, arrays) == {
        "keyframe/train/grad/a": 2.0,
        "keyframe/train/grad/b": 2.0,
        "keyframe/train/grad/c": 1e-4,
        "keyframe/grad/b": 1e-9,  # of another loss, alone there
        "keyframe/out/network": 1e-9,
        "keyframe/uncond/concat": 1.0,
    }


def test_bounds_are_multiples_of_measured_floors(tmp_path: Path) -> None:
    large = np.linspace(-1, 1, 2000)
    exact = {
        "keyframe/block/a": large,
        "keyframe/block/b": large,
        "keyframe/train/loss": np.array([2.0]),
        "keyframe/train/loss_pixel": np.array([1.0]),
    }
    stored = {k: x.astype(np.float32) for k, x in exact.items()}
    stored["keyframe/block/a"][7] += 1e-3
    stored["keyframe/train/loss_pixel"] += np.float32(1e-4)
    write_tensors(tmp_path / "x.safetensors", stored)
    write_tensors(tmp_path / "x.exact.safetensors", exact)
    (tmp_path / "x.manifest.json").write_text('{"config": {}, "tensors": {}}')
    golden = Golden(tmp_path / "x")
    bounds = Bounds(golden, list(exact), "fp32")
    assert bounds["keyframe/block/a"] == pytest.approx(MULTIPLE * 1e-3, rel=1e-3)
    assert bounds["keyframe/block/b"] == MULTIPLE * ROUNDING["fp32"]  # no floor is below a rounding
    # A single number may be right by luck: its kind's floor counts.
    assert bounds["keyframe/train/loss"] == bounds["keyframe/train/loss_pixel"]
    assert bounds["keyframe/train/loss"] == pytest.approx(MULTIPLE * 1e-4, rel=1e-3)
    # What the reference computed in fp32 says nothing of bf16.
    other = Bounds(golden, list(exact), "bf16")
    assert other["keyframe/block/a"] == MULTIPLE * max(stored_floors()["bf16"]["block"], ROUNDING["bf16"])
    assert other.floor("keyframe/block/a") is None


def test_floors_are_stored_for_every_precision_and_kind() -> None:
    entries = ["cond/concat", "block/x", "layer/x", "out/network", "out/denoised_0", "step/3/x", "grad/x"]
    entries += ["out/sample_cfg", "train/loss", "train/grad/x.mix_factor"]
    kinds = {kind_of(f"keyframe/{entry}") for entry in entries} | {kind_of("vae/out/moments")}
    assert "" not in kinds
    floors = stored_floors()
    assert set(floors) == set(ROUNDING)
    for precision, found in floors.items():
        assert kinds <= set(found), precision
        assert all(0 <= floor < 1 for kind, floor in found.items() if kind != "mix")


def test_a_stored_floor_bounds_what_it_measured_and_the_ceiling_the_rest() -> None:
    floor = stored_floors()["bf16"]["grad"]
    assert stored_bound("grad", "bf16", "cpu", exact=True) == MULTIPLE * floor > CEILINGS["bf16"]["grad"]
    assert stored_bound("grad", "bf16", "cpu") == CEILINGS["bf16"]["grad"]
    assert stored_bound("clip", "fp32", "cpu") == CEILINGS["fp32"]["clip"]  # no floor is stored
    assert stored_bound("network", "fp32", "cuda") == CEILINGS["fp32"]["network"]
