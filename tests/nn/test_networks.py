"""Full-size networks map one to one onto the reference's tensors; shapes alone, nothing is allocated."""

import json
import math
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from keysync_jax.bench.workloads import random_arrays
from keysync_jax.config import StageConfig, UNetConfig, VAEConfig
from keysync_jax.convert.table import Table
from keysync_jax.convert.unet import stage_config, stage_table
from keysync_jax.convert.vae import engine_vae_table, vae_config
from keysync_jax.errors import UserError
from keysync_jax.nn import attention as attention_module
from keysync_jax.nn.attention import attention
from keysync_jax.nn.functional import bind, init, shapes
from keysync_jax.nn.layers import GroupNorm, gelu
from keysync_jax.nn.stages import stage
from keysync_jax.nn.vae import VAE

COUNTS = {"keyframe": 1430, "interpolation": 1431, "first_stage": 372}


@cache
def manifest(golden: Path) -> dict[str, Any]:
    return json.loads((golden / "manifest_full.json").read_text())["tensors"]


def weightless(shapes_of: dict[str, list[int]]) -> dict[str, np.ndarray]:
    """Tensors of the right shapes that take no memory."""
    return {k: np.broadcast_to(np.float32(0), v) for k, v in shapes_of.items()}


def network(part: str, tensors: dict[str, np.ndarray]) -> tuple[Any, Table, dict[str, tuple[int, ...]]]:
    if part == "first_stage":
        config: Any = vae_config(tensors, part)
        abstract = shapes(lambda rngs: VAE(config, rngs=rngs))[1]
        wanted = {k: v.shape for k, v in abstract.items()}
        return config, engine_vae_table(config, wanted), wanted
    config = stage_config(part, tensors, "hubert", 64, part)
    abstract = shapes(lambda rngs: stage(config, rngs=rngs))[1]
    wanted = {k: v.shape for k, v in abstract.items()}
    return config, stage_table(config, wanted), wanted


@pytest.mark.parametrize("part", COUNTS)
def test_full_size_parameters_are_the_references(golden: Path, part: str) -> None:
    tensors = weightless(manifest(golden)[part])
    config, table, wanted = network(part, tensors)
    assert len(tensors) == len(table.rows) == len(wanted) == COUNTS[part]
    params = table.to_jax(tensors, wanted)
    assert {k: v.shape for k, v in params.items()} == wanted
    sizes: Any = {
        "keyframe": StageConfig("keyframe", "hubert", UNetConfig(in_channels=8)),
        "interpolation": StageConfig("interpolation", "hubert", UNetConfig(in_channels=9)),
        "first_stage": VAEConfig(),
    }
    assert config == sizes[part]


def test_a_stage_of_the_other_kind_is_refused(golden: Path) -> None:
    tensors = weightless(manifest(golden)["interpolation"])
    with pytest.raises(UserError, match="takes 9 channels, the keyframe stage takes 8; are the two"):
        stage_config("keyframe", tensors, "hubert", 64, "interpolation.pt")


def test_keys_and_values_are_computed_once_a_window() -> None:
    """The cross-attention's matrices meet `[B, T, D]`, never a frame's or a pixel's copy of it."""
    unet = UNetConfig(block_out_channels=(32, 32), layers_per_block=1, attention_levels=(0, 1), head_dim=8)
    config = StageConfig("keyframe", "hubert", unet, latent_size=8)
    graphdef, abstract = shapes(lambda rngs: stage(config, rngs=rngs))
    audio = jnp.zeros((2, 14, 1024))
    jaxpr = jax.make_jaxpr(lambda p, a: bind(graphdef, p).key_value(a))(abstract, audio)
    found = jax.tree.leaves(jax.eval_shape(lambda p, a: bind(graphdef, p).key_value(a), abstract, audio))
    transformers = 2 * 1 + 1 + 2 * 2  # down, mid, up
    assert len(found) == transformers * 2 * 2  # space and time, keys and values
    assert {leaf.shape for leaf in found} == {(2, 14, 4, 8)}
    assert str(jaxpr).count("dot_general") == len(found)
    whole = jax.make_jaxpr(
        lambda p, x, c, a, r: bind(graphdef, p)(x, c, a, r, bind(graphdef, p).key_value(a))
    )(abstract, jnp.zeros((2, 14, 8, 8, 4)), jnp.zeros(2), audio, jnp.zeros((2, 1, 8, 8, 4)))
    wide = [e for e in whole.eqns if e.primitive.name == "dot_general" and e.invars[0].aval.shape[-1] == 1024]
    # Besides keys and values only the per-frame embedding reads the 1024-wide audio vectors.
    assert len(wide) == len(found) + 1
    assert all(e.invars[0].aval.shape == (2, 14, 1024) for e in wide)


