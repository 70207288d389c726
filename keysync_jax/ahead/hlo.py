"""What a compiled program moves and computes, read from its optimised HLO text, by kind of operation.

The compiler's own total (`cost_analysis`) takes the body of a loop once and tells no kinds. Here every
scheduled instruction counts by the trips of the loops around it: its operands once and its result once, a
slice that a fusion takes of an operand as the slice, an update in place as the update. Bytes in the chip's
scratch memory (memory space 1, VMEM) are counted apart from those in HBM.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache

import numpy as np

ITEM_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "s4": 4, "u4": 4, "c64": 64, "c128": 128}

KINDS = ("attention", "convolutions", "products", "norms", "collectives", "copies", "rest")
"""In the table's order; "products" are matrix products outside of attention, "copies" move and reorder."""

_FREE = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id",
    "replica-id", "iota", "opt-barrier", "add-dependency", "copy-done", "slice-done", "dynamic-slice-done",
    "async-done", "async-update", "all-gather-done", "all-reduce-done", "collective-permute-done",
    "send-done", "recv-done",
}  # fmt: skip
_FREE_TARGETS = {"AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "Sharding"}
_COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "reduce-scatter", "collective-", "ragged-all")
_BETWEEN_SLICES = ("send", "recv")
_MOVES = {
    "copy", "copy-start", "slice-start", "transpose", "reshape", "convert", "pad", "concatenate", "slice",
    "reverse", "broadcast", "dynamic-slice", "dynamic-update-slice", "dynamic-slice-start", "bitcast",
    "tuple", "get-tuple-element", "parameter", "constant", "gather", "iota", "bitcast-convert", "custom-call",
}  # fmt: skip

_COMPUTATION = re.compile(r"^(ENTRY )?%?(\S+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?(\S+) = (.*)$")
_ARRAY = re.compile(r"(\w+)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")


@dataclass(frozen=True)
class Array:
    """One array of an instruction's result: its dimensions, bytes, and whether they are in HBM."""

    dims: tuple[int, ...]
    bytes: float
    in_hbm: bool


