"""The sizes of a dub's calls by what a device has free, and what they need at most."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from keysync_jax.config import ModelConfig
from keysync_jax.diffusion.guidance import Separated
from keysync_jax.diffusion.schedule import align_your_steps
from keysync_jax.errors import UserError
from keysync_jax.model import DEFAULT, open_model
from keysync_jax.pipeline.dub import DubSettings
from keysync_jax.pipeline.generate import Sampling
from keysync_jax.pipeline.memory import Batches, batches
from keysync_jax.pipeline.sampling import Windows, sample_windows, sample_windows_in_turn
from tests.pipeline.devices_worker import SIZE, networks

GIB = 2**30


def full_size(crop: int = 512) -> ModelConfig:
    """The embedded model's config with the sizes that memory depends on."""
    config = open_model(DEFAULT, only=()).config
    unet = replace(config.interpolation.unet, block_out_channels=(320, 640, 1280))
    stage = replace(config.interpolation, unet=unet, latent_size=crop // config.vae.factor)
    return replace(config, interpolation=stage, keyframe=replace(config.keyframe, latent_size=crop // 8))


@pytest.mark.parametrize(
    ("memory", "dtype", "stats", "crop", "expected"),
    [
        ("balanced", "fp32", None, 512, Batches(1, 2, False)),
        ("fast", "fp32", {}, 512, Batches(1, 2, False)),
        ("small", "fp32", None, 512, Batches(1, 1, True)),
        ("small", "bf16", {"bytes_limit": 80 * GIB}, 512, Batches(1, 1, True)),
        ("balanced", "bf16", {"bytes_limit": 80 * GIB, "bytes_in_use": 10 * GIB}, 512, Batches(1, 16, False)),
        ("balanced", "bf16", {"bytes_limit": 16 * GIB, "bytes_in_use": GIB}, 512, Batches(1, 4, False)),
        ("balanced", "bf16", {"bytes_limit": 4 * GIB}, 512, Batches(1, 1, False)),
        ("balanced", "bf16", {"bytes_limit": GIB}, 512, Batches(1, 1, False)),
        ("balanced", "bf16", {"bytes_limit": 4 * GIB}, 128, Batches(1, 16, False)),
        ("fast", "bf16", {"bytes_limit": 80 * GIB}, 512, Batches(8, 16, False)),
        ("fast", "bf16", {"bytes_limit": 16 * GIB}, 512, Batches(4, 8, False)),
        ("fast", "fp32", {"bytes_limit": 16 * GIB}, 512, Batches(2, 8, False)),
        ("fast", "bf16", {"bytes_limit": GIB}, 512, Batches(1, 1, False)),
    ],
)
def test_calls_take_what_fits_the_modes_share_of_the_free_memory(
    monkeypatch: pytest.MonkeyPatch,
    memory: Any,
    dtype: Any,
    stats: dict[str, int] | None,
    crop: int,
    expected: Batches,
) -> None:
    class Device:
        def memory_stats(self) -> dict[str, int] | None:
            return stats

    config = full_size(crop)
    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    assert batches(memory, config, dtype) == expected
    assert batches(memory, config, dtype, 5) == replace(expected, windows=5)


@pytest.mark.parametrize(("windows", "size"), [(1, 1), (2, 2), (3, 4), (5, 6), (100, 6)])
def test_a_call_is_no_larger_than_its_stage_needs(windows: int, size: int) -> None:
    assert Sampling(Separated(), np.ones(2), windows_per_call=6).calls(windows).size == size


def test_another_mode_is_refused() -> None:
    with pytest.raises(UserError, match="the memory is small, balanced, fast, not large"):
        DubSettings(memory="large")  # type: ignore[arg-type]


def test_branches_in_turn_give_what_they_give_at_once_in_less_memory() -> None:
    graphdef, params = networks()["interpolation"]
    draw = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return draw.standard_normal((2, *shape), np.float32)

    latents = normal(14, SIZE, SIZE, 4)
    mask = draw.integers(0, 2, (2, 14, SIZE, SIZE, 1)).astype(np.float32)
    windows = Windows(normal(14, SIZE, SIZE, 4), normal(14, 2, 768), normal(2, SIZE, SIZE, 4), latents, mask)
    inputs = (graphdef, params, windows, Separated(3.0, 1.5), align_your_steps().astype(np.float32))
    with jax.default_matmul_precision("highest"):
        at_once, in_turn = (
            function.lower(*inputs).compile() for function in (sample_windows, sample_windows_in_turn)
        )
    expected = np.asarray(at_once(*inputs[1:]))
    np.testing.assert_allclose(in_turn(*inputs[1:]), expected, atol=1e-5 * np.abs(expected).max())
    used = [program.memory_analysis().temp_size_in_bytes for program in (in_turn, at_once)]
    assert used[0] < 0.7 * used[1]
