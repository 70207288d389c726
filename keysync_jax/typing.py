"""Axis legend and array aliases.

Axes, always in this order, channels last:

| axis | meaning |
|---|---|
| B | clips or windows in a batch |
| T | video frames, 25 per second |
| H, W | rows and columns, pixels or latent cells |
| C | channels |
| N | tokens (pixels of a latent map, or audio vectors at 50 Hz) |
| D | width of a token |

Ranges: *pixels* float in [-1, 1] inside the networks, uint8 RGB in [0, 255] inside `media`;
*latents* scaled (times `VAEConfig.scale_factor`) unless a name ends in `_raw`; masks 1 = generate.
"""

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = Any
"""A `jax.Array` or a `numpy.ndarray`; layers without jax use `np.ndarray` itself."""

Params: TypeAlias = Mapping[str, Any]
"""Parameters of one network: dotted path -> array (`"mid_block.resnets.0.conv1.kernel"`)."""

Frames: TypeAlias = np.ndarray
"""uint8 RGB `[T, H, W, 3]`."""

Landmarks: TypeAlias = np.ndarray
"""float32 `[T, 68, 2]`, (x, y) in pixels; NaN where a frame has no face."""
