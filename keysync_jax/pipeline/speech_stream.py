"""One pass of a speech encoder over a clip of any length, piece by piece and exact.

The result equals `SpeechModel` on the whole clip. Only two things in the encoder look at more than
a neighbourhood, and both are accumulated: the moments of the first convolution (Chan et al. 1983)
and the softmax of the attention (Milakov & Gimelshein 2018). The convolutions get overlapping pieces,
so that every vector is computed once with all the samples it depends on.

Every jitted function sees one shape whatever the clip's length, so a longer clip compiles nothing
new. What grows with the length is the clip's own: the wave and the vectors before and after a layer
(host), that layer's keys and values (device). Time grows with the square of the length, as attention
does.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.stages import Lowered

from keysync_jax.config import SpeechConfig
from keysync_jax.nn.functional import bind, select, shapes
from keysync_jax.nn.relative_bias import block_bias
from keysync_jax.nn.speech import EXACT, EncoderLayer, SpeechModel, halo, scores
from keysync_jax.typing import Array, Params


@dataclass(frozen=True)
class Pieces:
    """Sizes of the pieces, in vectors of 20 ms; the memory of a pass and its shapes follow from them."""

    front: int = 256
    block: int = 512


PIECES = Pieces()


class Network(NamedTuple):
    """What a jitted function is compiled for: hashable, and small enough to hash on every call."""

    config: SpeechConfig
    dtype: np.dtype


class Softmax(NamedTuple):
    """A softmax-weighted sum over the keys seen so far: float32 `[B, H, Q]`, `[B, H, Q]`, `[B, H, Q, K]`."""

    peak: Array
    total: Array
    values: Array


def hidden_states(
    config: SpeechConfig,
    params: Params,
    wave: np.ndarray,
    *,
    dtype: jnp.dtype = jnp.float32,
    pieces: Pieces = PIECES,
) -> np.ndarray:
    """The last layer of a speech encoder over a whole clip.

    Args:
      params: of `SpeechModel`; may lie in host memory, one layer at a time goes to the device.
      wave: float32 `[S]`, 16 kHz, already normalised where the encoder needs it.
      dtype: of the arithmetic; norms, softmax and what lies between the pieces are float32.

    Returns:
      float32 `[N, D]`, N = `config.vectors(S)`.

    Raises:
      ValueError: the wave is shorter than one vector.
    """
    count = config.vectors(len(wave))
    if count == 0:
        raise ValueError(f"a wave of {len(wave)} samples is shorter than {config.receptive_field}")
    network = Network(config, jnp.dtype(dtype))
    trunk = jax.device_put({k: v for k, v in params.items() if not k.startswith("encoder.layers.")})
    x = _project(network, trunk, wave, count, pieces.front)
    x = _add_positions(network, trunk, x, pieces.block)
    line = _distance_bias(network, trunk)
    for i in range(config.num_hidden_layers):
        layer = jax.device_put(select(params, f"encoder.layers.{i}"))
        x = _through_layer(network, layer, x, count, line)
    return x.reshape(-1, x.shape[-1])[:count]


def programs(
    config: SpeechConfig, params: Params, dtype: jnp.dtype = jnp.float32, pieces: Pieces = PIECES
) -> Iterator[Callable[[], Lowered]]:
    """What lowers each program of `hidden_states`, which compiles nothing more once they are compiled.

    Args:
      params: shapes in place of arrays.
    """
    network = Network(config, jnp.dtype(dtype))
    trunk = {k: v for k, v in params.items() if not k.startswith("encoder.layers.")}
    layer = select(params, "encoder.layers.0")
    owned = pieces.front * config.hop // config.conv_stride[0]
    samples = pieces.front * config.hop + config.receptive_field - config.hop
    chunk, vectors = _fp32(1, samples), _fp32(1, pieces.block, config.hidden_size)
    moments = jax.eval_shape(_first_moments, network, owned, trunk, chunk, 1)
    padded = _fp32(1, pieces.block + sum(halo(config)), config.hidden_size)
    line = jax.eval_shape(_distance_bias, network, trunk)
    key, value = jax.eval_shape(_keys_values, network, layer, vectors)
    query, gate, softmax = jax.eval_shape(_queries, network, layer, vectors)
    yield partial(_first_moments.lower, network, owned, trunk, chunk, 1)
    yield partial(_front.lower, network, trunk, chunk, *moments)
    yield partial(_positions.lower, network, trunk, padded)
    yield partial(_distance_bias.lower, network, trunk)
    yield partial(_keys_values.lower, network, layer, vectors)
    yield partial(_queries.lower, network, layer, vectors)
    yield partial(_attend.lower, softmax, query, gate, key, value, line, 0, 1)
    yield partial(_finish.lower, network, layer, vectors, softmax)


def _fp32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _project(network: Network, trunk: Params, wave: np.ndarray, count: int, size: int) -> np.ndarray:
    """Front end and projection: `[S]` -> `[N, D]`."""
    config = network.config
    outputs = (len(wave) - config.conv_kernel[0]) // config.conv_stride[0] + 1
    owned = size * config.hop // config.conv_stride[0]
    # The first convolution has outputs past the last vector; its moments need a piece for those too.
    pieces = max(-(-outputs // owned), -(-count // size))
    hop, overlap = size * config.hop, config.receptive_field - config.hop
    wave = np.pad(wave.astype(np.float32), (0, max(0, pieces * hop + overlap - len(wave))))
    chunks = [wave[None, i * hop : (i + 1) * hop + overlap] for i in range(pieces)]
    moments = Moments()
    for i, chunk in enumerate(chunks):
        valid = min(owned, outputs - i * owned)
        if valid > 0:
            moments = moments.merge(valid, *_first_moments(network, owned, trunk, chunk, valid))
    mean, variance = (np.asarray(m, np.float32) for m in (moments.mean, moments.variance))
    vectors = [np.asarray(_front(network, trunk, c, mean, variance))[0] for c in chunks[: -(-count // size)]]
    return np.concatenate(vectors)[:count]


def _add_positions(network: Network, trunk: Params, x: np.ndarray, size: int) -> np.ndarray:
    """Positional convolution: `[N, D]` -> `[blocks, size, D]`, the tail filled up with anything finite."""
    before, after = halo(network.config)
    blocks = -(-len(x) // size)
    padded = np.pad(x, ((before, blocks * size - len(x) + after), (0, 0)))
    pieces = (padded[None, i * size : (i + 1) * size + before + after] for i in range(blocks))
    return np.concatenate([np.asarray(_positions(network, trunk, p)) for p in pieces])


def _through_layer(
    network: Network, layer: Params, x: np.ndarray, count: int, line: Array | None
) -> np.ndarray:
    """One transformer layer over all blocks `[blocks, size, D]`; keys from `count` on are padding."""
    size = x.shape[1]
    keys = [_keys_values(network, layer, block[None]) for block in x]
    done = np.empty_like(x)
    for i, block in enumerate(x):
        q, gate, softmax = _queries(network, layer, block[None])
        for j, (k, v) in enumerate(keys):
            valid = min(size, count - j * size)
            softmax = _attend(softmax, q, gate, k, v, line, (j - i) * size, valid)
        done[i] = np.asarray(_finish(network, layer, block[None], softmax))[0]
    return done


@dataclass(frozen=True)
class Moments:
    """Mean and sum of squared deviations of what has been merged so far, in float64."""

    count: int = 0
    mean: np.ndarray | float = 0.0
    squares: np.ndarray | float = 0.0

    def merge(self, count: int, mean: Array, squares: Array) -> "Moments":
        """With another `count` values, given by their own mean and squared deviations (Chan et al. 1983)."""
        total = self.count + count
        delta = np.asarray(mean, np.float64) - self.mean
        return Moments(
            total,
            self.mean + delta * (count / total),
            self.squares + np.asarray(squares, np.float64) + delta**2 * (self.count * count / total),
        )

    @property
    def variance(self) -> np.ndarray | float:
        """The biased variance."""
        return self.squares / self.count


@functools.lru_cache
def _graphs(network: Network) -> tuple[nnx.GraphDef, nnx.GraphDef]:
    """The encoder without its layers, and one layer (all are alike)."""
    config, dtype = network
    bare = dataclasses.replace(config, num_hidden_layers=0)
    trunk, _ = shapes(lambda rngs: SpeechModel(bare, dtype=dtype, rngs=rngs))
    layer, _ = shapes(lambda rngs: EncoderLayer(config, dtype=dtype, rngs=rngs))
    return trunk, layer


def _trunk(network: Network, params: Params) -> SpeechModel:
    return bind(_graphs(network)[0], params)


def _layer(network: Network, params: Params) -> EncoderLayer:
    return bind(_graphs(network)[1], params)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _first_moments(
    network: Network, owned: int, trunk: Params, chunk: Array, valid: Array
) -> tuple[Array, Array]:
    """Mean and squared deviations `[B, C]` of the first `valid` of the outputs that this piece owns."""
    x = _trunk(network, trunk).feature_extractor.first(chunk)[:, :owned].astype(jnp.float32)
    inside = (jnp.arange(owned) < valid)[:, None]
    mean = jnp.sum(x, axis=1, where=inside) / valid
    return mean, jnp.sum(jnp.square(x - mean[:, None]), axis=1, where=inside)


@functools.partial(jax.jit, static_argnums=0)
def _front(network: Network, trunk: Params, chunk: Array, mean: Array, variance: Array) -> Array:
    model = _trunk(network, trunk)
    extractor = model.feature_extractor
    features = extractor.rest(extractor.first(chunk), mean, variance)
    return model.feature_projection(features).astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def _positions(network: Network, trunk: Params, padded: Array) -> Array:
    return _trunk(network, trunk).encoder.positions(padded).astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def _distance_bias(network: Network, trunk: Params) -> Array | None:
    return _trunk(network, trunk).encoder.distance_bias()


@functools.partial(jax.jit, static_argnums=0)
def _keys_values(network: Network, layer: Params, x: Array) -> tuple[Array, Array]:
    return _layer(network, layer).attention.keys_values(x)


@functools.partial(jax.jit, static_argnums=0)
def _queries(network: Network, layer: Params, x: Array) -> tuple[Array, Array | None, Softmax]:
    """Queries, their gate, and a softmax that has seen no key yet."""
    q, gate = _layer(network, layer).attention.queries(x)
    batch, count, heads, width = q.shape
    peak = jnp.full((batch, heads, count), -jnp.inf, jnp.float32)
    return q, gate, Softmax(peak, jnp.zeros_like(peak), jnp.zeros((batch, heads, count, width), jnp.float32))


@functools.partial(jax.jit, donate_argnums=0)
def _attend(
    seen: Softmax,
    q: Array,
    gate: Array | None,
    k: Array,
    v: Array,
    line: Array | None,
    offset: Array,
    valid: Array,
) -> Softmax:
    """Takes one block of keys into the softmax, of which the first `valid` >= 1 are of the clip."""
    bias = None if line is None else block_bias(line, offset, q.shape[1], k.shape[1])
    s = jnp.where(jnp.arange(k.shape[1]) < valid, scores(q, k, gate, bias), -jnp.inf)
    peak = jnp.maximum(seen.peak, s.max(-1))
    weights, kept = jnp.exp(s - peak[..., None]), jnp.exp(seen.peak - peak)
    values = jnp.einsum(
        "bhqk,bkhd->bhqd", weights.astype(v.dtype), v, precision=EXACT, preferred_element_type=jnp.float32
    )
    return Softmax(peak, seen.total * kept + weights.sum(-1), seen.values * kept[..., None] + values)


@functools.partial(jax.jit, static_argnums=0)
def _finish(network: Network, layer: Params, x: Array, seen: Softmax) -> Array:
    model = _layer(network, layer)
    heads = (seen.values / seen.total[..., None]).transpose(0, 2, 1, 3)
    return model.finish(x, model.attention.out(heads)).astype(jnp.float32)
