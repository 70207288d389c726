"""Collectives of a compiled program: what a chip sends, in what time, and how much of it the rest hides.

The schedule is played by the roofline: every instruction takes the longer of computing and moving, a
collective what its bytes take over the links of its group, or over the data centre's network (DCN) where a
group's chips are in several slices. One that is started early runs beside what comes until its end is asked
for; only what is missing then is waited for. Links and network are one resource, used by one at a time.
"""

import re
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from keysync_jax.ahead.chips import Chip
from keysync_jax.ahead.hlo import Computation, Instruction, Program, collective_of, transfer_of

DCN = " (DCN)"
"""Ends the kind of a collective among chips of several slices."""

SENT = {
    "all-gather": lambda n: n - 1,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: float(n > 1),
    "collective-broadcast": lambda n: float(n > 1),
}
"""Kind of collective -> bytes that a chip of a group of n sends at least, as a multiple of its operands'."""


@dataclass(frozen=True)
class Traffic:
    """All collectives of one kind.

    Attributes:
      count: how many a run of the program has, loops by their trips.
      bytes: that a chip sends for them.
      seconds: what that takes over the links.
      waited: of it, what nothing else runs beside.
    """

    count: int = 0
    bytes: float = 0.0
    seconds: float = 0.0
    waited: float = 0.0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(
            self.count + other.count,
            self.bytes + other.bytes,
            self.seconds + other.seconds,
            self.waited + other.waited,
        )

    def times(self, n: int) -> "Traffic":
        return Traffic(n * self.count, n * self.bytes, n * self.seconds, n * self.waited)

    @property
    def hidden(self) -> float:
        """Share of the time that something else runs beside; 1 where there is nothing to hide."""
        return max(0.0, 1 - self.waited / self.seconds) if self.seconds else 1.0


@dataclass(frozen=True)
class Played:
    """A program's schedule in time.

    Attributes:
      seconds: of one run, waiting for collectives included.
      traffic: by kind of collective; those between slices apart, see `DCN`.
    """

    seconds: float
    traffic: Mapping[str, Traffic]

    @property
    def total(self) -> Traffic:
        return sum(self.traffic.values(), Traffic())


def played(program: Program, chip: Chip, devices: Sequence[Any]) -> Played:
    """Plays the schedule of a program that is compiled for a mesh.

    Args:
      devices: the mesh's, in its order; they have `coords`, and of several slices a `slice_index`.
    """
    return _Player(program, chip, _links_of(chip, devices)).run(program.entry)


@dataclass
class _Now:
    """Where in time a computation is.

    Attributes:
      left: of each collective the instructions that are still to come.
      ends: collective -> when it is done.
      queue: what the links are at and will be: (kind, begin, end).
    """

    left: Counter[str]
    seconds: float = 0.0
    ends: dict[str, float] = field(default_factory=dict)
    queue: deque[tuple[str, float, float]] = field(default_factory=deque)
    traffic: dict[str, Traffic] = field(default_factory=dict)

    def note(self, kind: str, more: Traffic) -> None:
        self.traffic[kind] = self.traffic.get(kind, Traffic()) + more

    def send(self, key: str, kind: str, size: float, seconds: float) -> None:
        """Begins a collective as soon as the links are free."""
        begin = max(self.seconds, self.queue[-1][2] if self.queue else 0.0)
        self.ends[key] = begin + seconds
        self.queue.append((kind, begin, begin + seconds))
        self.note(kind, Traffic(1, size, seconds))

    def wait(self, until: float) -> None:
        """Nothing is done before then; what the links are at meanwhile is to blame."""
        while self.queue and self.queue[0][1] < until:
            kind, begin, end = self.queue[0]
            missing = min(end, until) - max(begin, self.seconds)
            self.note(kind, Traffic(waited=max(0.0, missing)))
            if end > until:
                break
            self.queue.popleft()
        self.seconds = max(self.seconds, until)


