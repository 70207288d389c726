"""Programs compiled for a machine that is not here: what they hold, compute and move, and in what time."""

import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.extend.core import Jaxpr
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from keysync_jax.backend import computing, tracing_for
from keysync_jax.bench.hlo import KINDS, Cost, Program, Step
from keysync_jax.bench.workloads import Workload
from keysync_jax.errors import UserError
from keysync_jax.extras import require
from keysync_jax.files import write_json
from keysync_jax.train.flops import device_peak, inner_jaxprs

FORMAT = "keysync-bench-aot-1"

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One accelerator by its maker's sheet.

    Attributes:
      peak: bf16 operations a second.
      bandwidth: bytes a second of HBM.
      hbm: bytes of HBM.
    """

    peak: float
    bandwidth: float
    hbm: int


SHEETS = {
    "TPU v4": (1228e9, 32 * GIB),
    "TPU v5 lite": (819e9, 16 * GIB),
    "TPU v5e": (819e9, 16 * GIB),
    "TPU v5": (2765e9, 95 * GIB),
    "TPU v5p": (2765e9, 95 * GIB),
    "TPU v6 lite": (1638e9, 32 * GIB),
    "TPU v6e": (1638e9, 32 * GIB),
}
"""`device_kind` -> HBM's bytes a second and size, from the maker's documentation."""


_WITHOUT_A_CHIP = {
    # Outside of Google's cloud libtpu would ask its metadata server for minutes, then complain of no answer.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    # A chip belongs to one process, a compiler to as many as like.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclass(frozen=True)
class Ahead:
    """A program as compiled for one chip.

    Attributes:
      compile_seconds: lowering and compiling.
      arguments, results, temporaries, code: bytes on the device, by the compiler's count.
      counted: operations and bytes by kind of operation, loops by their trips.
      least: bytes by kind that must move if every activation is read and written once.
      copies: the steps that only move, those that move most first.
    """

    name: str
    note: str
    device: str
    chip: Chip
    compile_seconds: float
    arguments: int
    results: int
    temporaries: int
    code: int
    counted: dict[str, Cost]
    roofline: dict[str, float]
    least: dict[str, float]
    copies: list[Step]

    @property
    def held(self) -> int:
        return self.arguments + self.results + self.temporaries + self.code

    @property
    def fits(self) -> bool:
        return self.held <= self.chip.hbm

    @property
    def total(self) -> Cost:
        return sum(self.counted.values(), Cost())


def topology(name: str) -> Any:
    """The chips of a machine that is not here.

    Args:
      name: "v5e:2x2", "v6e:2x2", "v5p:2x2x1" and so on: generation, and chips along each side.

    Raises:
      ModuleNotFoundError: libtpu is not installed.
      UserError: libtpu knows no such machine, or could not be started.
    """
    require("libtpu")
    for variable, value in _WITHOUT_A_CHIP.items():
        os.environ.setdefault(variable, value)
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name)
    except (ValueError, jax.errors.JaxRuntimeError) as error:
        raise UserError(f"cannot compile for the topology {name} ({_first_line(error)})") from error


def chip_of(kind: str) -> Chip:
    """The sheet of a device kind.

    Raises:
      UserError: it is not known.
    """
    peak = device_peak(kind)
    if kind not in SHEETS or peak is None:
        raise UserError(f"nothing is known of the chip {kind}; known are {', '.join(sorted(SHEETS))}")
    bandwidth, hbm = SHEETS[kind]
    return Chip(peak, bandwidth, hbm)


def compile_ahead(workload: Workload, chips: Any) -> Ahead:
    """Compiles a workload for one chip of a topology, from shapes alone.

    Raises:
      UserError: it needs more memory than the chip has.
    """
    device = chips.devices[0]
    chip, mesh = chip_of(device.device_kind), Mesh(np.array([device]), ("data",))
    whole = NamedSharding(mesh, PartitionSpec())

    def run(params: Any, inputs: Any) -> Any:
        with tracing_for(mesh):
            return workload.run(params, inputs)

    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), (workload.params, workload.inputs)
    )
    before = time.perf_counter()
    try:
        with computing(workload.dtype):
            compiled = jax.jit(run).lower(*shapes).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            f"{workload.name} does not fit a {device.device_kind}: {_first_line(error)}"
        ) from error
    seconds = time.perf_counter() - before
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None
    assert text is not None
    steps = list(Program(text).steps())
    counted, roofline = dict.fromkeys(KINDS, Cost()), dict.fromkeys(KINDS, 0.0)
    for step in steps:
        counted[step.kind] += step.cost.times(step.trips)
        roofline[step.kind] += step.trips * step.cost.seconds(chip.peak, chip.bandwidth)
    copies = [step for step in steps if step.kind == "copies"]
    return Ahead(
        workload.name,
        workload.note,
        device.device_kind,
        chip,
        seconds,
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.generated_code_size_in_bytes,
        counted,
        roofline,
        least_bytes(workload),
        sorted(copies, key=lambda step: -step.trips * step.cost.bytes),
    )


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


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def table(found: Ahead, copies: int = 8) -> str:
    """Lines of text: by kind what is computed and moved, then memory, then the largest copies."""
    total, chip = found.total, found.chip
    lines = [
        f"{found.name}: {found.note}; for one {found.device}, compiled in {found.compile_seconds:.0f} s",
        f"{'':<14}{'TFLOP':>9}{'GB':>9}{'of it HBM':>11}{'least GB':>10}{'roofline ms':>13}",
    ]
    for kind in KINDS:
        cost = found.counted[kind]
        lines.append(_row(kind, cost, found.least[kind], found.roofline[kind]))
    lines.append(_row("all", total, sum(found.least.values()), sum(found.roofline.values())))
    verdict = "fits" if found.fits else "does not fit"
    lines += [
        f"arithmetic alone {1e3 * total.flop / chip.peak:.1f} ms, HBM alone "
        f"{1e3 * total.hbm_bytes / chip.bandwidth:.1f} ms",
        f"memory: {found.arguments / GIB:.2f} GiB arguments, {found.results / GIB:.2f} results, "
        f"{found.temporaries / GIB:.2f} temporaries, {found.code / GIB:.2f} code: "
        f"{verdict} in {chip.hbm / GIB:.0f} GiB",
    ]
    if copies and found.copies:
        lines.append("largest copies (MB a trip x trips, shape, from):")
    for step in found.copies[:copies]:
        shape = "x".join(map(str, step.instruction.arrays[0].dims))
        lines.append(
            f"  {step.cost.bytes / 1e6:9.1f} x {step.trips:<4d} {shape:<22} {step.instruction.opcode:<12} "
            f"{_tail(step.instruction.op_name)}"
        )
    return "\n".join(lines)


def save(path: Path, name: str, found: list[Ahead]) -> None:
    """Writes what was counted as JSON.

    Raises:
      OSError: the file cannot be written.
    """
    rows = [{k: v for k, v in asdict(row).items() if k != "copies"} for row in found]
    write_json(path, {"format": FORMAT, "topology": name, "jax": jax.__version__, "rows": rows})


def _row(name: str, cost: Cost, least: float, seconds: float) -> str:
    return (
        f"{name:<14}{cost.flop / 1e12:>9.3g}{cost.bytes / 1e9:>9.3g}{cost.hbm_bytes / 1e9:>11.3g}"
        f"{least / 1e9:>10.3g}{1e3 * seconds:>13.3g}"
    )


def _tail(name: str, parts: int = 3) -> str:
    return "/".join(name.split("/")[-parts:])
