"""Muon (Jordan et al., 2024): the momentum of every kernel, orthogonalised.

What is kept of a kernel lies under the kernel's own path and has its shape, so the rules of the mesh hold for
it. The orthogonalisation alone sees stacks: a network has some hundreds of kernels of some dozen sizes, which
compile several times faster a stack at a time, and are large operations for a GPU instead of many small ones.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from keysync_jax.backend import axis_size
from keysync_jax.typing import Array, Params

BETA = 0.95
"""Decay of the momentum."""

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the iteration x <- a x + b (x x^T) x + c (x x^T)^2 x."""

ITERATIONS = 5

RMS = 0.2
"""Root mean square of an update over the learning rate: about AdamW's (Liu et al., 2025), whose rate fits."""


class Momentum(NamedTuple):
    """Updates so far, int32 `[]`, and the decayed mean of the gradients, path -> array like the parameter."""

    count: Array
    mean: dict[str, Array]


def scale_by_muon(eps: float) -> optax.GradientTransformation:
    """Nesterov's momentum of kernels, path -> `[..., inputs, outputs]`, orthogonalised as matrices.

    A kernel is the matrix of all that comes in (places and channels) by what goes out.

    Args:
      eps: is added to a matrix's norm before it is divided by it.
    """

    def init(params: Params) -> Momentum:
        return Momentum(jnp.zeros((), jnp.int32), {path: jnp.zeros_like(x) for path, x in params.items()})

    def update(
        updates: Params, state: Momentum, params: Params | None = None
    ) -> tuple[dict[str, Array], Momentum]:
        count = state.count + 1
        mean = {path: BETA * state.mean[path] + (1 - BETA) * x for path, x in updates.items()}
        ahead = {
            path: BETA * mean[path] / (1 - BETA ** (count + 1)) + (1 - BETA) * x / (1 - BETA**count)
            for path, x in updates.items()
        }
        return orthogonalised(ahead, eps), Momentum(count, mean)

    return optax.GradientTransformation(init, update)


def orthogonalised(kernels: Params, eps: float) -> dict[str, Array]:
    """Each kernel as a nearly orthogonal matrix of root mean square `RMS`; those of one size together."""
    sizes: dict[tuple[int, int], list[str]] = {}
    for path, x in kernels.items():
        sizes.setdefault((x.size // x.shape[-1], x.shape[-1]), []).append(path)
    done: dict[str, Array] = {}
    for size, paths in sizes.items():
        stack = jnp.stack([kernels[path].reshape(size) for path in paths])
        moved = RMS * max(size) ** 0.5 * _each_whole(stack, eps)
        done |= {path: moved[n].reshape(kernels[path].shape) for n, path in enumerate(paths)}
    return {path: done[path] for path in kernels}


def _each_whole(stack: Array, eps: float) -> Array:
    """`newton_schulz` of a stack whose matrices' columns may be split over `fsdp`.

    For the iteration every device of that axis gets whole matrices, as many as the others: columns are
    exchanged for matrices once, and back. Left to itself, the partitioner gathers the whole stack in every
    iteration.
    """
    devices = axis_size("fsdp")
    if devices == 1:
        return newton_schulz(stack, eps)
    filled = jnp.pad(stack, ((0, -len(stack) % devices), (0, 0), (0, 0)))
    apart = PartitionSpec("fsdp")
    whole = jax.lax.with_sharding_constraint(filled, apart)
    return jax.lax.with_sharding_constraint(newton_schulz(whole, eps), apart)[: len(stack)]


def newton_schulz(x: Array, eps: float) -> Array:
    """Matrices `[n, rows, columns]` with their singular values brought to between 0.7 and 1.2."""
    tall = x.shape[1] > x.shape[2]
    x = x.swapaxes(1, 2) if tall else x
    x = x / (jnp.linalg.norm(x, axis=(1, 2), keepdims=True) + eps)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.swapaxes(1, 2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.swapaxes(1, 2) if tall else x
