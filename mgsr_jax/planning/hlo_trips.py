"""The number of trips of a loop of a compiled program.

The compilers for CPU and GPU write it down where they know it. A TPU's compiler does
not, so a counted loop is recognised: a carried counter that the body increases by a
constant, compared with a constant or with a carried value that the body leaves alone.
"""

import math
import re
from typing import NamedTuple

from mgsr_jax.planning.hlo import Computation, Instruction, Module

_COPIES = ("copy", "bitcast", "copy-done", "copy-start")


class _Carried(NamedTuple):
    """An element of the values that a loop carries, plus a constant."""

    element: int
    plus: int = 0


_Value = int | _Carried | None
"""A constant, a carried value, or anything else."""


def trip_count(
    computation: Computation, loop: Instruction, module: Module
) -> int | None:
    """Trips of a `while` of a computation; None where data decide them."""
    attributes = loop.attributes.replace(" ", "")
    known = re.search(r'"?known_trip_count"?:\{"?n"?:"?(\d+)', attributes)
    if known:
        return int(known.group(1))
    (condition,), (body,) = (
        [module.computations[name] for name in loop.called(role)]
        for role in ("condition", "body")
    )
    comparison = _comparison(condition, module)
    if comparison is None:
        return None
    counter, limit, direction = comparison
    carried = computation.instructions[loop.operands[0]]
    if not isinstance(counter, _Carried):
        return None
    if carried.opcode != "tuple" or body.root.opcode != "tuple":
        return None
    initial = [_value(computation, name, module) for name in carried.operands]
    after = _value(body, body.root.operands[counter.element], module)
    if isinstance(limit, _Carried):
        unchanged = _value(body, body.root.operands[limit.element], module)
        limit = initial[limit.element] if unchanged == limit else None
    start = initial[counter.element]
    if not isinstance(limit, int) or not isinstance(start, int):
        return None
    if not isinstance(after, _Carried) or after.element != counter.element:
        return None
    distance = limit - start - counter.plus + (direction == "LE")
    return max(0, math.ceil(distance / after.plus)) if after.plus > 0 else None


def _comparison(
    condition: Computation, module: Module
) -> tuple[_Value, _Value, str] | None:
    """The two sides of a loop's condition, and LT or LE."""
    computation, root = condition, condition.root
    arguments: dict[str, _Value] = {}
    if root.opcode == "fusion":
        computation = module.computations[root.called("calls")[0]]
        arguments = _arguments(condition, root, computation, module)
        root = computation.root
    direction = re.search(r"direction=(LT|LE)", root.attributes)
    if root.opcode != "compare" or direction is None:
        return None
    left, right = (
        _value(computation, name, module, arguments) for name in root.operands
    )
    return left, right, direction.group(1)


def _arguments(
    outer: Computation, fusion: Instruction, fused: Computation, module: Module
) -> dict[str, _Value]:
    values = [_value(outer, name, module) for name in fusion.operands]
    names = (parameter.name for parameter in fused.parameters)
    return dict(zip(names, values, strict=True))


def _value(
    computation: Computation,
    name: str,
    module: Module,
    arguments: dict[str, _Value] | None = None,
) -> _Value:
    """An instruction's result as a sum of constants and one carried value."""
    instruction = computation.instructions[name]
    opcode, operands = instruction.opcode, instruction.operands
    if opcode == "parameter":
        return (arguments or {}).get(name)
    if opcode == "constant":
        text = instruction.inside
        return int(text) if re.fullmatch(r"-?\d+", text) else None
    if opcode == "get-tuple-element":
        index = re.search(r"index=(\d+)", instruction.attributes)
        source = computation.instructions[operands[0]]
        if index is None or source.opcode != "parameter":
            return None
        return _Carried(int(index.group(1)))
    if opcode == "fusion":
        fused = module.computations[instruction.called("calls")[0]]
        inner = _arguments(computation, instruction, fused, module)
        return _value(fused, fused.root.name, module, inner)
    values = [_value(computation, operand, module, arguments) for operand in operands]
    if opcode in _COPIES:
        return values[0]
    return _sum(values) if opcode == "add" else None


def _sum(values: list[_Value]) -> _Value:
    carried = [value for value in values if isinstance(value, _Carried)]
    constants = [value for value in values if isinstance(value, int)]
    if len(carried) + len(constants) < len(values) or len(carried) > 1:
        return None
    total = sum(constants)
    return _Carried(carried[0].element, carried[0].plus + total) if carried else total
