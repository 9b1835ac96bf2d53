"""A lower bound of a compiled program's time on a machine, from the program's text.

  floor = max(FLOPs / FLOP/s, bytes / memory bandwidth, bytes sent / link bandwidth)

of each device at full speed. A loop's body counts once a trip. The compiler knows most
trip counts; where data decide, the caller states them. Of two branches the one that
moves more bytes counts. Of a switch between more than two each counts its share: they
stand for widths that rows grow through.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from mgsr_jax.planning import hlo_costs, hlo_links
from mgsr_jax.planning.hlo import Computation, Instruction, Module, parse_module
from mgsr_jax.planning.hlo_costs import InMemory
from mgsr_jax.planning.hlo_trips import trip_count
from mgsr_jax.planning.speeds import Speed

Trips = Mapping[str, int]
"""Name of a loop -> its trips, where data decide them. A loop's name is the scope
(`jax.named_scope`) right around it, with outer scopes before it where these matter:
`decode`, `rewrite/decode`. The name with the most scopes counts."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """Work of one device.

    Attributes:
      flops: FLOPs of matrix products, by the dtype of their operands.
      read, written: bytes of main memory.
      within, across: bytes sent within the slice or host, and to others.
    """

    flops: Mapping[str, float] = dataclasses.field(default_factory=dict)
    read: float = 0.0
    written: float = 0.0
    within: float = 0.0
    across: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        flops = collections.Counter(self.flops)
        flops.update(other.flops)
        return Cost(
            flops,
            self.read + other.read,
            self.written + other.written,
            self.within + other.within,
            self.across + other.across,
        )

    def times(self, number: float) -> "Cost":
        """The cost of `number` executions."""
        return Cost(
            {dtype: number * count for dtype, count in self.flops.items()},
            number * self.read,
            number * self.written,
            number * self.within,
            number * self.across,
        )

    @property
    def total_flops(self) -> float:
        """FLOPs of all matrix products."""
        return math.fsum(self.flops.values())

    def seconds(self, speed: Speed) -> dict[str, float]:
        """The time of each part at full speed: compute, memory, links."""
        fastest = max(speed.flops.values())
        compute = (n / speed.flops.get(d, fastest) for d, n in self.flops.items())
        links = self.within / speed.within, self.across / speed.across
        return {
            "compute": math.fsum(compute),
            "memory": (self.read + self.written) / speed.memory,
            "links": max(links),
        }

    def floor(self, speed: Speed) -> float:
        """The time in seconds that no schedule of this work is below."""
        return max(self.seconds(speed).values())


class Loop(NamedTuple):
    """A loop of a program.

    Attributes:
      instruction: its name in the program.
      name: the scopes around it.
      trips: trips per execution; None if nobody knows them, and one counts.
      stated: whether the caller states them, not the compiler.
    """

    instruction: str
    name: str
    trips: int | None
    stated: bool


class Work(NamedTuple):
    """One operation, over all its executions.

    Attributes:
      name: the operation with the scopes around it, and the compiler's kind of it.
      loops: the loops around it, from the outermost.
      cost: of all its executions.
    """

    name: str
    loops: tuple[Loop, ...]
    cost: Cost


@dataclasses.dataclass(frozen=True)
class Roofline:
    """The work of a program, on each device."""

    works: tuple[Work, ...]

    @property
    def cost(self) -> Cost:
        """The cost of the whole program."""
        return sum((work.cost for work in self.works), Cost())

    @property
    def loops(self) -> tuple[Loop, ...]:
        """The program's loops, once each."""
        return tuple(dict.fromkeys(loop for work in self.works for loop in work.loops))

    def in_loops(self, name: str) -> Cost:
        """The cost of what is in loops of this name; see `Trips`."""
        inside = (w for w in self.works if any(_is(name, x.name) for x in w.loops))
        return sum((work.cost for work in inside), Cost())

    def largest(self, speed: Speed, number: int = 3) -> list[tuple[str, float]]:
        """The operations with the largest floors, and these in seconds."""
        parts: dict[str, Cost] = collections.defaultdict(Cost)
        for work in self.works:
            parts[work.name] += work.cost
        floors = [(name, cost.floor(speed)) for name, cost in parts.items()]
        return sorted(floors, key=lambda pair: -pair[1])[:number]


def read_roofline(
    text: str,
    *,
    trips: Trips | None = None,
    domains: Sequence[int] = (0,),
    in_memory: InMemory = lambda _: True,
) -> Roofline:
    """The work of a compiled program.

    Args:
      text: `compiled.as_text()`.
      trips: of the loops whose trips data decide.
      domains: the slice or host of each device, in the order of the mesh.
      in_memory: whether an array is in the device's main memory.

    Raises:
      ValueError: the text is not a program's.
    """
    module = parse_module(text)
    reader = _Reader(module, trips or {}, tuple(domains), in_memory)
    return Roofline(tuple(reader.works(module.entry)))


