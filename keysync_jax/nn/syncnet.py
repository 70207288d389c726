"""SyncNet: lips and voice as points that are near each other where they belong together.

Chung and Zisserman, "Out of time: automated lip sync in the wild" (2016), in the form of
`joonson/syncnet_python`, whose weights every published LSE-C and LSE-D is made with. Everything has one size;
its output is not normalised.
"""

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx

from keysync_jax.nn.layers import BatchNorm
from keysync_jax.typing import Array

FRAMES = 5
"""Video frames that a lip feature sees."""

VECTORS = 20
"""MFCC vectors that a voice feature hears."""

WIDTH = 1024


class ConvSize(NamedTuple):
    """A convolution with its normalisation and ReLU, and the max-pooling after it.

    Attributes:
      width: channels.
      size, stride, padding: of the convolution over rows and columns.
      pool: window and stride of the pooling, and its padding; None without one.
    """

    width: int
    size: tuple[int, int]
    stride: int = 1
    padding: int = 1
    pool: tuple[tuple[int, int], tuple[int, int], int] | None = None


LIPS = (
    ConvSize(96, (7, 7), 2, 0, ((3, 3), (2, 2), 0)),  # over five frames as well
    ConvSize(256, (5, 5), 2, 1, ((3, 3), (2, 2), 1)),
    ConvSize(256, (3, 3)),
    ConvSize(256, (3, 3)),
    ConvSize(256, (3, 3), pool=((3, 3), (2, 2), 0)),
    ConvSize(512, (6, 6), padding=0),
)
VOICE = (
    ConvSize(64, (3, 3)),
    ConvSize(192, (3, 3), pool=((3, 3), (1, 2), 0)),
    ConvSize(384, (3, 3)),
    ConvSize(256, (3, 3)),
    ConvSize(256, (3, 3), pool=((3, 3), (2, 2), 0)),
    ConvSize(512, (5, 4), padding=0),
)


class ConvNorm(nnx.Module):
    """A convolution, its normalisation, ReLU and pooling; `[N, H, W, C]`, or `[N, T, H, W, C]` over time."""

    def __init__(self, dim: int, sizes: ConvSize, frames: int | None = None, *, rngs: nnx.Rngs):
        time = () if frames is None else (frames,)
        padding = [(0, 0)] * len(time) + [(sizes.padding, sizes.padding)] * 2
        strides = (*(1 for _ in time), sizes.stride, sizes.stride)
        self.conv = nnx.Conv(
            dim, sizes.width, (*time, *sizes.size), strides=strides, padding=padding, rngs=rngs
        )
        self.norm = BatchNorm(sizes.width, rngs=rngs)
        self.pool = sizes.pool

    def __call__(self, x: Array) -> Array:
        x = nnx.relu(self.norm(self.conv(x)))
        if x.ndim == 5:
            x = x.reshape(-1, *x.shape[2:])
        if self.pool is not None:
            window, strides, edge = self.pool
            x = nnx.max_pool(x, window, strides, [(edge, edge)] * 2)
        return x


class Projection(nnx.Module):
    """Linear, normalisation, ReLU, linear: `[N, 512]` -> `[N, 1024]`."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(512, 512, rngs=rngs)
        self.norm = BatchNorm(512, rngs=rngs)
        self.out = nnx.Linear(512, WIDTH, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.out(nnx.relu(self.norm(self.hidden(x))))


class SyncNet(nnx.Module):
    """Both halves of the network, fp32."""

    def __init__(self, *, rngs: nnx.Rngs):
        dims = (3, *(sizes.width for sizes in LIPS))
        self.lip_convs = nnx.List(
            [
                ConvNorm(dim, sizes, FRAMES if i == 0 else None, rngs=rngs)
                for i, (dim, sizes) in enumerate(zip(dims, LIPS, strict=False))
            ]
        )
        self.lip_out = Projection(rngs=rngs)
        dims = (1, *(sizes.width for sizes in VOICE))
        self.voice_convs = nnx.List(
            [ConvNorm(dim, sizes, rngs=rngs) for dim, sizes in zip(dims, VOICE, strict=False)]
        )
        self.voice_out = Projection(rngs=rngs)

    def lips(self, frames: Array) -> Array:
        """A feature of each window of five frames.

        Args:
          frames: `[T, 224, 224, 3]`, BGR, 0 to 255.

        Returns:
          `[T - 4, 1024]`.
        """
        x = frames.astype(jnp.float32)[None]
        for conv in self.lip_convs:
            x = conv(x)
        return self.lip_out(x[:, 0, 0])

    def voice(self, vectors: Array) -> Array:
        """A feature of each window of 20 vectors: MFCC `[N, 20, 13]` -> `[N, 1024]`."""
        x = vectors.astype(jnp.float32).swapaxes(1, 2)[..., None]
        for conv in self.voice_convs:
            x = conv(x)
        return self.voice_out(x[:, 0, 0])


def make_syncnet(rngs: nnx.Rngs) -> SyncNet:
    """The network, for `nn.functional`."""
    return SyncNet(rngs=rngs)
