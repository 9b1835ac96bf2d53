"""Bytes that a device sends to others in one instruction of a compiled program.

Devices of one domain (a TPU slice, a GPU host) have fast links; what goes from domain
to domain takes the slower network. With B bytes of the whole array, in a group of n
devices, g in each of h domains, no algorithm sends less than

  all-gather, reduce-scatter   B (g-1)/g within a domain, B (h-1)/(h g) across
  all-reduce                   twice that
  all-to-all                   B (g-1)/n within, B (h-1)/h across
"""

import collections
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mgsr_jax.planning.hlo import Computation, Instruction, Module, leaves
from mgsr_jax.planning.hlo_costs import result

_KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
    "send",
)


class Sent(NamedTuple):
    """Bytes that one device sends within its domain, and to other domains."""

    within: int = 0
    across: int = 0


def sent(
    computation: Computation,
    instruction: Instruction,
    module: Module,
    domains: Sequence[int],
) -> Sent:
    """Bytes that the busiest device sends in an instruction.

    Args:
      domains: the domain of each device, in the order of the program's partitions.
    """
    if instruction.opcode == "fusion":
        fused = module.computations[instruction.called("calls")[0]]
        inner = [sent(fused, i, module, domains) for i in fused.instructions.values()]
        return Sent(sum(s.within for s in inner), sum(s.across for s in inner))
    kind = instruction.opcode.removesuffix("-start")
    if kind not in _KINDS:
        return Sent()
    outputs = sum(array.bytes for array in leaves(result(instruction)))
    inputs = sum(
        array.bytes
        for type in computation.operand_types(instruction)
        for array in leaves(type)
    )
    if kind == "send":
        return Sent(across=inputs)
    if kind == "collective-permute":
        return _permuted(inputs, _pairs(instruction.attributes), domains)
    groups = replica_groups(instruction.attributes, len(domains))
    parts = [_in_group(kind, max(inputs, outputs), group, domains) for group in groups]
    return Sent(max(p.within for p in parts), max(p.across for p in parts))


def _in_group(
    kind: str, size: int, group: Sequence[int], domains: Sequence[int]
) -> Sent:
    counts = collections.Counter(domains[device] for device in group)
    h, g = len(counts), max(counts.values())
    if "all-to-all" in kind:
        return Sent(size * (g - 1) // len(group), size * (h - 1) // h)
    passes = 2 if kind == "all-reduce" else 1
    return Sent(passes * size * (g - 1) // g, passes * size * (h - 1) // (h * g))


def _permuted(size: int, pairs: list[tuple[int, int]], domains: Sequence[int]) -> Sent:
    moves = [(domains[a], domains[b]) for a, b in pairs if a != b]
    within = any(a == b for a, b in moves)
    return Sent(size if within else 0, size if any(a != b for a, b in moves) else 0)


def _pairs(attributes: str) -> list[tuple[int, int]]:
    match = re.search(r"source_target_pairs=\{([{},\d]*)\}", attributes)
    pairs = re.findall(r"\{(\d+),(\d+)\}", match.group(1)) if match else []
    return [(int(a), int(b)) for a, b in pairs]


_MESH = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}"
)
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=(\S*)")


def replica_groups(attributes: str, devices: int) -> list[list[int]]:
    """The groups of devices of a collective; one group of all where none is written.

    >>> replica_groups("replica_groups={{0,1},{2,3}}", 4)
    [[0, 1], [2, 3]]
    >>> replica_groups("replica_groups=[2,2]<=[2,2]T(1,0)", 4)
    [[0, 2], [1, 3]]
    >>> replica_groups("replica_groups=mesh['x'=2,'y'=2] {'x'}", 4)
    [[0, 2], [1, 3]]
    """
    if mesh := _MESH.search(attributes):
        return _groups_of_mesh(*mesh.groups())
    if iota := _IOTA.search(attributes):
        return _iota(iota.group(2)).reshape(_integers(iota.group(1))).tolist()
    listed = re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", attributes)
    groups = re.findall(r"\{([\d,]+)\}", listed.group(1)) if listed else []
    return [_integers(group) for group in groups] or [list(range(devices))]


def _groups_of_mesh(axes: str, order: str | None, grouped: str) -> list[list[int]]:
    """Groups along axes of a mesh, `'y'` or a part of one, `'y':(2)4`.

    The part has the size 4 behind a part of size 2. `order` is of the mesh's devices.
    """
    shape: list[int] = []
    chosen: list[int] = []
    parts = re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", grouped)
    for name, size in re.findall(r"'([^']*)'=(\d+)", axes):
        cuts = {1, int(size)}
        ranges = []
        for part, before, own in parts:
            if part == name:
                first = int(before or 1)
                last = first * int(own) if own else int(size)
                ranges.append((first, last))
                cuts |= {first, last}
        edges = sorted(cuts)
        for first, last in zip(edges, edges[1:], strict=False):
            if any(a <= first and last <= b for a, b in ranges):
                chosen.append(len(shape))
            shape.append(last // first)
    devices = _iota(order or f"[{math.prod(shape)}]").reshape(shape)
    kept = [axis for axis in range(len(shape)) if axis not in chosen]
    groups = devices.transpose(kept + chosen)
    return groups.reshape(-1, math.prod(shape[axis] for axis in chosen)).tolist()


def _iota(text: str) -> np.ndarray:
    """The numbers from 0 in an order such as `[2,4]T(1,0)`; flat."""
    shape, order = (
        _integers(match.group(1)) if match else None
        for match in (re.search(p, text) for p in (r"\[([\d,]*)\]", r"T\(([\d,]*)\)"))
    )
    numbers = np.arange(math.prod(shape or ())).reshape(shape or ())
    return numbers.transpose(order).reshape(-1)


def _integers(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n]
