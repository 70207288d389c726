"""Speech encoders: HuBERT-base, wav2vec2-base (Hsu et al. 2021, Baevski et al. 2020) and WavLM-Base+.

All three are the same network: seven convolutions over the wave, a projection, a convolution that
encodes positions, and a post-norm transformer. WavLM adds a gated relative position bias to every
attention (Chen et al. 2022, section 3.1). Parts carry transformers' names, with one exception: the
bias table, which all layers share, belongs to the encoder and not to its first layer.

The parts are cut so that a clip can be taken whole (`SpeechModel.__call__`) or piece by piece at
fixed shapes (`pipeline.speech_stream`): the two places where the whole clip matters, the statistics
of the first convolution and the attention, are arguments of the methods beside them.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from keysync_jax.config import SpeechConfig
from keysync_jax.nn.layers import gelu
from keysync_jax.nn.relative_bias import block_bias, buckets
from keysync_jax.typing import Array

EXACT = jax.lax.Precision.HIGHEST
"""Accelerators would multiply float32 in fewer bits; the encoder runs once a clip and need not."""

CONV_NORM_EPS = 1e-5


def _linear(width_in: int, width_out: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(width_in, width_out, dtype=dtype, precision=EXACT, rngs=rngs)


def _layer_norm(width: int, config: SpeechConfig, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(
        width, epsilon=config.layer_norm_eps, use_fast_variance=False, dtype=dtype, rngs=rngs
    )


class ChannelNorm(nnx.Module):
    """Group normalisation with one channel a group; the moments over time are given.

    Shapes: x `[B, N, C]`, mean and variance (biased) `[B, C]`.
    """

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.scale = nnx.Param(nnx.initializers.ones(rngs.params(), (channels,)))
        self.bias = nnx.Param(nnx.initializers.zeros(rngs.params(), (channels,)))

    def __call__(self, x: Array, mean: Array, variance: Array) -> Array:
        factor = self.scale[...] * jax.lax.rsqrt(variance + CONV_NORM_EPS)
        y = (x.astype(jnp.float32) - mean[:, None]) * factor[:, None] + self.bias[...]
        return y.astype(x.dtype)


class ConvLayer(nnx.Module):
    """One convolution of the front end, without padding; the first one has a `layer_norm`."""

    def __init__(self, config: SpeechConfig, index: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.conv = nnx.Conv(
            config.conv_dim[index - 1] if index else 1,
            config.conv_dim[index],
            kernel_size=(config.conv_kernel[index],),
            strides=(config.conv_stride[index],),
            padding="VALID",
            use_bias=config.conv_bias,
            dtype=dtype,
            precision=EXACT,
            rngs=rngs,
        )
        if index == 0:
            self.layer_norm = ChannelNorm(config.conv_dim[0], rngs=rngs)


class FeatureExtractor(nnx.Module):
    """The convolutional front end: wave `[B, S]` -> `[B, N, C]`, 50 vectors a second."""

    def __init__(self, config: SpeechConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.conv_layers = nnx.List(
            [ConvLayer(config, i, dtype=dtype, rngs=rngs) for i in range(len(config.conv_dim))]
        )

    def first(self, wave: Array) -> Array:
        """The first convolution before its normalisation, `[B, N1, C]`."""
        return self.conv_layers[0].conv(wave[..., None])

    def rest(self, x: Array, mean: Array, variance: Array) -> Array:
        """Everything after `first`, given the moments `[B, C]` of its output over the whole clip."""
        x = gelu(self.conv_layers[0].layer_norm(x, mean, variance))
        for layer in self.conv_layers[1:]:
            x = gelu(layer.conv(x))
        return x

    def __call__(self, wave: Array) -> Array:
        x = self.first(wave)
        x32 = x.astype(jnp.float32)
        return self.rest(x, x32.mean(1), x32.var(1))


class FeatureProjection(nnx.Module):
    """Layer norm and a linear map: `[B, N, C]` -> `[B, N, D]`."""

    def __init__(self, config: SpeechConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.layer_norm = _layer_norm(config.conv_dim[-1], config, dtype, rngs)
        self.projection = _linear(config.conv_dim[-1], config.hidden_size, dtype, rngs)

    def __call__(self, x: Array) -> Array:
        return self.projection(self.layer_norm(x))


class WeightNormConv(nnx.Module):
    """Grouped convolution over time whose kernel is weight_g * weight_v / |weight_v|.

    The norm is taken per tap of the kernel. Both factors stay parameters, so that a checkpoint
    survives the way here and back. Input `[B, N + taps - 1, D]`, output `[B, N, D]`.
    """

    def __init__(self, config: SpeechConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        width, taps = config.hidden_size, config.num_conv_pos_embeddings
        self.groups = config.num_conv_pos_embedding_groups
        self.dtype = dtype
        self.weight_v = nnx.Param(
            nnx.initializers.lecun_normal()(rngs.params(), (taps, width // self.groups, width))
        )
        self.weight_g = nnx.Param(jnp.linalg.norm(self.weight_v[...], axis=(1, 2), keepdims=True))
        self.bias = nnx.Param(nnx.initializers.zeros(rngs.params(), (width,)))

    def __call__(self, x: Array) -> Array:
        v = self.weight_v[...].astype(jnp.float32)
        norm = jnp.sqrt(jnp.sum(jnp.square(v), axis=(1, 2), keepdims=True))
        kernel = v * (self.weight_g[...].astype(jnp.float32) / norm)
        y = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            window_strides=(1,),
            padding="VALID",
            dimension_numbers=("NWC", "WIO", "NWC"),
            feature_group_count=self.groups,
            precision=EXACT,
        )
        return y + self.bias[...].astype(self.dtype)


class PositionalConvEmbedding(nnx.Module):
    """Positions from a convolution over the neighbours.

    `halo` is how many vectors it reads before and after each one. An even kernel reads one more
    before than after: PyTorch pads both sides alike and drops the last output.
    """

    def __init__(self, config: SpeechConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.conv = WeightNormConv(config, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """`[B, before + N + after, D]` -> `[B, N, D]`."""
        return gelu(self.conv(x))


def halo(config: SpeechConfig) -> tuple[int, int]:
    """Vectors that the positional convolution reads before and after each one."""
    taps = config.num_conv_pos_embeddings
    return taps // 2, (taps - 1) // 2


class Attention(nnx.Module):
    """Self-attention in the parts that a blockwise softmax needs. x `[B, N, D]`, heads H of width K."""

    def __init__(self, config: SpeechConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        width, self.heads = config.hidden_size, config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            _linear(width, width, dtype, rngs) for _ in range(4)
        )
        self.gated = config.kind == "wavlm"
        if self.gated:
            self.gru_rel_pos_linear = _linear(width // self.heads, 8, dtype, rngs)
            self.gru_rel_pos_const = nnx.Param(nnx.initializers.ones(rngs.params(), (self.heads,)))

    def queries(self, x: Array) -> tuple[Array, Array | None]:
        """Scaled queries `[B, N, H, K]` and, for WavLM, what each multiplies its bias by, `[B, H, N]`."""
        q = self._split(self.q_proj(x))
        return q * q.shape[-1] ** -0.5, self._gate(x) if self.gated else None

    def keys_values(self, x: Array) -> tuple[Array, Array]:
        """Keys and values, each `[B, N, H, K]`."""
        return self._split(self.k_proj(x)), self._split(self.v_proj(x))

    def out(self, heads: Array) -> Array:
        """The attended values `[B, N, H, K]` -> `[B, N, D]`."""
        return self.out_proj(heads.reshape(*heads.shape[:2], -1))

    def __call__(self, x: Array, bias: Array | None) -> Array:
        """The whole clip at once; bias `[H, N, N]` for WavLM."""
        q, gate = self.queries(x)
        k, v = self.keys_values(x)
        weights = jax.nn.softmax(scores(q, k, gate, bias), axis=-1).astype(v.dtype)
        return self.out(jnp.einsum("bhqk,bkhd->bqhd", weights, v, precision=EXACT))

    def _split(self, x: Array) -> Array:
        return x.reshape(*x.shape[:2], self.heads, -1)

    def _gate(self, x: Array) -> Array:
        """Chen et al. 2022, eq. 5 to 7: two gates from each head's slice of x, before any projection."""
        parts = self.gru_rel_pos_linear(self._split(x)).astype(jnp.float32)
        a, b = jnp.moveaxis(jax.nn.sigmoid(parts.reshape(*parts.shape[:3], 2, 4).sum(-1)), -1, 0)
        return (a * (b * self.gru_rel_pos_const[...] - 1.0) + 2.0).transpose(0, 2, 1)


