"""Parts of a network that the backward pass computes again instead of keeping what they computed."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx


def recomputed(call: Callable[..., Any], module: nnx.Module, program: bool = True) -> Callable[..., Any]:
    """`call(module, *arrays)` as a function of the arrays that keeps only its inputs for the backward pass.

    Args:
      call: e.g. `lambda part, x: part(x)`.
      module: its parameters become arguments of the part.
      program: the part is a program of its own. Where the caller is not under jit, such parts run one after
        another, and host memory holds one part's inside. (XLA's CPU scheduler, given the whole backward
        pass as one program, computes the insides of all parts at once, which undoes the saving.) A part
        of such parts is not one itself.
    """
    graphdef, state = nnx.split(module)

    def run(state: nnx.State, *arrays: Any) -> Any:
        return call(nnx.merge(graphdef, state), *arrays)

    part = jax.jit(jax.checkpoint(run)) if program else jax.checkpoint(run)
    return lambda *arrays: part(state, *arrays)
