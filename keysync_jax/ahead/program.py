"""Programs compiled for a machine that is not here: what they hold, compute, move and send."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax

from keysync_jax.ahead.chips import GIB, Chip, chip_of, first_line
from keysync_jax.ahead.hlo import KINDS, Cost, Program, Step
from keysync_jax.ahead.links import DCN, Played, Traffic, played
from keysync_jax.files import write_json

FORMAT = "keysync-bench-aot-1"


class TooLargeError(Exception):
    """The compiler found that a program needs more memory than the chip has; the message is its own."""


@dataclass(frozen=True)
class Ahead:
    """A program as compiled for one chip, or for each chip of a mesh.

    Attributes:
      compile_seconds: lowering and compiling.
      arguments, results, temporaries, code: bytes on a device, by the compiler's count.
      counted: operations and bytes by kind of operation, loops by their trips.
      roofline: seconds by kind, of every instruction the longer of computing and moving.
      least: bytes by kind that must move if every activation is read and written once; empty where they are
        not counted.
      copies: the steps that only move, those that move most first.
      aliased: bytes of the results that lie where arguments lay (a state that is donated).
      devices: of the mesh.
      played: the schedule in time, collectives included; None for one device.
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
    aliased: int = 0
    devices: int = 1
    played: Played | None = field(default=None)

    @property
    def held(self) -> int:
        return self.arguments + self.results - self.aliased + self.temporaries + self.code

    @property
    def fits(self) -> bool:
        return self.held <= self.chip.hbm

    @property
    def total(self) -> Cost:
        return sum(self.counted.values(), Cost())

    @property
    def traffic(self) -> Mapping[str, Traffic]:
        return {} if self.played is None else self.played.traffic

    @property
    def bounds(self) -> dict[str, float]:
        """Seconds that arithmetic, HBM, the links and the network between slices take, each alone."""
        bounds = {
            "arithmetic": self.total.flop / self.chip.peak,
            "HBM": self.total.hbm_bytes / self.chip.bandwidth,
        }
        if self.played is not None:
            bounds["links"] = sum(t.seconds for kind, t in self.traffic.items() if not kind.endswith(DCN))
        if any(kind.endswith(DCN) for kind in self.traffic):
            bounds["DCN"] = sum(t.seconds for kind, t in self.traffic.items() if kind.endswith(DCN))
        return bounds


def compiled(lower: Callable[[], Any]) -> tuple[Any, float]:
    """Lowers and compiles; the program and the seconds it took.

    Raises:
      TooLargeError: it needs more memory than the device has.
    """
    before = time.perf_counter()
    try:
        program = lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise TooLargeError(first_line(error).removeprefix("RESOURCE_EXHAUSTED: ").rstrip(".")) from error
    return program, time.perf_counter() - before


def count(
    name: str,
    note: str,
    program: Any,
    compile_seconds: float,
    devices: Sequence[Any],
    least: dict[str, float] | None = None,
) -> Ahead:
    """What a compiled program does on one of its devices.

    Args:
      program: of `compiled`.
      devices: the mesh's, in its order.
      least: as `Ahead.least`.

    Raises:
      UserError: nothing is known of the device.
    """
    chip = chip_of(devices[0].device_kind)
    memory, read = program.memory_analysis(), Program(program.as_text())
    steps = list(read.steps())
    counted, roofline = dict.fromkeys(KINDS, Cost()), dict.fromkeys(KINDS, 0.0)
    for step in steps:
        counted[step.kind] += step.cost.times(step.trips)
        roofline[step.kind] += step.trips * step.cost.seconds(chip.peak, chip.bandwidth)
    copies = [step for step in steps if step.kind == "copies"]
    return Ahead(
        name,
        note,
        devices[0].device_kind,
        chip,
        compile_seconds,
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.generated_code_size_in_bytes,
        counted,
        roofline,
        {} if least is None else least,
        sorted(copies, key=lambda step: -step.trips * step.cost.bytes),
        memory.alias_size_in_bytes,
        len(devices),
        played(read, chip, devices) if len(devices) > 1 else None,
    )