def scores(q: Array, k: Array, gate: Array | None, bias: Array | None) -> Array:
    """Attention scores before the softmax, float32 `[B, H, Q, K]`; bias `[H, Q, K]`, gate `[B, H, Q]`."""
    s = jnp.einsum("bqhd,bkhd->bhqk", q, k, precision=EXACT, preferred_element_type=jnp.float32)
    return s if gate is None else s + gate[..., None] * bias


class FeedForward(nnx.Module):
    """Linear, exact gelu, linear."""

    def __init__(self, config: SpeechConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.intermediate_dense = _linear(config.hidden_size, config.intermediate_size, dtype, rngs)
        self.output_dense = _linear(config.intermediate_size, config.hidden_size, dtype, rngs)

    def __call__(self, x: Array) -> Array:
        return self.output_dense(gelu(self.intermediate_dense(x)))


class EncoderLayer(nnx.Module):
    """One post-norm transformer layer, `[B, N, D]` -> `[B, N, D]`."""

    def __init__(self, config: SpeechConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.attention = Attention(config, dtype=dtype, rngs=rngs)
        self.layer_norm = _layer_norm(config.hidden_size, config, dtype, rngs)
        self.feed_forward = FeedForward(config, dtype=dtype, rngs=rngs)
        self.final_layer_norm = _layer_norm(config.hidden_size, config, dtype, rngs)

    def finish(self, x: Array, attended: Array) -> Array:
        """What follows the attention; both `[B, N, D]`."""
        x = self.layer_norm(x + attended)
        return self.final_layer_norm(x + self.feed_forward(x))

    def __call__(self, x: Array, bias: Array | None) -> Array:
        return self.finish(x, self.attention(x, bias))


class Encoder(nnx.Module):
    """Positions and transformer layers."""

    def __init__(self, config: SpeechConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.config = config
        self.pos_conv_embed = PositionalConvEmbedding(config, dtype=dtype, rngs=rngs)
        self.layer_norm = _layer_norm(config.hidden_size, config, dtype, rngs)
        if config.kind == "wavlm":
            self.rel_attn_embed = nnx.Embed(config.num_buckets, config.num_attention_heads, rngs=rngs)
        self.layers = nnx.List(
            [EncoderLayer(config, dtype=dtype, rngs=rngs) for _ in range(config.num_hidden_layers)]
        )

    def positions(self, x: Array) -> Array:
        """Adds positions: `[B, before + N + after, D]` (zero outside the clip) -> `[B, N, D]`."""
        before, after = halo(self.config)
        centre = x[:, before : x.shape[1] - after]
        return self.layer_norm(centre + self.pos_conv_embed(x))

    def distance_bias(self) -> Array | None:
        """WavLM's bias of every distance from -M to M vectors, float32 `[H, 2M+1]`; None without one."""
        if self.config.kind != "wavlm":
            return None
        table = buckets(self.config.num_buckets, self.config.max_bucket_distance)
        return self.rel_attn_embed.embedding[...].astype(jnp.float32)[table].T


class SpeechModel(nnx.Module):
    """A whole speech encoder; parameters float32, arithmetic in `dtype`, norms and softmax in float32.

    The input is a 16 kHz wave `[B, S]`, already normalised where `config.normalise_wave` says so. The
    output is the last layer's `[B, N, D]`, N = `config.vectors(S)`.
    """

    def __init__(self, config: SpeechConfig, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        self.feature_extractor = FeatureExtractor(config, dtype=dtype, rngs=rngs)
        self.feature_projection = FeatureProjection(config, dtype=dtype, rngs=rngs)
        self.encoder = Encoder(config, dtype=dtype, rngs=rngs)

    def intermediates(self, wave: Array) -> dict[str, Array]:
        """The output of every part under the part's path, in order; the last one is the result."""
        found = {"feature_extractor": self.feature_extractor(wave)}
        x = found["feature_projection"] = self.feature_projection(found["feature_extractor"])
        padded = jnp.pad(x, ((0, 0), halo(self.encoder.config), (0, 0)))
        x = found["encoder.layer_norm"] = self.encoder.positions(padded)
        line = self.encoder.distance_bias()
        bias = None if line is None else block_bias(line, 0, x.shape[1], x.shape[1])
        for i, layer in enumerate(self.encoder.layers):
            x = found[f"encoder.layers.{i}"] = layer(x, bias)
        return found

    def __call__(self, wave: Array) -> Array:
        return list(self.intermediates(wave).values())[-1]