@dataclass
class Instruction:
    """One line of a computation."""

    name: str
    arrays: list[Array]
    opcode: str
    operands: list[str]
    attributes: str
    is_root: bool

    @property
    def op_name(self) -> str:
        """Where in the Python program it comes from: JAX's name stack and primitive."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found.group(1) if found else ""

    def called(self, attribute: str) -> str | None:
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
        return found.group(1) if found else None


@dataclass
class Computation:
    """Instructions by name, in order."""

    instructions: dict[str, Instruction] = field(default_factory=dict)

    @property
    def root(self) -> Instruction:
        return next(i for i in self.instructions.values() if i.is_root)

    def users(self, name: str) -> list[Instruction]:
        """What uses an instruction, seen through bitcasts."""
        found: list[Instruction] = []
        for user in self.instructions.values():
            if name in user.operands:
                found += self.users(user.name) or [user] if user.opcode == "bitcast" else [user]
        return found


@dataclass(frozen=True)
class Cost:
    """Of a program or a part: operations of products and convolutions, bytes in all and in HBM."""

    flop: float = 0.0
    bytes: float = 0.0
    hbm_bytes: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flop + other.flop, self.bytes + other.bytes, self.hbm_bytes + other.hbm_bytes)

    def times(self, n: float) -> "Cost":
        return Cost(n * self.flop, n * self.bytes, n * self.hbm_bytes)

    def seconds(self, peak: float, bandwidth: float) -> float:
        """By the roofline: the longer of computing and moving."""
        return max(self.flop / peak, self.hbm_bytes / bandwidth)


@dataclass(frozen=True)
class Step:
    """One scheduled instruction with the trips of the loops around it; `cost` is of one trip."""

    instruction: Instruction
    kind: str
    trips: int
    cost: Cost


class Program:
    """A compiled program's optimised HLO.

    Args:
      text: `compiled.as_text()`.
    """

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        inside: Computation | None = None
        for line in _whole_lines(text):
            if inside is None:
                if (head := _COMPUTATION.match(line)) and not line.startswith("HloModule"):
                    inside = self.computations.setdefault(head.group(2), Computation())
                    self.entry = head.group(2) if head.group(1) else self.entry
            elif line == "}":
                inside = None
            elif found := _INSTRUCTION.match(line):
                instruction = _instruction(found.group(1), found.group(2), "ROOT " in line[:8])
                inside.instructions[instruction.name] = instruction

    def steps(self, computation: str | None = None, trips: int = 1) -> Iterator[Step]:
        """Every scheduled instruction that does something, loops walked into."""
        inside = self.computations[computation or self.entry]
        for instruction in inside.instructions.values():
            if called := self.called_by(instruction):
                for to in called:
                    yield from self.steps(to, trips * self.trips(instruction))
            elif (step := self.step(inside, instruction, trips)) is not None:
                yield step

    def step(self, inside: Computation, instruction: Instruction, trips: int = 1) -> Step | None:
        """What one scheduled instruction does; None where it does nothing."""
        if _is_free(instruction):
            return None
        inner = self._inner(inside, instruction)
        kind = _kind(instruction, [i for _, i in inner])
        return Step(instruction, kind, trips, self._cost(inside, instruction, inner))

    def called_by(self, instruction: Instruction) -> list[str]:
        """Computations whose instructions are scheduled ones too: a loop's body, what is called, branches."""
        if instruction.opcode == "while":
            body = instruction.called("body")
            assert body is not None
            return [body]
        if instruction.opcode == "conditional":
            return self._branches(instruction)
        to = self._target(instruction) if instruction.opcode in ("call", "async-start") else None
        return [] if to is None else [to]

    def trips(self, instruction: Instruction) -> int:
        """How often what an instruction calls is run.

        Raises:
          ValueError: as `trips_of`.
        """
        condition = instruction.called("condition") if instruction.opcode == "while" else None
        return 1 if condition is None else self.trips_of(instruction, condition)

    def collectives(
        self, inside: Computation, instruction: Instruction
    ) -> list[tuple[Computation, Instruction]]:
        """Collectives that an instruction is, or takes part in, and the computations in which they stand."""
        if instruction.opcode == "async-start" and (to := self._target(instruction)):
            computation = self.computations[to]
            inner = [(computation, i) for i in computation.instructions.values()]
        else:
            inner = self._inner(inside, instruction)
        return [(c, i) for c, i in inner if collective_of(i.opcode) is not None]

    def begun_by(self, inside: Computation, instruction: Instruction) -> str | None:
        """The instruction that began what this one goes on with or ends; None where it does neither."""
        begun = None
        while instruction.opcode.endswith(("-done", "-update")):
            begun = instruction = inside.instructions[instruction.operands[0]]
        return begun.name if begun is not None and self.collectives(inside, begun) else None

    def by_kind(self) -> dict[str, Cost]:
        """Totals, every loop by its trips."""
        total = dict.fromkeys(KINDS, Cost())
        for step in self.steps():
            total[step.kind] += step.cost.times(step.trips)
        return total

    def trips_of(self, loop: Instruction, condition: str) -> int:
        """How often a loop's body runs: what the compiler says, or the constant its counter is compared with.

        Raises:
          ValueError: neither is there.
        """
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if known:
            return int(known.group(1))
        constants = {
            int(found.group(1))
            for name in self._with_called(condition)
            for i in self.computations[name].instructions.values()
            if i.opcode == "constant" and (found := re.match(r"constant\((\d+)\)", i.attributes))
        }
        if len(constants) != 1:
            raise ValueError(f"trips of the loop {loop.name} are not known")
        return constants.pop()

    def _target(self, instruction: Instruction) -> str | None:
        return instruction.called("to_apply") or instruction.called("calls")

    def _branches(self, instruction: Instruction) -> list[str]:
        found = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
        listed = _NAME.findall(found.group(1)) if found else []
        pair = (instruction.called("true_computation"), instruction.called("false_computation"))
        return listed or [branch for branch in pair if branch]

    def _with_called(self, computation: str) -> Iterator[str]:
        """A computation and those that its fusions and calls run."""
        yield computation
        for instruction in self.computations[computation].instructions.values():
            if instruction.opcode in ("fusion", "call") and (inner := self._target(instruction)):
                yield from self._with_called(inner)

    def _inner(self, inside: Computation, instruction: Instruction) -> list[tuple[Computation, Instruction]]:
        """What an instruction does, and where: itself, or everything in the fusion."""
        target = self._target(instruction) if instruction.opcode == "fusion" else None
        if target is None:
            return [(inside, instruction)]
        fused = [self.computations[name] for name in self._with_called(target)]
        return [(computation, i) for computation in fused for i in computation.instructions.values()]

    def _cost(
        self, inside: Computation, instruction: Instruction, inner: list[tuple[Computation, Instruction]]
    ) -> Cost:
        moved = [*self._read(inside, instruction), *self._written(inside, instruction)]
        flop = sum(_flop(c, i) for c, i in inner if i.opcode in ("convolution", "dot"))
        if instruction.opcode == "custom-call":
            flop += _kernel_flop(inside, instruction)
        return Cost(flop, sum(b for b, _ in moved), sum(b for b, in_hbm in moved if in_hbm))

    def _read(self, inside: Computation, instruction: Instruction) -> Iterator[tuple[float, bool]]:
        """Bytes of each operand that the instruction reads, and whether they are in HBM."""
        target = self._target(instruction) if instruction.opcode == "fusion" else None
        passed = self._passed_on(inside, instruction)[0]
        for number, name in enumerate(instruction.operands):
            if number in passed:
                continue
            for array in inside.instructions[name].arrays if name in inside.instructions else []:
                read = array.bytes
                if target is not None:
                    read = self._read_in_fusion(target, number, array)
                elif instruction.opcode in ("dynamic-slice", "slice", "gather", "slice-start"):
                    read = min(read, sum(a.bytes for a in instruction.arrays)) if number == 0 else read
                elif instruction.opcode == "dynamic-update-slice" and number == 0:
                    read = 0.0
                yield read, array.in_hbm

    def _read_in_fusion(self, target: str, number: int, array: Array) -> float:
        """Bytes of an operand that a fusion reads: its slices where it only takes slices of it."""
        computation = self.computations[target]
        parameter = next(
            (i for i in computation.instructions.values() if i.opcode == "parameter"
             and i.attributes.startswith(f"parameter({number})")), None
        )  # fmt: skip
        read = 0.0
        for user in computation.users(parameter.name) if parameter else []:
            inner = self._target(user) if user.opcode == "fusion" else None
            if inner is not None:
                read += sum(
                    self._read_in_fusion(inner, at, array)
                    for at, operand in enumerate(user.operands)
                    if parameter is not None and operand == parameter.name
                )
            elif user.opcode in ("dynamic-slice", "slice", "gather"):
                read += sum(a.bytes for a in user.arrays)
            elif user.opcode == "dynamic-update-slice" and self._updates(computation, user, parameter):
                continue
            else:
                return array.bytes
        return min(read, array.bytes)

    def _updates(self, computation: Computation, update: Instruction, parameter: Instruction | None) -> bool:
        """Whether an update writes into this parameter, in place."""
        name = update.operands[0]
        while computation.instructions[name].opcode == "bitcast":
            name = computation.instructions[name].operands[0]
        return parameter is not None and name == parameter.name

    def _passed_on(self, inside: Computation, instruction: Instruction) -> tuple[set[int], set[int]]:
        """Operands and results of a fusion that a collective under way only takes along."""
        if instruction.opcode != "fusion" or not self.collectives(inside, instruction):
            return set(), set()
        operands, results = _passed_on(instruction)
        inner = self.computations[instruction.called("calls") or ""]
        if any("AsyncCollectiveStart" in i.attributes for i in inner.instructions.values()):
            return set(), results  # What is sent is read once.
        only_sent = {
            int(re.findall(r"\d+", i.attributes)[0])
            for i in inner.instructions.values()
            if i.opcode == "parameter" and all(collective_of(user.opcode) for user in inner.users(i.name))
        }
        return operands | only_sent, results

    def _written(self, inside: Computation, instruction: Instruction) -> Iterator[tuple[float, bool]]:
        """Bytes of the result, and whether they are in HBM."""
        update: float | None = None
        if instruction.opcode == "dynamic-update-slice":
            update = 0.0  # The update is read already; that much is written.
        target = self._target(instruction) if instruction.opcode == "fusion" else None
        if target is not None and (root := self.computations[target].root).opcode == "dynamic-update-slice":
            part = self.computations[target].instructions[root.operands[1]]
            update = sum(a.bytes for a in part.arrays)
        if instruction.opcode in ("copy-start", "slice-start", "dynamic-slice-start"):
            # (destination, source, semaphore); of a slice ((sources), destination, semaphore).
            arrays = [a for a in instruction.arrays if a.dims]
            moved = arrays[0] if instruction.opcode == "copy-start" else arrays[-1]
            yield moved.bytes, moved.in_hbm
            return
        passed = self._passed_on(inside, instruction)[1]
        if instruction.opcode in ("collective-permute-start", "all-gather-start"):
            passed = {0}  # (source, destination, ...)
        for number, array in enumerate(instruction.arrays):
            if number not in passed:
                yield (array.bytes if update is None else min(update, array.bytes)), array.in_hbm


