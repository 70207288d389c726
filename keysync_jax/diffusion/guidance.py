"""Guidance: several branches of conditions in one network call, and how their outputs combine.

A branch says which conditions it keeps. The branches of a batch are stacked along its batch axis,
so one call of the network serves them all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Protocol

import jax
import jax.numpy as jnp

from keysync_jax.typing import Array


@dataclass(frozen=True)
class Branch:
    """Which conditions a branch keeps; the others are zero.

    Zero audio is a zero *projected* vector, so it leaves the time embedding too.
    """

    audio: bool
    reference: bool


class Guidance(Protocol):
    """Branches and their weights: the guided output is the weighted sum of the branches'.

    Branches without audio come first, so that what depends on the audio is computed for the others alone.
    A guidance is a pytree: its branches are compiled in, its scales are arguments.
    """

    branches: ClassVar[tuple[Branch, ...]]

    @property
    def weights(self) -> Sequence[Array]: ...


@partial(jax.tree_util.register_dataclass, data_fields=["audio", "identity"], meta_fields=[])
@dataclass(frozen=True)
class Separated:
    """Eq. 9: z0 + w_id (z_id - z0) + w_aud (z_id&aud - z_id)."""

    audio: float = 5.0
    identity: float = 2.0
    branches: ClassVar[tuple[Branch, ...]] = (Branch(False, False), Branch(False, True), Branch(True, True))

    @property
    def weights(self) -> Sequence[Array]:
        return 1 - self.identity, self.identity - self.audio, self.audio


@partial(jax.tree_util.register_dataclass, data_fields=["scale"], meta_fields=[])
@dataclass(frozen=True)
class ClassifierFree:
    """Plain classifier-free guidance, the paper's baseline: z0 + w (z - z0)."""

    scale: float = 2.0
    branches: ClassVar[tuple[Branch, ...]] = (Branch(False, False), Branch(True, True))

    @property
    def weights(self) -> Sequence[Array]:
        return 1 - self.scale, self.scale


@partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=[])
@dataclass(frozen=True)
class Unguided:
    """The conditions as they are, one branch."""

    branches: ClassVar[tuple[Branch, ...]] = (Branch(True, True),)
    weights: ClassVar[Sequence[Array]] = (1.0,)


def keep(guidance: Guidance, condition: str, x: Array) -> Array:
    """A condition for every branch.

    Args:
      condition: "audio" or "reference".
      x: `[B, ...]`.

    Returns:
      `[branches * B, ...]`, zeros in the branches that drop it.
    """
    kept = [getattr(branch, condition) for branch in guidance.branches]
    return jnp.concatenate([x if k else jnp.zeros_like(x) for k in kept])


def repeat(guidance: Guidance, x: Array) -> Array:
    """`[B, ...]` -> `[branches * B, ...]`: the same in every branch."""
    return jnp.concatenate([x] * len(guidance.branches))


def heard(guidance: Guidance, x: Array) -> Array:
    """`[B, ...]` -> `[n * B, ...]`: the same in each of the n branches that keep the audio, the last ones."""
    kept = [branch.audio for branch in guidance.branches]
    assert kept == sorted(kept)
    return jnp.concatenate([x] * sum(kept))


def combine(guidance: Guidance, x: Array) -> Array:
    """`[branches * B, ...]` -> `[B, ...]`: the guided output."""
    parts = jnp.split(x, len(guidance.branches))
    return sum(w * part for w, part in zip(guidance.weights, parts, strict=True))