class _Player:
    def __init__(self, program: Program, chip: Chip, links: "_Links"):
        self._program, self._chip, self._links = program, chip, links

    def run(self, name: str) -> Played:
        inside = self._program.computations[name]
        parts = {i.name: self._parts(inside, i) for i in inside.instructions.values()}
        now = _Now(Counter(key for found in parts.values() for key, _ in found))
        for instruction in inside.instructions.values():
            if self._program.called_by(instruction) and not parts[instruction.name]:
                self._call(now, instruction)
            else:
                self._step(now, inside, instruction, parts[instruction.name])
        return Played(now.seconds, now.traffic)

    def _call(self, now: _Now, instruction: Instruction) -> None:
        """Another computation, so many times; of a conditional's branches the longest."""
        trips = self._program.trips(instruction)
        inner = max(map(self.run, self._program.called_by(instruction)), key=lambda played: played.seconds)
        now.seconds += trips * inner.seconds
        for kind, traffic in inner.traffic.items():
            now.note(kind, traffic.times(trips))

    def _step(
        self, now: _Now, inside: Computation, instruction: Instruction, parts: list[tuple[str, Any]]
    ) -> None:
        for key, sent in parts:
            if sent is not None and key not in now.ends:
                now.send(key, *sent)
        if not parts or instruction.opcode == "fusion":
            now.seconds += self._computing(inside, instruction)
        now.left.subtract(key for key, _ in parts)
        for key, _ in parts:
            if now.left[key] == 0:
                now.wait(now.ends.get(key, 0.0))

    def _computing(self, inside: Computation, instruction: Instruction) -> float:
        step = self._program.step(inside, instruction)
        if step is None or step.kind == "collectives":
            return 0.0
        return step.cost.seconds(self._chip.peak, self._chip.bandwidth)

    def _parts(
        self, inside: Computation, instruction: Instruction
    ) -> list[tuple[str, tuple[str, float, float] | None]]:
        """Collectives that an instruction takes part in, by name; kind, bytes and seconds of those it has."""
        if (begun := self._program.begun_by(inside, instruction)) is not None:
            return [(begun, None)]
        received = inside.instructions[instruction.operands[0]] if instruction.opcode == "recv-done" else None
        if (transfer := transfer_of(received or instruction)) is not None:
            if instruction.opcode == "recv":
                return []
            sent = None if received else self._over_dcn(inside, instruction, transfer.kind, transfer.slices)
            return [(transfer.name, sent)]
        alone = instruction.opcode != "fusion"
        return [
            (instruction.name if alone else _channel(i), self._sent(where, i))
            for where, i in self._program.collectives(inside, instruction)
        ]

    def _sent(self, inside: Computation, collective: Instruction) -> tuple[str, float, float]:
        kind = collective_of(collective.opcode)
        assert kind is not None
        size, links = self._links.group(collective, kind)
        if links == 0:
            return self._over_dcn(inside, collective, kind, size)
        sent = SENT[kind](size) * _operands(inside, collective)
        return kind, sent, sent / (links * self._chip.link) if self._chip.link else 0.0

    def _over_dcn(
        self, inside: Computation, collective: Instruction, kind: str, size: int
    ) -> tuple[str, float, float]:
        """The same among `size` chips or slices that the network joins; one chip of each slice sends."""
        sent = SENT[kind](size) * _operands(inside, collective)
        return kind + DCN, sent, sent / self._chip.dcn if self._chip.dcn else 0.0


def _operands(inside: Computation, instruction: Instruction) -> float:
    """Bytes of an instruction's operands."""
    operands = [inside.instructions[name] for name in instruction.operands]
    return sum(a.bytes for operand in operands if operand.opcode != "after-all" for a in operand.arrays)


def _channel(collective: Instruction) -> str:
    """Name of a collective that several fusions take part in."""
    found = re.search(r"channel_id=(\d+)", collective.attributes)
    return f"channel {found.group(1)}" if found else collective.name


