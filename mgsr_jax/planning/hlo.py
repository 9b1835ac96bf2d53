"""The text of a compiled program as data: computations, instructions, array types.

  %name (parameters) -> type {               a computation; ENTRY comes before the first
    %name = type opcode(operands), attributes      ROOT comes before its result
  }

jaxlib's own bindings of a module have no shapes and no called computations, and XLA's
protocol buffers are in no small package, so the text is read. Its grammar is the same
for CPU, TPU and GPU; what differs is the layouts, which end in a memory space.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator


@dataclasses.dataclass(frozen=True)
class ArrayType:
    """An array's type, such as `bf16[8,128]{1,0:T(8,128)(2,1)S(1)}`.

    Attributes:
      dtype: XLA's name of the element type.
      shape: dimensions of one device's part.
      space: memory space; 0 is the device's main memory.
    """

    dtype: str
    shape: tuple[int, ...]
    space: int = 0

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes without padding; tokens and opaque values have none.

        >>> ArrayType("bf16", (8, 4)).bytes, ArrayType("s4", (3,)).bytes
        (64, 2)
        """
        if self.dtype == "pred":
            return self.size
        bits = re.search(r"\d+", self.dtype)
        return math.ceil(self.size * int(bits.group()) / 8) if bits else 0


Type = ArrayType | tuple["Type", ...]


def leaves(type: Type) -> list[ArrayType]:
    """The arrays of a type, in order."""
    if isinstance(type, ArrayType):
        return [type]
    return [leaf for part in type for leaf in leaves(part)]


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One operation.

    Attributes:
      name: unique name in the module.
      type: what it returns.
      opcode: for example `dot` or `all-gather-start`.
      operands: names of instructions of the same computation.
      inside: text between the opcode's parentheses.
      attributes: text behind them.
    """

    name: str
    type: Type
    opcode: str
    operands: tuple[str, ...]
    inside: str
    attributes: str

    @property
    def op_name(self) -> str:
        """JAX's name with its scopes, `jit(f)/while/body/dot_general`; may be empty."""
        match = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes)
        return match.group(1) if match else ""

    def called(self, *roles: str) -> list[str]:
        """Names of the computations that it calls as `body`, `calls` and so on."""
        found: list[str] = []
        for role in roles:
            pattern = rf"\b{role}=(?:\{{([^}}]*)\}}|(%[\w.\-]+))"
            for names in re.findall(pattern, self.attributes):
                found += re.findall(r"%([\w.\-]+)", "".join(names))
        return found

    def integers(self, attribute: str) -> list[int]:
        """The numbers of an attribute such as `lhs_contracting_dims={1,2}`."""
        match = re.search(rf"\b{attribute}=\{{([\d,]*)\}}", self.attributes)
        return [int(n) for n in match.group(1).split(",") if n] if match else []


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions in order; each comes behind its operands."""

    name: str
    instructions: dict[str, Instruction]
    root: Instruction

    @functools.cached_property
    def parameters(self) -> list[Instruction]:
        """Parameters by number."""
        found = [i for i in self.instructions.values() if i.opcode == "parameter"]
        return sorted(found, key=lambda i: int(i.inside))

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Name of an instruction -> the instructions that read it."""
        found: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for user in self.instructions.values():
            for operand in dict.fromkeys(user.operands):
                found[operand].append(user)
        return found

    def operand_types(self, instruction: Instruction) -> list[Type]:
        """The types of an instruction's operands."""
        return [self.instructions[name].type for name in instruction.operands]


@dataclasses.dataclass(frozen=True)
class Module:
    """A program: its computations by name, and the one that runs first."""

    computations: dict[str, Computation]
    entry: Computation


def parse_module(text: str) -> Module:
    """The module of a compiled program's text.

    Raises:
      ValueError: there is no entry computation, or a line is not in the grammar.
    """
    computations: dict[str, Computation] = {}
    entry = None
    for is_entry, computation in _computations(text):
        computations[computation.name] = computation
        entry = computation if is_entry else entry
    if entry is None:
        raise ValueError(
            "the program's text has no ENTRY computation; pass the result of "
            "compiled.as_text()"
        )
    return Module(computations, entry)


_HEADER = re.compile(r"^(ENTRY )?%([\w.\-]+)\b.*\{$")
_START = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")


def _computations(text: str) -> Iterator[tuple[bool, Computation]]:
    header = None
    instructions: dict[str, Instruction] = {}
    root = None
    for line in text.splitlines():
        if header is None:
            if header := _HEADER.match(line):
                instructions, root = {}, None
        elif line.startswith("}"):
            if root is None:
                raise ValueError(f"computation {header.group(2)} has no ROOT")
            yield bool(header.group(1)), Computation(header[2], instructions, root)
            header = None
        elif start := _START.match(line):
            instruction = _instruction(start.group(2), line, start.end())
            instructions[instruction.name] = instruction
            root = instruction if start.group(1) else root


def _instruction(name: str, line: str, start: int) -> Instruction:
    end = _closing(line, start) if line[start] == "(" else line.index(" ", start)
    opcode = _OPCODE.match(line, end)
    if opcode is None:
        raise ValueError(f"no opcode behind the type in the HLO line {line.strip()!r}")
    close = _closing(line, opcode.end() - 1)
    inside = line[opcode.end() : close - 1]
    operands = () if opcode[1] == "constant" else re.findall(r"%([\w.\-]+)", inside)
    return Instruction(
        name,
        parse_type(line[start:end]),
        opcode.group(1),
        tuple(operands),
        inside,
        line[close:],
    )


def _closing(text: str, start: int) -> int:
    """The index behind the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match.group() == "(" else -1
        if depth == 0:
            return match.end()
    raise ValueError(f"a parenthesis is not closed in the HLO line {text.strip()!r}")


_TYPE_TOKEN = re.compile(r"\(|\)|(\w+)\[([^\]]*)\](?:\{([^}]*)\})?")


def parse_type(text: str) -> Type:
    """The type that a text describes.

    >>> parts = leaves(parse_type("(f32[2,3]{1,0:T(8,128)S(1)}, /*index=1*/s32[])"))
    >>> [(part.dtype, part.shape, part.space) for part in parts]
    [('f32', (2, 3), 1), ('s32', (), 0)]
    """
    stack: list[list[Type]] = [[]]
    for token in _TYPE_TOKEN.finditer(text):
        if token.group() == "(":
            stack.append([])
        elif token.group() == ")":
            closed = tuple(stack.pop())
            stack[-1].append(closed)
        else:
            stack[-1].append(_array_type(*token.groups()))
    return stack[0][0]


def _array_type(dtype: str, dimensions: str, layout: str | None) -> ArrayType:
    # A dimension of varying size is written <=8.
    shape = tuple(int(n) for n in re.findall(r"\d+", dimensions))
    space = re.search(r"S\((\d+)\)", layout or "")
    return ArrayType(dtype, shape, int(space.group(1)) if space else 0)