def _whole_lines(text: str) -> Iterator[str]:
    """Lines, those put together again that a kernel's metadata breaks."""
    whole = ""
    for line in text.splitlines():
        begins = line[:1] in ("", "%") or line == "}" or bool(_INSTRUCTION.match(line)) or line[:5] == "ENTRY"
        if begins and whole:
            yield whole
            whole = ""
        whole += line
    yield whole


def _instruction(name: str, rest: str, is_root: bool) -> Instruction:
    """`TYPE opcode(operands), attributes`; `attributes` holds everything from the opcode on."""
    end = _end_of_type(rest)
    attributes = rest[end:].strip()
    opcode, _, inside = attributes.partition("(")
    depth, stop = 1, len(inside)
    for at, letter in enumerate(inside):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            stop = at
            break
    return Instruction(name, _arrays(rest[:end]), opcode, _NAME.findall(inside[:stop]), attributes, is_root)


def _end_of_type(text: str) -> int:
    if not text.startswith("("):
        return text.index(" ")
    depth = 0
    for at, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return at + 1
    raise ValueError(f"no HLO type begins {text[:60]!r}")


def _arrays(text: str) -> list[Array]:
    found = []
    for kind, dims, layout in _ARRAY.findall(text):
        sizes = tuple(int(d.lstrip("<=")) for d in dims.split(",") if d)
        bits = ITEM_BITS.get(kind) or int(re.sub(r"\D.*", "", kind.lstrip("sufc")) or 8)
        found.append(Array(sizes, math.prod(sizes) * bits / 8, "S(" not in layout))
    return found


