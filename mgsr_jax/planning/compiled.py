"""What a compiler says of one program: its memory on a device, and what it sends."""

import collections
import dataclasses
import math
import re
import time
from typing import Any

import jax
from jax.sharding import NamedSharding


@dataclasses.dataclass(frozen=True)
class Program:
    """What the compiler says of one program, in bytes of one device.

    Attributes:
      name: what it is.
      seconds: that compiling took here.
      peak: the most that is alive at once, with what waits beside it.
      arguments: of the peak, what goes in.
      aliased: what goes out in the memory of what went in.
      collectives: kind -> (number, bytes); the body of a loop counts once.
      text: the optimised program.
    """

    name: str
    seconds: float
    peak: int
    arguments: int
    aliased: int
    collectives: dict[str, tuple[int, int]]
    text: str = dataclasses.field(repr=False)


def compile_program(
    name: str,
    jitted: Any,
    arguments: tuple[Any, ...],
    *,
    options: dict[str, Any],
    waiting: int = 0,
) -> tuple[Program, Any]:
    """The program, and its outputs as shapes with their places.

    Arguments that it does not use are in memory all the same, as is what is `waiting`.
    """
    began = time.monotonic()
    lowered = jitted.lower(*arguments)
    compiled = lowered.compile(compiler_options=options)
    seconds = time.monotonic() - began
    memory, text = compiled.memory_analysis(), compiled.as_text()
    peak = memory.peak_memory_in_bytes
    if _platform(arguments) == "gpu":  # there temporaries are one piece of memory
        entire = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
        peak = max(peak, entire + outputs)
    unused = device_bytes(arguments) - memory.argument_size_in_bytes
    program = Program(
        name,
        seconds,
        peak=peak + max(0, unused) + waiting,
        arguments=memory.argument_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        collectives=collectives(text),
        text=text,
    )
    return program, with_places(lowered.out_info, compiled.output_shardings)


def _platform(shapes: Any) -> str:
    places = (x.sharding for x in jax.tree.leaves(shapes) if x.sharding is not None)
    return next(iter(next(places).device_set)).platform


_COLLECTIVE = re.compile(
    r"= (\(?[^=]*?) (all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all"
    r"|collective-broadcast|collective-permute|send|recv)(-start)?\("
)
_SHAPE = re.compile(r"(pred|[a-z]+\d+)\w*\[([\d,]*)\]")


def collectives(text: str) -> dict[str, tuple[int, int]]:
    """Kind -> (number, bytes that come out) of the collectives in a program's text.

    >>> collectives("%x = bf16[8,4]{1,0} all-gather(%y), dimensions={0}")
    {'all-gather': (1, 64)}
    """
    found: dict[str, tuple[int, int]] = collections.defaultdict(lambda: (0, 0))
    for line in text.splitlines():
        match = _COLLECTIVE.search(line)
        if match is None:
            continue
        results, kind, started = match.groups()
        sizes = [_bytes_of(*shape) for shape in _SHAPE.findall(results)]
        # What was started carries its operand along.
        size = max(sizes, default=0) if started else sum(sizes)
        count, total = found[kind]
        found[kind] = count + 1, total + size
    return dict(sorted(found.items()))


def _bytes_of(dtype: str, dimensions: str) -> int:
    bits = 8 if dtype == "pred" else int(re.sub(r"\D", "", dtype) or 0)
    return math.prod(map(int, filter(None, dimensions.split(",")))) * bits // 8


def in_short(message: str) -> str:
    """The line of XLA's report that has the numbers."""
    lines = message.removeprefix("RESOURCE_EXHAUSTED: ").splitlines()
    said = [line for line in lines if re.search(r"\d[GM]\b.*hbm", line, re.I)]
    return (said or lines)[0].strip().rstrip(".")


def device_bytes(tree: Any) -> int:
    """Bytes of one device's shards."""

    def of_leaf(x: Any) -> int:
        shape = x.shape
        if isinstance(x.sharding, NamedSharding):
            shape = x.sharding.shard_shape(x.shape)
        return math.prod(shape) * x.dtype.itemsize

    return sum(map(of_leaf, jax.tree.leaves(tree)))


def with_places(shapes: Any, places: Any) -> Any:
    """Shapes that know where they lie."""
    return jax.tree.map(lambda x, place: x.update(sharding=place), shapes, places)