def test_windows_without_audio_need_no_keys() -> None:
    """Keys and values have no bias, so of zero audio the cross-attention makes its output's bias."""
    config = StageConfig(
        "keyframe",
        "hubert",
        UNetConfig(in_channels=8, block_out_channels=(32, 32), attention_levels=(0,), layers_per_block=1,
                   head_dim=16, cross_attention_dim=24, addition_embed_dim=24),
        latent_size=4,
    )  # fmt: skip
    graphdef, abstract = shapes(lambda rngs: stage(config, rngs=rngs))
    params = random_arrays(abstract)
    draw = [jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(3, 14, 4, 4, 4), (3, 14, 24)])]
    x, audio = draw[0], draw[1].at[:2].set(0)

    @partial(jax.jit, static_argnums=1)
    def of(params: Any, first: int) -> jax.Array:
        model = bind(graphdef, params)
        reference = jnp.zeros((3, 1, 4, 4, 4))
        return model(x, jnp.zeros(3), audio, reference, model.key_value(audio[first:]))

    def run(first: int) -> np.ndarray:
        return np.asarray(of(params, first))

    everywhere = run(0)
    np.testing.assert_allclose(run(2), everywhere, atol=1e-5 * np.abs(everywhere).max())
    assert np.abs(run(2)[:2] - run(2)[2]).max() > 1e-3


def test_interpolation_condition_has_the_ends_z_m_and_the_indicator() -> None:
    unet = UNetConfig(
        in_channels=9, block_out_channels=(32,), layers_per_block=1, attention_levels=(), head_dim=8
    )
    config = StageConfig("interpolation", "hubert", unet, latent_size=4)
    graphdef, params = init(lambda rngs: stage(config, rngs=rngs))
    params["z_m"] = jnp.full((4, 4, 4), 7.0)
    ends = jnp.stack([jnp.full((1, 4, 4, 4), v) for v in (1.0, 2.0)], axis=1)
    condition = np.asarray(bind(graphdef, params).condition(ends))
    assert condition.shape == (1, 14, 4, 4, 5)
    np.testing.assert_array_equal(condition[0, :, 0, 0, 0], [1] + [7] * 12 + [2])
    np.testing.assert_array_equal(condition[0, :, 0, 0, 4], [1] + [0] * 12 + [1])


def test_long_attention_block_by_block_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = jax.random.normal(jax.random.key(0), (3, 4, 40, 2, 8))
    whole = attention(q, k, v)
    gradient = jax.grad(lambda q: (attention(q, k, v) ** 2).sum())(q)
    monkeypatch.setattr(attention_module, "MAX_SCORE_BYTES", 1)
    assert "length=40" in str(jax.make_jaxpr(attention)(q, k, v))  # a scan over single queries
    np.testing.assert_allclose(attention(q, k, v), whole, atol=1e-6)
    np.testing.assert_allclose(jax.grad(lambda q: (attention(q, k, v) ** 2).sum())(q), gradient, atol=1e-5)


def test_a_cpu_keeps_the_scores_in_its_caches() -> None:
    x = jax.ShapeDtypeStruct((14, 1024, 2, 32), "float32")
    assert "length=32" in str(jax.make_jaxpr(attention)(x, x, x))  # blocks of 32 queries
    x = jax.ShapeDtypeStruct((4096, 14, 5, 64), "float32")
    assert "scan" not in str(jax.make_jaxpr(attention)(x, x, x))  # the frames of a pixel


def test_group_norm_is_exact_where_the_mean_is_large() -> None:
    x = np.random.default_rng(0).standard_normal((1, 256, 256, 64)).astype(np.float32) + 3
    norm = GroupNorm(64, 32, epsilon=1e-5, dtype=jnp.float32, rngs=nnx.Rngs(0))
    groups = x.reshape(1, -1, 32, 2).astype(np.float64)
    wanted = (groups - groups.mean((1, 3), keepdims=True)) / np.sqrt(groups.var((1, 3), keepdims=True) + 1e-5)
    np.testing.assert_allclose(norm(x), wanted.reshape(x.shape), atol=1e-5)
    half = GroupNorm(64, 32, epsilon=1e-5, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))(x.astype(jnp.bfloat16))
    np.testing.assert_allclose(half.astype(np.float32), wanted.reshape(x.shape), atol=0.03)


def test_gelu_is_the_exact_one() -> None:
    x = np.linspace(-6, 6, 1001, dtype=np.float32)
    wanted = [0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in x.astype(np.float64)]
    np.testing.assert_allclose(gelu(x), wanted, atol=1e-6)