class _Links:
    """Which chips are neighbours, and which are in one slice.

    Args:
      neighbours: bool `[N, N]`, over devices in the mesh's order.
      slices: the number of each one's slice, `[N]`.
    """

    def __init__(self, neighbours: np.ndarray, slices: np.ndarray):
        self._neighbours, self._slices = neighbours, slices

    def group(self, collective: Instruction, kind: str) -> tuple[int, int]:
        """Chips of a group of a collective, and over how many links at once each of them can send.

        The fewest of any chip; one where a group's chips are no neighbours, or one chip sends to one; none
        where a group has chips of several slices.
        """
        if kind == "collective-permute":
            listed = re.search(r"source_target_pairs=\{(.*?)\}\}", collective.attributes)
            found = re.findall(r"\{(\d+),(\d+)", listed.group(0)) if listed else []
            pairs = np.array([(int(a), int(b)) for a, b in found if a != b], int).reshape(-1, 2)
            return (2 if len(pairs) else 1), int(self._in_one_slice(pairs))
        groups = groups_of(collective.attributes, len(self._neighbours))
        if not self._in_one_slice(groups):
            return groups.shape[1], 0
        within = [self._neighbours[np.ix_(g, g)].sum(1).min() for g in groups]
        return groups.shape[1], max(1, int(min(within)))

    def _in_one_slice(self, groups: np.ndarray) -> bool:
        slices = self._slices[groups]
        return bool((slices == slices[:, :1]).all())


def _links_of(chip: Chip, devices: Sequence[Any]) -> _Links:
    places = np.array([device.coords for device in devices])
    slices = np.array([getattr(device, "slice_index", None) or 0 for device in devices])
    shape = places.max(0) - places.min(0) + 1
    sides = shape[shape > 1]
    if len(sides) == 3:
        rings = np.full(len(shape), chip.ring > 0 and not (sides % max(chip.ring, 1)).any())
    else:
        rings = shape == chip.ring
    apart = np.abs(places[:, None] - places[None])
    apart = np.where(rings & (apart == shape - 1), 1, apart)
    return _Links((apart.sum(-1) == 1) & (slices[:, None] == slices), slices)


def groups_of(attributes: str, devices: int) -> np.ndarray:
    """Groups of devices that a collective is among: `[groups, size]`, numbers in the mesh's order.

    Raises:
      ValueError: they are written in a way that is not known here.
    """
    found = re.search(r"replica_groups=(\{\{.*?\}\}|\{\}|\[[^ ]*|mesh\[.*?\].*?\{.*?\})", attributes)
    text = found.group(1) if found else "{}"
    if text == "{}":
        return np.arange(devices)[None]
    if text.startswith("{{"):
        return np.array([[int(n) for n in g.split(",")] for g in re.findall(r"\{([\d,]+)\}", text)])
    if text.startswith("["):
        shape = [int(n) for n in text[1 : text.index("]")].split(",")]
        return _iota(text.partition("<=")[2]).reshape(shape)
    sizes = [int(n) for n in re.findall(r"'=(\d+)", text)]
    names = re.findall(r"'(\w+)'=", text)
    order = re.search(r"device_ids=\((.*?)\) ", text)
    ids = (_iota(order.group(1)) if order else np.arange(int(np.prod(sizes)))).reshape(sizes)
    chosen = re.findall(r"'(\w+)'", text[text.rindex("{") :])
    if not chosen or any(name not in names for name in chosen):
        raise ValueError(f"replica groups that are not known: {text}")
    axes = [names.index(name) for name in chosen]
    moved = np.moveaxis(ids, axes, range(-len(axes), 0))
    return moved.reshape(-1, int(np.prod([sizes[axis] for axis in axes])))


def _iota(text: str) -> np.ndarray:
    """`[2,4]T(1,0)`: the numbers from 0 in this shape, its axes exchanged; flat."""
    found = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if found is None:
        raise ValueError(f"replica groups that are not known: {text}")
    shape = [int(n) for n in found.group(1).split(",")]
    numbers = np.arange(int(np.prod(shape))).reshape(shape)
    axes = found.group(2)
    return (numbers if axes is None else numbers.transpose([int(n) for n in axes.split(",")])).reshape(-1)
