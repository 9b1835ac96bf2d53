"""One compiled program: its memory on a device and its collectives."""

import collections
import dataclasses
import math
import re
import time
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
from jax.sharding import NamedSharding
from jaxtyping import PyTree

Tree = TypeVar("Tree")
CompilerOptions = dict[str, str | bool]


@dataclasses.dataclass(frozen=True)
class CompiledProgram:
    """The compiler's figures of one program, in bytes per device.

    Attributes:
      name: name in tables.
      seconds: time that compiling took.
      peak: largest number of bytes in memory at once, with arrays that stay in memory
        but are no arguments of the program.
      arguments: the part of `peak` that is arguments.
      aliased: outputs that reuse the memory of arguments.
      collectives: kind -> (number, bytes); a loop's body counts once.
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
    jitted: Callable[..., object],
    arguments: tuple[PyTree, ...],
    *,
    options: CompilerOptions,
    resident: int = 0,
) -> tuple[CompiledProgram, Any]:
    """Compile a jitted function for the devices of its arguments' shardings.

    Args:
      jitted: result of `jax.jit`.
      arguments: shapes with shardings. An argument that the program does not read is in
        memory too.
      options: XLA's compiler options.
      resident: bytes of arrays that stay in memory meanwhile but are not arguments.

    Returns:
      The program, and its outputs as shapes with shardings.
    """
    began = time.monotonic()
    lowered = cast(jax.stages.Wrapped, jitted).lower(*arguments)
    compiled = lowered.compile(compiler_options=options)
    seconds = time.monotonic() - began
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and text is not None
    peak = memory.peak_memory_in_bytes
    if _platform(arguments) == "gpu":  # XLA allocates temporaries in one piece there
        inputs = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
        peak = max(peak, inputs + outputs)
    unread = device_bytes(arguments) - memory.argument_size_in_bytes
    program = CompiledProgram(
        name,
        seconds,
        peak=peak + max(0, unread) + resident,
        arguments=memory.argument_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        collectives=collectives(text),
        text=text,
    )
    return program, with_shardings(lowered.out_info, compiled.output_shardings)


def _platform(shapes: PyTree) -> str:
    shardings = (x.sharding for x in jax.tree.leaves(shapes) if x.sharding is not None)
    return next(iter(next(shardings).device_set)).platform


_COLLECTIVE = re.compile(
    r"= (\(?[^=]*?) (all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all"
    r"|collective-broadcast|collective-permute|send|recv)(-start)?\("
)
_SHAPE = re.compile(r"(pred|[a-z]+\d+)\w*\[([\d,]*)\]")


def collectives(text: str) -> dict[str, tuple[int, int]]:
    """Kind -> (number, output bytes) of the collectives in a program's text.

    >>> collectives("%x = bf16[8,4]{1,0} all-gather(%y), dimensions={0}")
    {'all-gather': (1, 64)}
    """
    totals: dict[str, tuple[int, int]] = collections.defaultdict(lambda: (0, 0))
    for line in text.splitlines():
        match = _COLLECTIVE.search(line)
        if match is None:
            continue
        results, kind, started = match.groups()
        sizes = [_array_bytes(*shape) for shape in _SHAPE.findall(results)]
        # The result of a -start operation contains its operand too.
        size = max(sizes, default=0) if started else sum(sizes)
        count, total = totals[kind]
        totals[kind] = count + 1, total + size
    return dict(sorted(totals.items()))


def _array_bytes(dtype: str, dimensions: str) -> int:
    bits = 8 if dtype == "pred" else int(re.sub(r"\D", "", dtype) or 0)
    return math.prod(map(int, filter(None, dimensions.split(",")))) * bits // 8


def out_of_memory_line(message: str) -> str:
    """The line with the numbers from XLA's report that memory is exhausted."""
    lines = message.removeprefix("RESOURCE_EXHAUSTED: ").splitlines()
    numbers = [line for line in lines if re.search(r"\d[GM]\b.*hbm", line, re.I)]
    return (numbers or lines)[0].strip().rstrip(".")


def device_bytes(tree: PyTree) -> int:
    """Bytes of one device's shards of a tree of arrays or shapes."""

    def shard_bytes(x: jax.ShapeDtypeStruct) -> int:
        shape = x.shape
        if isinstance(x.sharding, NamedSharding):
            shape = x.sharding.shard_shape(x.shape)
        return math.prod(shape) * x.dtype.itemsize

    return sum(map(shard_bytes, jax.tree.leaves(tree)))


def with_shardings(shapes: Tree, shardings: PyTree) -> Tree:
    """Shapes with the shardings of a tree of the same form."""
    return jax.tree.map(lambda x, s: x.update(sharding=s), shapes, shardings)
