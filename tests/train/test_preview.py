"""Previews while training."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from keysync_jax.data.records import Dataset
from keysync_jax.train import preview as preview_module
from keysync_jax.train.mesh import make_mesh
from keysync_jax.train.preview import Preview
from keysync_jax.train.start import load_vae
from keysync_jax.train.step import TrainState
from tests.train.smallest_config import smallest
from tests.train.synthetic_dataset import LATENT, write_dataset


@contextmanager
def counted() -> Iterator[list[str]]:
    """Programs that are made in the block, compiled or found on disk."""
    made: list[str] = []

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            made.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield made
    jax.monitoring.unregister_event_duration_listener(listen)


def test_the_next_preview_makes_no_new_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(smallest(), log=dataclasses.replace(smallest().log, preview_every=1))
    preview = Preview(config, Dataset(write_dataset(tmp_path / "data")), load_vae(config))
    sampled = jnp.ones((1, config.stage.frames, LATENT, LATENT, config.vae.latent_channels))
    monkeypatch.setattr(preview_module, "sample_windows", lambda *_: sampled)
    mesh = make_mesh(config.mesh, config.batch_size)
    state: Any = TrainState(jnp.int32(0), {}, {}, (), None)
    graphdef: Any = nnx.GraphDef
    with counted() as first:
        latents = preview.latents(mesh, graphdef, state)
    np.testing.assert_array_equal(latents, sampled[0])
    with counted() as second:
        preview.latents(mesh, graphdef, state)
    assert first
    assert not second
