"""LPIPS v0.1, the learned perceptual distance: the ablation of the pixel loss (table 12 of the paper).

Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric" (2018), section 3:
features of a frozen classifier, of unit length over their channels, compared with learned weights.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from flax import nnx

from keysync_jax.typing import Array

SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
"""ImageNet's mean and standard deviation, for images in [-1, 1]."""
EPSILON = 1e-10

TrunkKind = Literal["vgg16", "alexnet"]


class ConvSize(NamedTuple):
    """Kernel, stride, and padding on each side of a convolution that a ReLU follows."""

    size: int = 3
    stride: int = 1
    padding: int = 1


class SliceSize(NamedTuple):
    """A part of a trunk that ends in a compared feature map.

    Attributes:
      pool: window of the max-pooling, stride 2 and not padded, that comes first; 0 for none.
      convs: the convolutions, all of the slice's width.
    """

    pool: int
    convs: tuple[ConvSize, ...]


TRUNKS: dict[TrunkKind, tuple[SliceSize, ...]] = {
    "vgg16": tuple(
        SliceSize(pool, (ConvSize(),) * layers)
        for pool, layers in zip((0, 2, 2, 2, 2), (2, 2, 3, 3, 3), strict=True)
    ),
    "alexnet": (
        SliceSize(0, (ConvSize(11, stride=4, padding=2),)),
        SliceSize(3, (ConvSize(5, padding=2),)),
        SliceSize(3, (ConvSize(),)),
        SliceSize(0, (ConvSize(),)),
        SliceSize(0, (ConvSize(),)),
    ),
}
"""The slices of each trunk. VGG16's end at relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3."""


@dataclass(frozen=True)
class LPIPSConfig:
    """Sizes of the network. Defaults: VGG16 at full size; AlexNet's widths are 64, 192, 384, 256, 256.

    Attributes:
      trunk: the classifier.
      widths: channels of each slice.
    """

    trunk: TrunkKind = "vgg16"
    widths: tuple[int, ...] = (64, 128, 256, 512, 512)


class LPIPS(nnx.Module):
    """The distance of two images. The network is not trained; dropout before the heads is left out.

    Args:
      config: sizes.
      dtype: of the trunk's computation; what follows it and the parameters are fp32.
    """

    def __init__(self, config: LPIPSConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.config, self.dtype = config, dtype
        slices, dim = [], 3
        for slice_size, width in zip(TRUNKS[config.trunk], config.widths, strict=True):
            convs = []
            for size, stride, padding in slice_size.convs:
                convs.append(
                    nnx.Conv(
                        dim, width, (size, size), strides=stride, padding=padding, dtype=dtype, rngs=rngs
                    )
                )
                dim = width
            slices.append(nnx.List(convs))
        self.slices = nnx.List(slices)
        # Weights of a distance are not negative; equal ones are the distance without calibration.
        ones = nnx.initializers.ones
        self.heads = nnx.List(
            [nnx.Linear(width, 1, use_bias=False, kernel_init=ones, rngs=rngs) for width in config.widths]
        )

    def features(self, images: Array) -> list[Array]:
        """The last ReLU of each slice.

        Args:
          images: `[N, H, W, 3]` in [-1, 1].

        Returns:
          `[N, h, w, C]` in `dtype`, the finest first.

        Raises:
          ValueError: nothing is left of the images after the trunk's poolings.
        """
        x = (images.astype(jnp.float32) - jnp.array(SHIFT)) / jnp.array(SCALE)
        x, found = x.astype(self.dtype), []
        for (pool, _), convs in zip(TRUNKS[self.config.trunk], self.slices, strict=True):
            if pool:
                x = nnx.max_pool(x, (pool, pool), strides=(2, 2), padding="VALID")
            for conv in convs:
                x = nnx.relu(conv(x))
            found.append(x)
        if 0 in x.shape:
            raise ValueError(f"images of {images.shape[1:3]} pixels are too small for {self.config.trunk}")
        return found

    def __call__(self, a: Array, b: Array) -> Array:
        """The distance of each pair of images.

        Args:
          a, b: `[N, H, W, 3]` in [-1, 1]. Where one has no gradient, give it through `stop_gradient`.

        Returns:
          `[N]` fp32, 0 or more.
        """
        total = jnp.zeros(a.shape[0], jnp.float32)
        for head, x, y in zip(self.heads, self.features(a), self.features(b), strict=True):
            difference = jnp.square(unit_length(x) - unit_length(y))
            total += head(difference).mean(axis=(1, 2, 3))
        return total


def unit_length(x: Array) -> Array:
    """Features divided by their length over the channels, `[..., C]` -> same, fp32; zeros stay zeros."""
    x = x.astype(jnp.float32)
    squares = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    # The root has no gradient at 0, where every channel of a pixel is off.
    there = squares > 0
    length = jnp.where(there, jnp.sqrt(jnp.where(there, squares, 1.0)), 0.0)
    return x / (length + EPSILON)
