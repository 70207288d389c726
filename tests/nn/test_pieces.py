"""Activations walked in pieces, as a TPU does, against the whole of them at once."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from keysync_jax.bench.workloads import random_arrays
from keysync_jax.nn import blocks, pieces
from keysync_jax.nn.attention import attention_over_frames
from keysync_jax.nn.blocks import SpatioTemporalResBlock, TransformerSpatioTemporalModel
from keysync_jax.nn.frame_attention import fits, frame_attention, reference
from keysync_jax.nn.functional import bind, shapes

X = np.random.default_rng(0).standard_normal((3, 4, 8, 8, 32)).astype(np.float32)
"""Three windows of four frames; `[B, T, H, W, C]`."""


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of two frames, or of sixteen pixels, on this machine."""
    monkeypatch.setattr(pieces, "platform", lambda: "tpu")
    monkeypatch.setattr(pieces, "PIECE_BYTES", 2 * pieces.WIDENED * 4 * 64 * 32)
    monkeypatch.setattr(pieces, "PIXELS", 16)


def loops(run: Any, *arrays: Any) -> list[int]:
    """Trips of every loop of a program, in order."""
    return [e.params["length"] for e in jax.make_jaxpr(run)(*arrays).eqns if e.primitive.name == "scan"]


def agrees_with_the_whole(run: Any, params: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results, and gradients of all parameters and of the input; leaves the pieces turned off."""

    def both(params: Any, x: Any) -> Any:
        def loss(params: Any, x: Any) -> Any:
            y = run(params, x)
            return (y**2).mean(), y

        return jax.grad(loss, (0, 1), has_aux=True)(params, x)

    found = jax.jit(both)(params, X)
    monkeypatch.setattr(blocks, "pays", lambda x: False)
    whole = jax.jit(lambda p, x: both(p, x))(params, X)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6 * float(jnp.abs(b).max()))


def test_a_transformer_in_pieces(small_pieces: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Space some frames at a time, time some pixels at a time; windows without audio among them."""
    make = partial(TransformerSpatioTemporalModel, 32, 16, 24, 8, dtype=jnp.float32)
    graphdef, abstract = shapes(lambda rngs: make(rngs=rngs))
    params, audio = random_arrays(abstract), X[:, :, 0, 0, :24]

    def run(params: Any, x: Any) -> Any:
        model = bind(graphdef, params)
        return model(x, model.key_value(audio[2:]))

    assert loops(run, params, X) == [3 * 2, 3 * 2]
    agrees_with_the_whole(run, params, monkeypatch)
    assert loops(lambda p, x: run(p, x), params, X) == []


def test_a_resnet_in_pieces(small_pieces: None, monkeypatch: pytest.MonkeyPatch) -> None:
    make = partial(SpatioTemporalResBlock, 32, 48, 24, groups=8, epsilon=1e-5, dtype=jnp.float32)
    graphdef, abstract = shapes(lambda rngs: make(rngs=rngs))
    params, embedding = random_arrays(abstract), X[:, :, 0, 0, :24]

    def run(params: Any, x: Any) -> Any:
        return bind(graphdef, params)(x, embedding)

    assert len(loops(run, params, X)) == 2
    agrees_with_the_whole(run, params, monkeypatch)


def test_every_piece_is_visited_once_and_knows_its_place() -> None:
    x = jnp.zeros((2, 6, 8, 1))

    def run(piece: jax.Array, place: pieces.Place) -> jax.Array:
        window, first = place
        return piece + 100 * (window + 1) + first

    found = pieces.in_pieces(run, x, frames=3, pixels=4)[..., 0]
    wanted = 100 * np.arange(1, 3)[:, None] + np.array([0, 0, 0, 3, 3, 3])
    np.testing.assert_array_equal(found, np.broadcast_to(wanted[..., None], (2, 6, 8)))


def test_pieces_divide_and_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "platform", lambda: "tpu")
    first = jax.ShapeDtypeStruct((3, 14, 4096, 320), jnp.bfloat16)
    assert (pieces.frames_at_once(first), pieces.pixels_at_once(first)) == (2, 512)
    third = jax.ShapeDtypeStruct((3, 14, 256, 1280), jnp.bfloat16)
    assert (pieces.frames_at_once(third), pieces.pixels_at_once(third)) == (7, 128)
    assert pieces.pays(first)
    assert not pieces.pays(jax.ShapeDtypeStruct((1, 14, 64, 320), jnp.bfloat16))


def test_elsewhere_nothing_is_cut() -> None:
    assert not pieces.pays(jax.ShapeDtypeStruct((3, 14, 4096, 320), jnp.bfloat16))


@pytest.mark.parametrize(("channels", "heads"), [(320, 5), (128, 2), (64, 1)])
def test_attention_over_frames_by_the_kernel_and_by_xla(channels: int, heads: int) -> None:
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 6, 64, channels))
    assert fits(64, channels, heads)
    wanted = reference(q, k, v, heads)
    np.testing.assert_allclose(frame_attention(q, k, v, heads, True), wanted, atol=2e-6)
    np.testing.assert_allclose(attention_over_frames(q, k, v, heads), wanted, atol=2e-6)


def test_the_kernels_gradient() -> None:
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 3, 64, 64))

    def loss(run: Any, q: jax.Array) -> jax.Array:
        return (run(q, k, v, 1) ** 2).sum()

    kernel = partial(frame_attention, interpret=True)
    found, wanted = (jax.grad(partial(loss, run))(q) for run in (kernel, reference))
    np.testing.assert_allclose(found, wanted, atol=2e-6 * float(jnp.abs(wanted).max()))


def test_shapes_that_the_kernel_does_not_take() -> None:
    assert not fits(60, 320, 5)  # no whole groups of pixels
    assert not fits(64, 192, 2)  # heads of 96 straddle 128 lanes
