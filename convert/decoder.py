"""The decoder that a stage's checkpoint carries beside the stage, compared with the VAE's.

The release decodes every frame with the interpolation stage's own (`sample_interpolation` in its pipelines)
and takes the VAE's file for encoding alone. Nothing says that the two are the same numbers.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from keysync_jax.config import VAEConfig
from keysync_jax.convert.containers import Tensors
from keysync_jax.convert.vae import ENGINE_PREFIX, engine_decoder_table
from keysync_jax.typing import Array

log = logging.getLogger(__name__)

Choice = Literal["stage", "vae"]
"""Whose decoder a model takes: the interpolation stage's own, where it has one, or the VAE's."""

Weights = Mapping[str, np.ndarray]
"""Path -> array."""


@dataclass(frozen=True)
class Difference:
    """Between a stage's own decoder and the VAE's.

    Attributes:
      largest: absolute difference of two weights.
      where: path of the tensor that has it.
      rounded: the dtype, where the VAE's are the stage's rounded to it; empty otherwise.
    """

    largest: float
    where: str
    rounded: str

    @property
    def equal(self) -> bool:
        return self.largest == 0

    def __str__(self) -> str:
        if self.equal:
            return "equal to the VAE's"
        by = f"up to {self.largest:.1e}, in {self.where}"
        return (
            f"the VAE's before rounding to {self.rounded} ({by})"
            if self.rounded
            else f"other than the VAE's ({by})"
        )


@dataclass(frozen=True)
class Chosen:
    """The decoder that a model takes.

    Attributes:
      weights: what replaces the VAE's; empty where the VAE's stays.
      said: which it is, and how the stages' own compare; empty where no stage has one.
    """

    weights: Weights
    said: str


def choose(
    config: VAEConfig, vae: Weights, keyframe: Tensors, interpolation: Tensors, choice: Choice = "stage"
) -> Chosen:
    """Compares the stages' own decoders with the VAE's, and takes one; a warning says where they differ.

    Args:
      vae: path -> array of the whole VAE.
      keyframe, interpolation: the stages' checkpoints.

    Raises:
      UserError: a stage has a decoder of other sizes than the VAE's, or a part of one.
    """
    own = {"keyframe": own_decoder(config, vae, keyframe)}
    own["interpolation"] = own_decoder(config, vae, interpolation)
    found = {kind: difference(weights, vae) for kind, weights in own.items() if weights}
    compared = ", ".join(f"the {kind} stage's own is {apart}" for kind, apart in found.items())
    shown = found.get("interpolation")
    taken = own["interpolation"] if shown is not None and not shown.equal and choice == "stage" else {}
    which = "the interpolation stage's, as in the release" if taken else "the VAE's"
    if shown is not None and not shown.equal and not shown.rounded:
        log.warning(
            "the decoder in the interpolation stage's checkpoint is %s; the model takes %s", shown, which
        )
    return Chosen(taken, f"{which}; {compared}" if found else "")


def own_decoder(config: VAEConfig, vae: Weights, stage: Tensors) -> Weights:
    """The decoder in a stage's checkpoint, under the VAE's paths (`decoder.*`); empty where it has none.

    Args:
      vae: path -> array of the whole VAE; only shapes are looked at.

    Raises:
      UserError: it has one of other sizes than the VAE's, or a part of one.
    """
    if not any(key.startswith(f"{ENGINE_PREFIX}decoder.") for key in stage):
        return {}
    wanted = {path: x.shape for path, x in vae.items() if path.startswith("decoder.")}
    return engine_decoder_table(config, wanted).to_jax(stage, wanted, str(stage.path))


def difference(own: Weights, vae: Weights) -> Difference:
    """Compares a stage's own decoder with the VAE's, both under the VAE's paths."""
    apart = {path: _largest(x, vae[path]) for path, x in own.items()}
    # A NaN is further away than any number.
    where = max(apart, key=lambda path: (np.isnan(apart[path]), apart[path]))
    dtypes = {vae[path].dtype for path in own}
    narrow = len(dtypes) == 1 and all(x.dtype.itemsize > vae[path].dtype.itemsize for path, x in own.items())
    rounded = narrow and all(np.array_equal(x.astype(vae[path].dtype), vae[path]) for path, x in own.items())
    return Difference(apart[where], where, str(dtypes.pop()) if rounded else "")


def _largest(a: Array, b: Array) -> float:
    return float(np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)).max())