def collective_of(opcode: str) -> str | None:
    """Kind of collective that an operation is, or begins; None for one that ends it, and for all others."""
    if not opcode.startswith(_COLLECTIVES) or opcode.endswith("-done"):
        return None
    return opcode.removesuffix("-start")


@dataclass(frozen=True)
class Transfer:
    """What slices of TPUs exchange over the data centre's network.

    Attributes:
      name: the same in the `send` and the `recv` that are its ends on a chip.
      kind: of collective.
      slices: of a group.
    """

    name: str
    kind: str
    slices: int


def transfer_of(instruction: Instruction) -> Transfer | None:
    """The exchange between slices that a `send` or a `recv` belongs to; None for everything else."""
    if instruction.opcode not in _BETWEEN_SLICES:
        return None
    name = re.search(r'rendezvous="(([a-z-]+)[^"]*)"', instruction.attributes)
    if name is None or "megascale" not in instruction.attributes:
        return None
    # "{1,2}x{0:3}": slices 1 and 2, chips 0 to 3 of each. A permutation lists pairs of chips instead.
    group = re.search(r'megascale_target="\{([\d,:]+)\}x', instruction.attributes)
    return Transfer(name.group(1), name.group(2), 2 if group is None else _numbers(group.group(1)))


def _numbers(listed: str) -> int:
    """How many numbers `1,2,5:7` lists."""
    ends = [[int(n) for n in part.split(":")] for part in listed.split(",")]
    return sum(end[-1] - end[0] + 1 for end in ends)


def _passed_on(instruction: Instruction) -> tuple[set[int], set[int]]:
    """Numbers of the operands and of the results of a fusion that are the same memory."""
    found = re.search(r"output_to_operand_aliasing=\{(.*?\)\})", instruction.attributes)
    pairs = re.findall(r"\{(\d*)\}: \((\d+), ", found.group(1)) if found else []
    return {int(o) for _, o in pairs}, {int(r or 0) for r, _ in pairs}


def _is_free(instruction: Instruction) -> bool:
    if instruction.opcode == "custom-call":
        found = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
        return found is not None and found.group(1) in _FREE_TARGETS
    return instruction.opcode in _FREE


