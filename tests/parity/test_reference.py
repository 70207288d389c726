"""The release itself, run on this machine, and golden numbers on a GPU. `make parity-gpu` runs all of it.

KEYSYNC_REFERENCE=CHECKOUT KEYSYNC_REFERENCE_PYTHON=PYTHON pytest tests/parity/test_reference.py
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keysync_jax.config import StageConfig, UNetConfig, VAEConfig
from keysync_jax.nn.functional import bind
from keysync_jax.parity import ours, rules, sizes
from keysync_jax.parity.clip import AUDIO_DIM, LATENT_SIDE, SIDE, clip_noise
from keysync_jax.parity.compare import compare, first_parting
from keysync_jax.parity.live import Request, check_device, make_golden, our_precision
from keysync_jax.parity.release import Release, own_device
from tests.clips import face_landmarks


@pytest.fixture(scope="session")
def release() -> Release:
    """The release that the environment names."""
    names = ("KEYSYNC_REFERENCE", "KEYSYNC_REFERENCE_PYTHON")
    checkout, python = (os.environ.get(name, "") for name in names)
    if not checkout or not python:
        pytest.skip(f"{' and '.join(names)} do not name a checkout of the release and its Python")
    found = Release(Path(checkout), Path(python), own_device())
    check_device(found)
    return found


@pytest.fixture(scope="session")
def live(release: Release, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Golden files of the tiny size that the release has just computed, in fp32 and in fp64."""
    request = Request(sizes.tiny(), training=True, layers=True)
    return make_golden(release, request, tmp_path_factory.mktemp("live"), exact=True, say=print)


# --- the release ---------------------------------------------------------------------------------


@pytest.mark.reference
def test_every_intermediate_is_the_releases(live: Path) -> None:
    done = list(compare(live))
    assert len(done) > 1500
    exceeded = [f"{c.entry}: {c.error:.1e} (bound {c.bound:.1e})" for c in done if not c.ok]
    assert not exceeded
    assert max(c.difference for c in done) < 1e-4


@pytest.mark.reference
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_is_as_near_to_the_exact_numbers_as_the_releases(live: Path, dtype: str) -> None:
    exceeded = [f"{c.entry}: {c.error:.1e} (bound {c.bound:.1e})" for c in compare(live, dtype) if not c.ok]
    assert not exceeded


@pytest.mark.reference
def test_an_epsilon_that_diffusers_has_otherwise_is_found_and_named(
    live: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1e-6 for 1e-5 in one norm, as some of diffusers' resnets have it."""

    def bind_broken(graphdef: Any, params: Any) -> Any:
        model = bind(graphdef, params)
        if hasattr(model, "unet"):
            model.unet.down_blocks[1].resnets[0].spatial_res_block.norm2.epsilon = 1e-6
        return model

    monkeypatch.setattr(ours, "bind", bind_broken)
    stage = (c for c in compare(live) if "/layer/" in c.entry or "/block/" in c.entry)
    parting = first_parting(stage)
    assert parting is not None
    assert parting.entry == "keyframe/layer/unet.down_blocks.1.resnets.0.spatial_res_block.norm2"


def clip_networks() -> sizes.Networks:
    """The smallest whose frames, latents and audio have the sizes that the release's pipeline fixes."""
    unet: dict[str, Any] = {"block_out_channels": (32, 32, 32), "layers_per_block": 1, "attention_levels": ()}
    unet |= {"head_dim": 32, "cross_attention_dim": 32, "addition_embed_dim": 32}
    keyframe = StageConfig("keyframe", "hubert", UNetConfig(8, **unet))
    interpolation = StageConfig("interpolation", "hubert", UNetConfig(9, **unet))
    return sizes.Networks("clip", keyframe, interpolation, VAEConfig((32, 32, 32, 32), layers_per_block=1))


@pytest.mark.reference
def test_the_whole_pipeline_on_a_clip(release: Release, tmp_path: Path) -> None:
    frames = 14
    given = {
        "latents": rules.array("clip/latents", (frames, 4, LATENT_SIDE, LATENT_SIDE)),
        "landmarks": np.trunc(SIDE / 2 + 8 * (face_landmarks(frames, SIDE, SIDE) - SIDE / 2)),
        **{f"audio_{stage}": rules.array(f"clip/{stage}", (frames, 2, AUDIO_DIM)) for stage in sizes.STAGES},
        **clip_noise(frames),
    }
    clip = {f"clip/in/{name}": np.ascontiguousarray(x, np.float32) for name, x in given.items()}
    request = Request(clip_networks(), samplers=False, clip=clip)
    done = list(compare(make_golden(release, request, tmp_path, exact=False, say=print)))
    exceeded = [f"{c.entry}: {c.error:.1e} (bound {c.bound:.1e})" for c in done if not c.ok]
    assert not exceeded
    pipeline = {c.entry: c for c in done if c.entry.startswith("clip/")}
    assert set(pipeline) == {f"clip/out/{name}" for name in ("masks", "keyframes", "windows", "frames")}
    assert pipeline["clip/out/masks"].difference == 0
    assert max(c.difference for c in pipeline.values()) < 1e-4


# --- golden numbers on a GPU ---------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp32", "tf32", "bf16", "fp16"])
def test_golden_numbers_on_a_gpu(golden: Path, dtype: str) -> None:
    done = list(compare(golden / "tiny", dtype))
    assert len(done) == 36
    exceeded = [f"{c.entry}: {c.error:.1e} (bound {c.bound:.1e})" for c in done if not c.ok]
    assert not exceeded


@pytest.mark.reference
@pytest.mark.parametrize("script", ["infer_raw", "inference", pytest.param("train", marks=pytest.mark.gpu)])
def test_the_precisions_of_the_releases_scripts(release: Release, tmp_path: Path, script: str) -> None:
    request = Request(sizes.tiny(), script, training=script == "train")
    prefix = make_golden(release, request, tmp_path, exact=True, say=print)
    exceeded = [c.entry for c in compare(prefix, our_precision(script, release.device)) if not c.ok]
    assert not exceeded