def table(found: Ahead, copies: int = 8) -> str:
    """Lines of text: by kind what is computed, moved and sent, then time, memory, the largest copies."""
    total = found.total
    where = "one" if found.devices == 1 else f"each of {found.devices}"
    lines = [
        f"{found.name}: {found.note}; for {where} {found.device}, compiled in {found.compile_seconds:.0f} s",
        f"{'':<20}{'TFLOP':>9}{'GB':>9}{'of it HBM':>11}{'least GB':>10}{'roofline ms':>13}",
    ]
    for kind in KINDS:
        lines.append(_row(kind, found.counted[kind], found.least.get(kind), found.roofline[kind]))
    least = sum(found.least.values()) if found.least else None
    lines.append(_row("all", total, least, sum(found.roofline.values())))
    lines += [*_sent(found), *_limits(found), _memory(found)]
    if copies and found.copies:
        lines.append("largest copies (MB a trip x trips, shape, from):")
    for step in found.copies[:copies]:
        shape = "x".join(map(str, step.instruction.arrays[0].dims))
        lines.append(
            f"  {step.cost.bytes / 1e6:9.1f} x {step.trips:<4d} {shape:<22} {step.instruction.opcode:<12} "
            f"{_tail(step.instruction.op_name)}"
        )
    return "\n".join(lines)


def save(path: Path, name: str, found: Sequence[Ahead]) -> None:
    """Writes what was counted as JSON.

    Raises:
      OSError: the file cannot be written.
    """
    rows = [{k: v for k, v in asdict(row).items() if k != "copies"} for row in found]
    write_json(path, {"format": FORMAT, "topology": name, "jax": jax.__version__, "rows": rows})


def _sent(found: Ahead) -> list[str]:
    """Collectives by kind."""
    if not found.traffic:
        return []
    lines = [f"{'sent by a chip':<24}{'count':>7}{'MB':>9}{'ms':>11}{'waited ms':>10}{'hidden':>13}"]
    between = [kind for kind in found.traffic if kind.endswith(DCN)]
    rows = {kind: found.traffic[kind] for kind in sorted(found.traffic, key=lambda kind: kind in between)}
    if between:
        rows["together on links"] = sum((t for kind, t in rows.items() if kind not in between), Traffic())
        rows["together on DCN"] = sum((rows[kind] for kind in between), Traffic())
    else:
        rows["together"] = sum(found.traffic.values(), Traffic())
    for kind, t in rows.items():
        lines.append(
            f"{kind:<24}{t.count:>7d}{t.bytes / 1e6:>9.4g}{1e3 * t.seconds:>11.3g}{1e3 * t.waited:>10.3g}"
            f"{t.hidden:>13.0%}"
        )
    return lines


def _limits(found: Ahead) -> list[str]:
    """What bounds the time from below, and the schedule's own."""
    bounds = found.bounds
    alone = ", ".join(f"{name} {1e3 * seconds:.3g} ms" for name, seconds in bounds.items())
    limit = f"alone: {alone}; the limit: {max(bounds, key=lambda name: bounds[name])}"
    if found.played is None:
        return [limit]
    return [
        limit,
        f"as scheduled, every instruction by the roofline: {1e3 * found.played.seconds:.3g} ms, of which "
        f"{1e3 * found.played.total.waited:.3g} ms wait for the links",
    ]


def _memory(found: Ahead) -> str:
    parts = {
        "arguments": found.arguments,
        "results": found.results - found.aliased,
        "temporaries": found.temporaries,
        "code": found.code,
    }
    listed = ", ".join(f"{size / GIB:.2f} {name}" for name, size in parts.items())
    verdict = "fits" if found.fits else "does not fit"
    hbm = found.chip.hbm / GIB
    return f"memory, GiB: {listed}; {found.held / GIB:.2f} in all, {verdict} in {hbm:.0f} GiB"


def _row(name: str, cost: Cost, least: float | None, seconds: float) -> str:
    by_hand = "-" if least is None else f"{least / 1e9:.3g}"
    return (
        f"{name:<20}{cost.flop / 1e12:>9.3g}{cost.bytes / 1e9:>9.3g}{cost.hbm_bytes / 1e9:>11.3g}"
        f"{by_hand:>10}{1e3 * seconds:>13.3g}"
    )


def _tail(name: str, parts: int = 3) -> str:
    return "/".join(name.split("/")[-parts:])
