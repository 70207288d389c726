"""Networks compiled for a chip that is not here, and what they must move at least."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.extend.core import Jaxpr
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from keysync_jax.ahead.hlo import KINDS
from keysync_jax.ahead.program import Ahead, TooLargeError, compiled, count
from keysync_jax.backend import computing, tracing_for
from keysync_jax.bench.workloads import Workload
from keysync_jax.errors import UserError
from keysync_jax.train.flops import inner_jaxprs


def compile_ahead(workload: Workload, chips: Any) -> Ahead:
    """Compiles a workload for one chip of a topology, from shapes alone.

    Raises:
      UserError: it needs more memory than the chip has.
    """
    device = chips.devices[0]
    mesh = Mesh(np.array([device]), ("data",))
    whole = NamedSharding(mesh, PartitionSpec())

    def run(params: Any, inputs: Any) -> Any:
        with tracing_for(mesh):
            return workload.run(params, inputs)

    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), (workload.params, workload.inputs)
    )
    try:
        with computing(workload.dtype):
            program, seconds = compiled(lambda: jax.jit(run).lower(*shapes))
    except TooLargeError as error:
        raise UserError(f"{workload.name} does not fit a {device.device_kind}: {error}") from error
    return count(workload.name, workload.note, program, seconds, [device], least_bytes(workload))


def least_bytes(workload: Workload) -> dict[str, float]:
    """Bytes that must move by kind, counted from the program as it is written.

    Products and convolutions read both operands and write their result; attention reads queries, keys and
    values and writes its result, its scores are never stored; a norm reads its input once and writes it once.
    What works element by element goes with its neighbours and is not counted.
    """
    found = dict.fromkeys(KINDS, 0.0)
    size = 2 if workload.dtype == "bf16" else 4
    traced = jax.make_jaxpr(workload.run)(workload.params, workload.inputs).jaxpr
    for kind, elements in _elements(traced, 1, frozenset(), _Scores()):
        found[kind] += size * elements
    return found


@dataclass
class _Scores:
    """Elements of the scores of the attention that is being walked through; 0 between two."""

    size: int = 0


def _elements(
    jaxpr: Jaxpr, trips: int, outside: frozenset[str], scores: _Scores
) -> Iterator[tuple[str, int]]:
    """Elements moved by each equation; `outside` has the scopes around the function."""
    for eqn in jaxpr.eqns:
        primitive, scopes = eqn.primitive.name, outside | set(str(eqn.source_info.name_stack).split("/"))
        sizes = [math.prod(x.aval.shape) for x in (*eqn.invars, *eqn.outvars) if hasattr(x.aval, "shape")]
        if primitive == "conv_general_dilated":
            yield "convolutions", trips * sum(sizes)
        elif primitive == "dot_general":
            yield _product(sizes, "attention" in scopes, scores, trips)
        elif primitive == "scan" and "attention" in scopes:
            # Blocks of the queries in turn: in come queries, keys and values, out comes the result.
            yield "attention", trips * sum(sizes)
        elif primitive == "reduce_sum" and "norm" in scopes:
            # Mean and variance: two sums, together one reading and one writing.
            yield "norms", trips * sizes[0]
        else:
            length = trips * eqn.params.get("length", 1) if primitive == "scan" else trips
            for inner in inner_jaxprs(eqn):
                yield from _elements(inner, length, scopes, scores)


def _product(sizes: list[int], in_attention: bool, scores: _Scores, trips: int) -> tuple[str, int]:
    if not in_attention:
        return "products", trips * sum(sizes)
    if scores.size == 0:
        left, right, scores.size = sizes
        return "attention", trips * (left + right)
    moved = sum(sizes) - scores.size
    scores.size = 0
    return "attention", trips * moved
