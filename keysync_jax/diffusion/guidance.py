"""Guidance: several branches of conditions in one network call, and how their outputs combine.

A branch says which conditions it keeps. The branches of a batch are stacked along its batch axis,
so one call of the network serves them all. A guidance may differ from step to step (`Stretches`): in an
interval of noise levels alone it costs less, and does no worse (Kynkaanniemi et al. 2024).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
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

    @property
    def branches(self) -> tuple[Branch, ...]: ...

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


@partial(jax.tree_util.register_dataclass, data_fields=["weights"], meta_fields=["branches"])
@dataclass(frozen=True)
class Weighted:
    """Some branches of a guidance, those whose weight is not 0."""

    branches: tuple[Branch, ...]
    weights: tuple[float, ...]


@partial(jax.tree_util.register_dataclass, data_fields=["parts"], meta_fields=["counts"])
@dataclass(frozen=True)
class Stretches:
    """A guidance that changes along the table of noise levels.

    Attributes:
      parts: guidances in the order of the steps.
      counts: steps of each.
    """

    parts: tuple[Guidance, ...]
    counts: tuple[int, ...]

    @property
    def branches(self) -> tuple[Branch, ...]:
        """Those of the part that has the most."""
        return max((part.branches for part in self.parts), key=len)


AnyGuidance = Guidance | Stretches


def stretches(guidance: AnyGuidance, steps: int) -> Iterator[tuple[Guidance, slice]]:
    """The parts of a guidance, and the steps of a table of so many that each is for."""
    if not isinstance(guidance, Stretches):
        yield guidance, slice(0, steps)
        return
    assert sum(guidance.counts) == steps, "the guidance is for another table of noise levels"
    first = 0
    for part, count in zip(guidance.parts, guidance.counts, strict=True):
        yield part, slice(first, first + count)
        first += count


def joined(each: Sequence[Guidance]) -> AnyGuidance:
    """One guidance of those of each step; neighbours that are equal are one part."""
    runs = [(part, len(list(run))) for part, run in groupby(each)]
    if len(runs) == 1:
        return runs[0][0]
    return Stretches(*map(tuple, zip(*runs, strict=True)))


def without_zeros(guidance: Guidance) -> Guidance:
    """The same sum without branches of weight 0, which need not be computed.

    With an identity scale of 1 the branch without conditions goes, with equal scales that of the identity
    alone, with both at 1 all but the last.

    Args:
      guidance: its scales are numbers. The last branch, which has all conditions, stays.
    """
    last, weighted = guidance.branches[-1], zip(guidance.branches, guidance.weights, strict=True)
    kept = [(branch, float(w)) for branch, w in weighted if float(w) != 0 or branch == last]
    if len(kept) == len(guidance.branches):
        return guidance
    if kept == [(Branch(True, True), 1.0)]:
        return Unguided()
    return Weighted(*map(tuple, zip(*kept, strict=True)))


def calls(guidance: AnyGuidance, steps: int) -> int:
    """Branches that the network computes for a window, over all steps."""
    return sum(len(part.branches) * (where.stop - where.start) for part, where in stretches(guidance, steps))


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
