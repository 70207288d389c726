"""Light-ASD: whether a face is speaking, from its pictures and a voice.

Liao et al., "A Light Weight Model for Active Speaker Detection" (2023). Input and output have 25 frames a
second; the recurrent layers see the whole piece of a clip that is given.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from keysync_jax.nn.layers import BatchNorm
from keysync_jax.typing import Array

SIDE = 112
"""Of the face pictures, pixels."""

PIXEL_MEAN, PIXEL_STD = 0.4161, 0.1688
NORM_EPS = 1e-3
WIDTHS = (32, 64, 128)
KERNELS = (3, 5)


class Branch(nnx.Module):
    """Two convolutions, each with its normalisation and ReLU; the sizes are of (time, the other axes)."""

    def __init__(self, first: nnx.Conv, second: nnx.Conv, width: int, *, rngs: nnx.Rngs):
        self.first, self.second = first, second
        self.first_norm, self.second_norm = (BatchNorm(width, epsilon=NORM_EPS, rngs=rngs) for _ in range(2))


class AudioBlock(nnx.Module):
    """Over the coefficients, then over time, with kernels of 3 and of 5; `[B, 13, N, C]`."""

    def __init__(self, dim: int, width: int, *, rngs: nnx.Rngs):
        def branch(size: int) -> Branch:
            half = size // 2
            along_coefficients = nnx.Conv(
                dim, width, (size, 1), padding=[(half, half), (0, 0)], use_bias=False, rngs=rngs
            )
            along_time = nnx.Conv(
                width, width, (1, size), padding=[(0, 0), (half, half)], use_bias=False, rngs=rngs
            )
            return Branch(along_coefficients, along_time, width, rngs=rngs)

        self.branches = nnx.List([branch(size) for size in KERNELS])
        self.last = nnx.Linear(width, width, use_bias=False, rngs=rngs)
        self.last_norm = BatchNorm(width, epsilon=NORM_EPS, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        total = jnp.zeros((), x.dtype)
        for branch in self.branches:
            y = nnx.relu(branch.first_norm(branch.first(x)))
            total += nnx.relu(branch.second_norm(branch.second(y)))
        return nnx.relu(self.last_norm(self.last(total)))


class VisualBlock(nnx.Module):
    """Over rows and columns, then over time, with kernels of 3 and of 5; `[B, T, H, W, C]`."""

    def __init__(self, dim: int, width: int, stride: int = 1, *, rngs: nnx.Rngs):
        def branch(size: int) -> Branch:
            half = size // 2
            in_space = nnx.Conv(
                dim, width, (size, size), strides=stride, padding=half, use_bias=False, rngs=rngs
            )
            in_time = nnx.Conv(
                width, width, (size, 1), padding=[(half, half), (0, 0)], use_bias=False, rngs=rngs
            )
            return Branch(in_space, in_time, width, rngs=rngs)

        self.branches = nnx.List([branch(size) for size in KERNELS])
        self.last = nnx.Linear(width, width, use_bias=False, rngs=rngs)
        self.last_norm = BatchNorm(width, epsilon=NORM_EPS, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        batch, frames = x.shape[:2]
        total = jnp.zeros((), x.dtype)
        for branch in self.branches:
            y = nnx.relu(branch.first_norm(branch.first(x.reshape(-1, *x.shape[2:]))))
            height, width, dim = y.shape[1:]
            y = branch.second(y.reshape(batch, frames, height * width, dim))
            total += nnx.relu(branch.second_norm(y)).reshape(batch, frames, height, width, dim)
        return nnx.relu(self.last_norm(self.last(total)))


class GRU(nnx.Module):
    """A gated recurrent unit with PyTorch's arithmetic: two biases; gates in the order reset, update, new."""

    def __init__(self, dim: int, *, rngs: nnx.Rngs):
        self.input, self.hidden = (nnx.Linear(dim, 3 * dim, rngs=rngs) for _ in range(2))

    def __call__(self, x: Array, reverse: bool = False) -> Array:
        """`[B, T, D]` -> same; `reverse` begins at the end."""

        def step(h: Array, gates: Array) -> tuple[Array, Array]:
            own = jnp.split(self.hidden(h), 3, axis=-1)
            given = jnp.split(gates, 3, axis=-1)
            reset, update = (nnx.sigmoid(a + b) for a, b in zip(given[:2], own[:2], strict=True))
            new = jnp.tanh(given[2] + reset * own[2])
            h = (1 - update) * new + update * h
            return h, h

        start = jnp.zeros((x.shape[0], x.shape[2]), x.dtype)
        _, found = jax.lax.scan(step, start, self.input(x).swapaxes(0, 1), reverse=reverse)
        return found.swapaxes(0, 1)


class LightASD(nnx.Module):
    """The whole network, fp32."""

    def __init__(self, *, rngs: nnx.Rngs):
        dims = (1, *WIDTHS[:-1])
        self.audio_blocks = nnx.List(
            [AudioBlock(dim, width, rngs=rngs) for dim, width in zip(dims, WIDTHS, strict=True)]
        )
        self.visual_blocks = nnx.List(
            [
                VisualBlock(dim, width, 2 if i == 0 else 1, rngs=rngs)
                for i, (dim, width) in enumerate(zip(dims, WIDTHS, strict=True))
            ]
        )
        self.forwards, self.backwards = (GRU(WIDTHS[-1], rngs=rngs) for _ in range(2))
        self.classes = nnx.Linear(WIDTHS[-1], 2, rngs=rngs)

    def audio(self, vectors: Array) -> Array:
        """MFCC `[B, 4 T, 13]` -> `[B, T, 128]`."""
        x = vectors.astype(jnp.float32).swapaxes(1, 2)[..., None]
        for i, block in enumerate(self.audio_blocks):
            if i:
                x = nnx.max_pool(x, (1, 3), (1, 2), [(0, 0), (1, 1)])
            x = block(x)
        return x.mean(axis=1)

    def visual(self, faces: Array) -> Array:
        """Grey faces `[B, T, 112, 112]`, 0 to 255 -> `[B, T, 128]`."""
        x = ((faces.astype(jnp.float32) / 255 - PIXEL_MEAN) / PIXEL_STD)[..., None]
        for i, block in enumerate(self.visual_blocks):
            if i:
                y = nnx.max_pool(x.reshape(-1, *x.shape[2:]), (3, 3), (2, 2), [(1, 1), (1, 1)])
                x = y.reshape(*x.shape[:2], *y.shape[1:])
            x = block(x)
        return x.max(axis=(2, 3))

    def __call__(self, faces: Array, vectors: Array) -> Array:
        """Logits of (silent, speaking) in each frame: `[B, T, 112, 112]`, `[B, 4 T, 13]` -> `[B, T, 2]`."""
        x = self.audio(vectors) + self.visual(faces)
        x = jax.nn.gelu(self.forwards(x), approximate=False)
        x = jax.nn.gelu(self.backwards(x, reverse=True), approximate=False)
        return self.classes(x)


def make_light_asd(rngs: nnx.Rngs) -> LightASD:
    """The network, for `nn.functional`."""
    return LightASD(rngs=rngs)
