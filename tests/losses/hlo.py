"""Parse an optimised program's text: array sizes, collectives, bodies of loops."""

import re
from typing import NamedTuple

import numpy as np

COLLECTIVES = (
    "all-gather|all-reduce|all-to-all|ragged-all-to-all|collective-permute|"
    "collective-broadcast|reduce-scatter"
)
SHAPE = re.compile(r"\b(?:pred|[a-z]+\d+\w*)\[([\d,]*)\]")
NAME = r"%?([\w.\-]+)"
CALLED = re.compile(
    rf"\b(?:body|condition|calls|to_apply|true_computation|false_computation)={NAME}"
    r"|\b(?:branch_computations|called_computations)=\{([^}]*)\}"
)


class Collective(NamedTuple):
    """One collective: its kind, the sizes on its line, its groups of devices."""

    kind: str
    sizes: tuple[tuple[int, ...], ...]
    groups: tuple[tuple[int, ...], ...]
    line: str


def sizes(text: str) -> set[tuple[int, ...]]:
    """The shapes of all arrays that the text names."""
    shapes = SHAPE.findall(text)
    return {tuple(int(n) for n in dims.split(",") if n) for dims in shapes}


def collectives(text: str) -> list[Collective]:
    """Every collective; a start and a done count as one."""
    result = []
    for line in text.splitlines():
        match = re.search(rf" ({COLLECTIVES})(?:-start)?\(", line)
        if match:
            # The devices' numbers look like sizes.
            arrays = re.sub(r"\b(replica_groups|metadata|dimensions)=.*", "", line)
            result.append(
                Collective(match[1], tuple(sizes(arrays)), _groups(line), line.strip())
            )
    return result


def computations(text: str) -> dict[str, str]:
    """The text of each computation, by name."""
    header = re.compile(rf"^(?:ENTRY )?{NAME} \(.*\{{$")
    lines_of, name = {}, None
    for line in text.splitlines():
        if match := header.match(line):
            name = match[1]
            lines_of[name] = []
        if name is not None:
            lines_of[name].append(line)
    return {name: "\n".join(lines) for name, lines in lines_of.items()}


def with_called(parts: dict[str, str], name: str) -> str:
    """The text of a computation and of all computations that it calls."""
    seen, left = {}, [name]
    while left:
        name = left.pop()
        if name in seen:
            continue
        seen[name] = parts[name]
        for single, several in CALLED.findall(parts[name]):
            left += [single] if single else re.findall(NAME, several)
    return "\n".join(seen.values())


class Loop(NamedTuple):
    """A loop: its number of iterations, if known, and the text of its body."""

    trips: int | None
    body: str


def loops(text: str) -> list[Loop]:
    """Every `while` of the program."""
    parts, result = computations(text), []
    for line in text.splitlines():
        if match := re.search(rf" while\(.*\bbody={NAME}", line):
            trips = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line)
            result.append(
                Loop(int(trips[1]) if trips else None, with_called(parts, match[1]))
            )
    return result


def _groups(line: str) -> tuple[tuple[int, ...], ...]:
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}", line)
    if listed:
        inner = re.findall(r"\{([\d,]*)\}", listed[1])
        return tuple(tuple(map(int, part.split(","))) for part in inner)
    named = re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line)
    if named:
        axes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        shape = [int(n) for n in axes.values()]
        joined = [i for i, axis in enumerate(axes) if f"'{axis}'" in named[2]]
        devices = np.arange(np.prod(shape)).reshape(shape)
        devices = np.moveaxis(devices, joined, range(-len(joined), 0))
        size = np.prod([shape[i] for i in joined])
        return tuple(tuple(int(n) for n in row) for row in devices.reshape(-1, size))
    iota = re.search(
        r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line
    )
    if iota is None:
        raise ValueError(f"no groups of devices in {line!r}")
    shape, source = ([int(n) for n in iota[i].split(",")] for i in (1, 2))
    devices = np.arange(np.prod(source)).reshape(source)
    if iota[3]:
        devices = devices.transpose([int(n) for n in iota[3].split(",")])
    return tuple(tuple(int(n) for n in row) for row in devices.reshape(shape))