@dataclasses.dataclass(frozen=True)
class _Reader:
    """A program and what is known about it; the arguments of `read_roofline`."""

    module: Module
    trips: Trips
    domains: tuple[int, ...]
    in_memory: InMemory

    def works(self, computation: Computation) -> Iterator[Work]:
        """The work of one execution of a computation."""
        for instruction in computation.instructions.values():
            if instruction.opcode == "while":
                yield from self._loop(computation, instruction)
            elif instruction.opcode == "conditional":
                yield from self._branches(instruction)
            elif instruction.opcode in ("call", "async-start"):
                for called in self._called(instruction, "to_apply", "calls"):
                    yield from self.works(called)
            else:
                cost = self._cost(computation, instruction)
                if cost != Cost():
                    yield Work(operation_name(computation, instruction), (), cost)

    def _called(self, instruction: Instruction, *roles: str) -> list[Computation]:
        return [self.module.computations[name] for name in instruction.called(*roles)]

    def _cost(self, computation: Computation, instruction: Instruction) -> Cost:
        arguments = computation, instruction, self.module
        flops = hlo_costs.flops(*arguments)
        moved = hlo_costs.traffic(*arguments, self.in_memory)
        sent = hlo_links.sent(*arguments, self.domains)
        counts = {dtype: float(number) for dtype, number in flops.items()}
        return Cost(counts, *map(float, (*moved, *sent)))

    def _loop(
        self, computation: Computation, instruction: Instruction
    ) -> Iterator[Work]:
        name = scopes(instruction.op_name)
        trips, stated = trip_count(computation, instruction, self.module), False
        if trips is None:
            trips = _stated_trips(self.trips, name)
            stated = trips is not None
        loop = Loop(instruction.name, name, trips, stated)
        for called in self._called(instruction, "body", "condition"):
            for work in self.works(called):
                cost = work.cost.times(1.0 if trips is None else float(trips))
                yield Work(work.name, (loop, *work.loops), cost)

    def _branches(self, instruction: Instruction) -> Iterator[Work]:
        roles = "branch_computations", "true_computation", "false_computation"
        branches = [list(self.works(c)) for c in self._called(instruction, *roles)]
        if len(branches) > 2:
            for work in (work for branch in branches for work in branch):
                yield work._replace(cost=work.cost.times(1 / len(branches)))
            return
        yield from max(branches, key=_bytes_moved)


def _bytes_moved(works: list[Work]) -> float:
    costs = [work.cost for work in works]
    return sum(c.read + c.written + c.within + c.across for c in costs)


_READERS = 4
"""Operations in a row of which the last one may give the first its name."""

_LOOP_PARTS = ("while", "body", "cond")
_UNSCOPED = re.compile(
    r"jit\([^()]*\)|\b(?:closed_call|checkpoint|rematted_computation|shard_map)\b"
    r"|branch_\d+_fun|\b(?:jvp|vmap|transpose)\(\)"
)


def scopes(op_name: str) -> str:
    """The scopes and the operation in one of JAX's names.

    Of an instruction that does the work of several, the first has to do.

    >>> scopes("jit(f)/decode/while/body/closed_call/transpose(jvp(dot_general))")
    'decode/while/body/transpose(jvp(dot_general))'
    """
    name = re.sub(r"^\(([^:]*):.*", r"\1", op_name)
    while (shorter := _UNSCOPED.sub("", name)) != name:
        name = shorter
    return "/".join(part for part in name.split("/") if part)


def without_loops(name: str) -> str:
    """Scopes without the loops among them.

    >>> without_loops("decode/while/body/dot_general")
    'decode/dot_general'
    """
    return "/".join(part for part in name.split("/") if part not in _LOOP_PARTS)


def operation_name(computation: Computation, instruction: Instruction) -> str:
    """The scopes and the operation of an instruction, and the compiler's kind of it.

    One that the compiler added has the scopes of what reads its result.
    """
    kind = re.sub(r"(\.clone|[\d.])+$", "", instruction.name)
    readers = [instruction]
    for _ in range(_READERS):
        for reader in readers:
            if named := without_loops(scopes(reader.op_name)):
                return f"{named} ({kind})"
        readers = [user for r in readers for user in computation.users[r.name]]
    return kind


def _is(pattern: str, name: str) -> bool:
    """Whether a loop's scopes have this name; see `Trips`."""
    *outer, last = pattern.split("/")
    words = re.findall(r"[\w.\-]+", name)
    if words[-1:] == ["while"]:
        words.pop()
    if words[-1:] != [last]:
        return False
    remaining = iter(words[:-1])
    return all(word in remaining for word in outer)


def _stated_trips(trips: Trips, name: str) -> int | None:
    matching = [pattern for pattern in trips if _is(pattern, name)]
    return trips[max(matching, key=lambda p: p.count("/"))] if matching else None
