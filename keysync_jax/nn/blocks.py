"""The spatio-temporal blocks of SVD's U-Net: resnets and transformers, space first, then time."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from keysync_jax.nn.layers import (
    AlphaBlender,
    Attention,
    Conv2d,
    ConvTime,
    FeedForward,
    GroupNorm,
    KeyValue,
    LayerNorm,
    TimestepEmbedding,
    sinusoid,
)
from keysync_jax.nn.pieces import Place, frames_at_once, in_pieces, pays, pixels_at_once
from keysync_jax.nn.remat import recomputed
from keysync_jax.typing import Array


class ResnetBlock(nnx.Module):
    """Norm, SiLU, conv, + embedding, norm, SiLU, conv, + skip.

    In space it takes `[N, H, W, C]` (3x3), in time `[B, T, H * W, C]` (a kernel of 3 over T); the
    embedding is added where `embed_dim` is given.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        embed_dim: int | None,
        *,
        groups: int,
        epsilon: float,
        time: bool = False,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        conv = ConvTime if time else Conv2d
        self.norm1 = GroupNorm(in_dim, groups, epsilon=epsilon, dtype=dtype, rngs=rngs)
        self.conv1 = conv(in_dim, out_dim, dtype=dtype, rngs=rngs)
        self.time_emb_proj = nnx.Linear(embed_dim, out_dim, dtype=dtype, rngs=rngs) if embed_dim else None
        self.norm2 = GroupNorm(out_dim, groups, epsilon=epsilon, dtype=dtype, rngs=rngs)
        self.conv2 = conv(out_dim, out_dim, dtype=dtype, rngs=rngs)
        differ = in_dim != out_dim
        self.conv_shortcut = Conv2d(in_dim, out_dim, 1, dtype=dtype, rngs=rngs) if differ else None

    def __call__(self, x: Array, embedding: Array | None = None) -> Array:
        """`embedding` broadcasts against x after its projection: `[N, 1, 1, E]` or `[B, T, 1, E]`."""
        h = self.conv1(nnx.silu(self.norm1(x)))
        if self.time_emb_proj is not None and embedding is not None:
            h = h + self.time_emb_proj(nnx.silu(embedding))
        h = self.conv2(nnx.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class SpatioTemporalResBlock(nnx.Module):
    """A resnet in space, one in time on its output, and their blend.

    Args:
      embed_dim: width of the embedding added to each; None in the VAE.
      epsilon: of the spatial norms; that of the temporal ones is 1e-5 in the U-Net and the VAE.
      temporal_first: alpha weighs the temporal branch (the VAE) instead of the spatial one (U-Net).
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        embed_dim: int | None,
        *,
        groups: int,
        epsilon: float,
        temporal_first: bool = False,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        common: dict[str, Any] = {"groups": groups, "dtype": dtype, "rngs": rngs}
        self.spatial_res_block = ResnetBlock(in_dim, out_dim, embed_dim, epsilon=epsilon, **common)
        self.temporal_res_block = ResnetBlock(out_dim, out_dim, embed_dim, epsilon=1e-5, time=True, **common)
        self.time_mixer = AlphaBlender()
        self.temporal_first, self.width = temporal_first, out_dim

    def __call__(self, x: Array, embedding: Array | None = None) -> Array:
        """`[B, T, H, W, C]` and `[B, T, E]` -> `[B, T, H, W, C']`."""
        b, t, h, w, c = x.shape
        x = x.reshape(b, t, h * w, c)
        if embedding is None or not pays(x):
            return self._in_time(self._in_space(x, (h, w), embedding), embedding).reshape(b, t, h, w, -1)

        # Whole windows: of fewer frames the compiler would cut pictures up to fill its registers.
        def in_space(piece: Array, place: Place) -> Array:
            return self._in_space(piece, (h, w), jax.lax.dynamic_index_in_dim(embedding, place[0]))

        def in_time(piece: Array, place: Place) -> Array:
            return self._in_time(piece, jax.lax.dynamic_index_in_dim(embedding, place[0]))

        space = in_pieces(in_space, x, t, h * w, self.width)
        return in_pieces(in_time, space, t, h * w).reshape(b, t, h, w, -1)

    def _in_space(self, x: Array, size: tuple[int, int], embedding: Array | None) -> Array:
        b, t = x.shape[:2]
        per_frame = None if embedding is None else embedding.reshape(b * t, 1, 1, -1)
        y = self.spatial_res_block(x.reshape(b * t, *size, -1), per_frame)
        return y.reshape(b, t, size[0] * size[1], -1)

    def _in_time(self, space: Array, embedding: Array | None) -> Array:
        time = self.temporal_res_block(space, None if embedding is None else embedding[:, :, None])
        return self.time_mixer(*((time, space) if self.temporal_first else (space, time)))


class BasicTransformerBlock(nnx.Module):
    """Self-attention, cross-attention, feed-forward, each after a layer norm and with a skip.

    Args:
      time: attend to the frames of a pixel instead of the pixels of a frame; such a block has one more
        feed-forward before the others.
    """

    def __init__(
        self, dim: int, head_dim: int, context_dim: int, *, time: bool = False, dtype: Any, rngs: nnx.Rngs
    ):
        self.norm_in = LayerNorm(dim, dtype=dtype, rngs=rngs) if time else None
        self.ff_in = FeedForward(dim, dtype=dtype, rngs=rngs) if time else None
        self.norm1 = LayerNorm(dim, dtype=dtype, rngs=rngs)
        self.attn1 = Attention(dim, head_dim, dtype=dtype, rngs=rngs)
        self.norm2 = LayerNorm(dim, dtype=dtype, rngs=rngs)
        self.attn2 = Attention(dim, head_dim, context_dim, dtype=dtype, rngs=rngs)
        self.norm3 = LayerNorm(dim, dtype=dtype, rngs=rngs)
        self.ff = FeedForward(dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array, key_value: KeyValue, remat: bool = False) -> Array:
        """`[B, T, N, D]` -> same.

        `key_value` is of all windows or of the last ones; those before have zero audio. With `remat` the
        backward pass computes the inside of each layer again.
        """
        silent = len(x) - len(key_value[0])

        def cross(x: Array) -> Array:
            heard = _layer(BasicTransformerBlock._cross_attention, self, remat)(x[silent:], key_value)
            return heard if silent == 0 else jnp.concatenate([self._after_silence(x[:silent]), heard])

        return self._layers(x, cross, remat)

    def piece(self, x: Array, key_value: KeyValue, window: Array, windows: int) -> Array:
        """A piece `[1, T, N, D]` of the B = `windows` windows, from the one of this number; as `__call__`."""
        silent = windows - len(key_value[0])

        def heard(x: Array) -> Array:
            own = [jax.lax.dynamic_index_in_dim(a, window - silent) for a in key_value]
            return self._cross_attention(x, (own[0], own[1]))

        def cross(x: Array) -> Array:
            return jax.lax.cond(window < silent, self._after_silence, heard, x) if silent else heard(x)

        return self._layers(x, cross, remat=False)

    def _layers(self, x: Array, cross: Callable[[Array], Array], remat: bool) -> Array:
        if self.ff_in is not None and self.norm_in is not None:
            x = x + _layer(lambda self, x: self.ff_in(self.norm_in(x)), self, remat)(x)
        x = x + _layer(BasicTransformerBlock._self_attention, self, remat)(x)
        x = x + cross(x)
        return x + _layer(lambda self, x: self.ff(self.norm3(x)), self, remat)(x)

    def _self_attention(self, x: Array) -> Array:
        hidden = self.norm1(x)
        if self.ff_in is not None:
            return self.attn1.over_frames(hidden)
        return self.attn1(hidden.reshape(-1, *x.shape[2:])).reshape(x.shape)

    def _cross_attention(self, x: Array, key_value: KeyValue) -> Array:
        # Pixels stay apart from frames: they may be split over devices, which frames are not.
        return self.attn2(self.norm2(x), key_value)

    def _after_silence(self, x: Array) -> Array:
        """What cross-attention adds to tokens of windows that have zero audio.

        Keys and values have no bias: of a zero vector they are zero, and the output's bias is what is left.
        """
        bias = self.attn2.to_out.bias
        assert bias is not None
        return jnp.broadcast_to(bias[...].astype(x.dtype), x.shape)


def _layer(call: Callable[..., Array], block: BasicTransformerBlock, remat: bool) -> Callable[..., Array]:
    return recomputed(call, block) if remat else partial(call, block)


class TransformerSpatioTemporalModel(nnx.Module):
    """A transformer over the pixels of each frame, then one over the frames of each pixel."""

    def __init__(self, dim: int, head_dim: int, context_dim: int, groups: int, *, dtype: Any, rngs: nnx.Rngs):
        self.norm = GroupNorm(dim, groups, epsilon=1e-6, dtype=dtype, rngs=rngs)
        self.proj_in = nnx.Linear(dim, dim, dtype=dtype, rngs=rngs)
        block = (dim, head_dim, context_dim)
        self.transformer_blocks = nnx.List([BasicTransformerBlock(*block, dtype=dtype, rngs=rngs)])
        self.temporal_transformer_blocks = nnx.List(
            [BasicTransformerBlock(*block, time=True, dtype=dtype, rngs=rngs)]
        )
        self.time_pos_embed = TimestepEmbedding(dim, 4 * dim, dim, dtype=dtype, rngs=rngs)
        self.time_mixer = AlphaBlender()
        self.proj_out = nnx.Linear(dim, dim, dtype=dtype, rngs=rngs)

    def key_value(self, context: Array) -> tuple[KeyValue, KeyValue]:
        """Keys and values of the spatial and of the temporal cross-attention to `[B, M, D]`."""
        return (
            self.transformer_blocks[0].attn2.key_value(context),
            self.temporal_transformer_blocks[0].attn2.key_value(context),
        )

    def __call__(self, x: Array, key_value: tuple[KeyValue, KeyValue], remat: bool = False) -> Array:
        """`[B, T, H, W, C]` -> same; `key_value` and `remat` as `BasicTransformerBlock` takes them."""
        b, t, h, w, c = x.shape
        hidden = self.proj_in(self.norm(x.reshape(b * t, h, w, c)).reshape(b, t, h * w, c))
        number = self.time_pos_embed(sinusoid(jnp.arange(t), c).astype(x.dtype))[:, None]
        in_space, in_time = self.transformer_blocks[0], self.temporal_transformer_blocks[0]
        if pays(hidden) and not remat:
            space = in_pieces(
                lambda piece, place: in_space.piece(piece, key_value[0], place[0], b),
                hidden,
                frames_at_once(hidden),
                h * w,
            )
            mixed = in_pieces(
                lambda piece, place: self.time_mixer(
                    piece, in_time.piece(piece + number, key_value[1], place[0], b)
                ),
                space,
                t,
                pixels_at_once(space),
            )
        else:
            space = in_space(hidden, key_value[0], remat)
            mixed = self.time_mixer(space, in_time(space + number, key_value[1], remat))
        return x + self.proj_out(mixed).reshape(x.shape)