def _kind(instruction: Instruction, inner: list[Instruction]) -> str:
    if instruction.opcode.startswith(_COLLECTIVES) or instruction.opcode in _BETWEEN_SLICES:
        return "collectives"
    if any(i.opcode == "custom-call" and "AsyncCollective" in i.attributes for i in inner):
        return "collectives"
    names = [i.op_name for i in inner if i.op_name] + [instruction.op_name]
    products = [i.op_name for i in inner if i.opcode in ("convolution", "dot")]
    if _has_scope([instruction.op_name, *products], "attention"):
        return "attention"
    if products:
        is_convolution = any("conv_general_dilated" in name for name in products)
        return "convolutions" if is_convolution else "products"
    if _has_scope(names, "attention"):
        return "attention"
    if all(i.opcode in _MOVES or i.opcode == "fusion" for i in inner):
        return "copies"
    return "norms" if _has_scope(names, "norm") else "rest"


def _flop(computation: Computation, instruction: Instruction) -> float:
    """2 a multiply-add; places of a window that lie in padding or between dilated cells do not count."""
    left, right = (computation.instructions[o].arrays[0].dims for o in instruction.operands[:2])
    result = instruction.arrays[0].dims
    if instruction.opcode == "dot":
        found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
        contracted = [int(d) for d in found.group(1).split(",") if d] if found else []
        return 2.0 * math.prod(result) * math.prod(left[d] for d in contracted)
    return _convolution_flop(instruction.attributes, left, right, result)


def _has_scope(names: list[str], scope: str) -> bool:
    """Whether one comes from a function or scope of this name (`nn` gives attention and norms one)."""
    return any(re.search(rf"(^|[/(]){scope}[/)]", name) for name in names)


def _kernel_flop(inside: Computation, kernel: Instruction) -> float:
    """Of an attention, which does not say: two products of queries with keys forward, five backward."""
    arrays = [a for o in kernel.operands if o in inside.instructions for a in inside.instructions[o].arrays]
    if "frame_attention" in kernel.op_name:
        _, frames, *_ = arrays[0].dims
        return 2.0 * 2 * math.prod(arrays[0].dims) * frames
    if "splash" not in kernel.op_name:
        return 0.0
    (*batch, queries, width), (*_, keys, _) = [a.dims for a in arrays if len(a.dims) == 4][:2]
    products = 5 if "dkv" in kernel.op_name else 2
    return 2.0 * products * math.prod(batch) * queries * keys * width


def _convolution_flop(
    attributes: str, left: tuple[int, ...], right: tuple[int, ...], result: tuple[int, ...]
) -> float:
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
    assert labels
    image, kernel, out = labels.groups()
    window = _window(attributes)
    positions = 1
    for axis in sorted(d for d in kernel if d.isdigit()):
        sizes = (left[image.index(axis)], right[kernel.index(axis)], result[out.index(axis)])
        positions *= _valid_positions(*sizes, window, int(axis))
    batch, features = result[out.index("b")], result[out.index("f")]
    groups = re.search(r"batch_group_count=(\d+)", attributes)
    shared = int(groups.group(1)) if groups else 1
    return 2.0 * batch * features * right[kernel.index("i")] * positions / shared


def _window(attributes: str) -> Mapping[str, list[str]]:
    found = re.search(r"window=\{([^}]*)\}", attributes)
    entries = found.group(1).split() if found else []
    return {key: values.split("x") for key, values in (entry.split("=") for entry in entries)}


def _valid_positions(image: int, kernel: int, result: int, window: Mapping[str, list[str]], axis: int) -> int:
    def value(key: str) -> int:
        return int(window[key][axis]) if key in window else 1

    low = int(window["pad"][axis].split("_")[0]) if "pad" in window else 0
    return _meeting(image, kernel, result, value("stride"), value("rhs_dilate"), value("lhs_dilate"), low)


@cache
def _meeting(image: int, kernel: int, result: int, stride: int, dilation: int, spread: int, low: int) -> int:
    """Pairs of a place of the result and one of the kernel that meet a cell of the image."""
    places = stride * np.arange(result)[:, None] + dilation * np.arange(kernel) - low
    return int(((places >= 0) & (places % spread == 0) & (places // spread < image)).sum())
