"""FLOPs and memory traffic of one instruction of a compiled program.

Only matrix products count as FLOPs. A fusion reads its operands and writes its results
once. Where only a part of an array is used, only that part counts: operands of slice,
dynamic-slice and gather, and buffers that dynamic-update-slice and scatter write in
place. Caches between the main memory and the cores are ignored, except a TPU's, which
the compiler manages itself: arrays in it have another memory space.
"""

import collections
import functools
import json
import math
import re
from collections.abc import Callable

import numpy as np

from mgsr_jax.planning.hlo import (
    ArrayType,
    Computation,
    Instruction,
    Module,
    Type,
    leaves,
)

# Operations that move no data, or whose data their computations move.
_FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast after-all add-dependency iota "
    "opt-barrier partition-id replica-id domain while conditional call async".split()
)
_FREE_TARGETS = ("AllocateBuffer", "Sharding", "ConcatBitcast")
_SLICES = ("slice", "dynamic-slice", "gather")
_UPDATES = ("dynamic-update-slice", "scatter")
_VIEWS = ("bitcast", "reshape")

InMemory = Callable[[ArrayType], bool]
"""Whether an array is in the device's main memory."""


def result(instruction: Instruction) -> Type:
    """The type of an operation's result, without what belongs to its bookkeeping.

    The type of a start is (operands, results, context), of a copy-start (result,
    operand, context), of an all-reduce-start only the results. The second result of a
    call of cuBLAS is its workspace.
    """
    type, opcode = instruction.type, instruction.opcode
    if isinstance(type, tuple) and _is_cublas(instruction):
        return type[0]
    if isinstance(type, ArrayType) or not opcode.endswith("-start"):
        return type
    if opcode == "all-reduce-start":
        return type
    return type[0 if opcode == "copy-start" else 1]


def traffic(
    computation: Computation,
    instruction: Instruction,
    module: Module,
    in_memory: InMemory,
) -> tuple[int, int]:
    """Bytes that an instruction reads from main memory, and that it writes there."""
    opcode = instruction.opcode.removesuffix("-start")
    if opcode in _FREE or opcode.endswith(("-done", "-update")):
        return 0, 0
    if opcode == "custom-call" and target(instruction) in _FREE_TARGETS:
        return 0, 0
    operands = computation.operand_types(instruction)
    if opcode == "fusion":
        return _fusion_traffic(instruction, operands, module, in_memory)
    sizes = [_bytes(type, in_memory) for type in operands]
    written = _bytes(result(instruction), in_memory)
    if opcode in _SLICES:
        return min(sizes[0], _bytes(result(instruction))) + sum(sizes[1:]), written
    if opcode in _UPDATES:
        part = _update(instruction, computation) if written else 0
        buffers = 1 if opcode == "dynamic-update-slice" else len(operands) // 2
        return sum(sizes[buffers:]), part
    return sum(sizes), written


def target(instruction: Instruction) -> str:
    """The function that a custom call calls."""
    match = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
    return match.group(1) if match else ""


def _is_cublas(instruction: Instruction) -> bool:
    is_call = instruction.opcode == "custom-call"
    return is_call and target(instruction).startswith("__cublas$")


def _bytes(type: Type, in_memory: InMemory = lambda _: True) -> int:
    return sum(array.bytes for array in leaves(type) if in_memory(array))


def _update(instruction: Instruction, computation: Computation) -> int:
    """Bytes of the part that a dynamic-update-slice or scatter writes in place."""
    operands = computation.operand_types(instruction)
    if instruction.opcode == "dynamic-update-slice":
        return _bytes(operands[1])
    # (buffers ..., indices, updates ...)
    return sum(map(_bytes, operands[len(operands) // 2 + 1 :]))


def _fusion_traffic(
    instruction: Instruction, operands: list[Type], module: Module, in_memory: InMemory
) -> tuple[int, int]:
    fused = module.computations[instruction.called("calls")[0]]
    read = sum(
        min(_bytes(type, in_memory), _read(fused, parameter, module))
        for parameter, type in zip(fused.parameters, operands, strict=True)
    )
    root = fused.root
    names = root.operands if root.opcode == "tuple" else (root.name,)
    arrays = leaves(instruction.type)
    if len(names) != len(arrays):
        return read, _bytes(instruction.type, in_memory)
    written = sum(
        _written(fused, fused.instructions[name], module)
        for name, array in zip(names, arrays, strict=True)
        if in_memory(array)
    )
    return read, written


def _read(fused: Computation, source: Instruction, module: Module) -> int:
    """Bytes of an array that a fusion reads."""
    whole, total = _bytes(source.type), 0
    for user in fused.users[source.name]:
        if user.opcode in _VIEWS:
            total += _read(fused, user, module)
        elif user.opcode in _SLICES and source.name not in user.operands[1:]:
            total += _bytes(user.type)
        elif user.opcode in _UPDATES and user.operands[0] == source.name:
            total += 0 if _is_output(fused, user) else whole
        elif user.opcode == "fusion":
            inner = module.computations[user.called("calls")[0]]
            pairs = zip(inner.parameters, user.operands, strict=True)
            total += sum(_read(inner, p, module) for p, o in pairs if o == source.name)
        else:
            return whole
    return min(total, whole)


def _is_output(fused: Computation, instruction: Instruction) -> bool:
    """Whether a fusion returns the value, and does nothing else with it."""
    return instruction.name == fused.root.name or all(
        user.name == fused.root.name
        and user.opcode == "tuple"
        or user.opcode in _VIEWS
        and _is_output(fused, user)
        for user in fused.users[instruction.name]
    )


def _written(fused: Computation, output: Instruction, module: Module) -> int:
    """Bytes of one of a fusion's results that it writes."""
    while output.opcode in _VIEWS:
        output = fused.instructions[output.operands[0]]
    if output.opcode in _UPDATES:
        return _update(output, fused)
    if output.opcode == "fusion" and isinstance(output.type, ArrayType):
        inner = module.computations[output.called("calls")[0]]
        return _written(inner, inner.root, module)
    return _bytes(output.type)


def flops(
    computation: Computation, instruction: Instruction, module: Module
) -> collections.Counter[str]:
    """FLOPs of an instruction's matrix products, by the dtype of their operands."""
    counts: collections.Counter[str] = collections.Counter()
    if instruction.opcode == "fusion":
        fused = module.computations[instruction.called("calls")[0]]
        for inner in fused.instructions.values():
            counts += flops(fused, inner, module)
        return counts
    if instruction.opcode not in ("dot", "convolution", "custom-call"):
        return counts
    operands = [
        array
        for type in computation.operand_types(instruction)
        for array in leaves(type)
    ]
    output = leaves(instruction.type)
    if instruction.opcode == "convolution":
        number = _convolution_flops(instruction, operands, output[0])
    elif (contracted := _contracted(instruction)) is not None:
        number = 2 * output[0].size
        number *= math.prod(operands[0].shape[axis] for axis in contracted)
    else:
        # A Pallas kernel states its own.
        stated = re.search(r'"cost_estimate":\{"flops":"(\d+)"', instruction.attributes)
        number = int(stated.group(1)) if stated else 0
    if not number:
        return counts
    widest = max(operands[:2], key=lambda array: ArrayType(array.dtype, (8,)).bytes)
    counts[widest.dtype] = number
    return counts


def _contracted(instruction: Instruction) -> list[int] | None:
    """Axes of the left operand that a product sums over; None for another custom call.

    A GPU's compiler calls cuBLAS, with the axes in the call's configuration.
    """
    if instruction.opcode == "dot":
        return instruction.integers("lhs_contracting_dims")
    if not _is_cublas(instruction):
        return None
    config = re.search(
        r'"lhs_contracting_dimensions":(\[[^\]]*\])', instruction.attributes
    )
    return [int(axis) for axis in json.loads(config.group(1))] if config else None


def _convolution_flops(
    instruction: Instruction, operands: list[ArrayType], output: ArrayType
) -> int:
    """FLOPs of a convolution, in which TPUs write their products.

    A position of the window that lies in the padding or between dilated elements costs
    nothing: in a product with a batch axis, all but one of them do.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    assert labels is not None
    left, kernel, out = labels.groups()
    lhs, rhs = operands[:2]
    number = 2 * rhs.shape[kernel.index("i")]
    number *= output.shape[out.index("f")] * output.shape[out.index("b")]
    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    settings = dict(re.findall(r"(\w+)=(\S+)", window.group(1))) if window else {}
    for axis in filter(str.isdigit, kernel):
        sizes = (
            array.shape[names.index(axis)]
            for array, names in ((lhs, left), (rhs, kernel), (output, out))
        )
        number *= _valid_positions(*sizes, *_window(settings, int(axis)))
    return number


def _window(settings: dict[str, str], axis: int) -> tuple[int, int, int, int]:
    """(stride, padding below, dilation of the input, dilation of the kernel)."""

    def number(name: str, default: str) -> int:
        text = settings.get(name)
        return int((text.split("x")[axis] if text else default).split("_")[0])

    dilations = number("lhs_dilate", "1"), number("rhs_dilate", "1")
    return number("stride", "1"), number("pad", "0"), *dilations


@functools.cache
def _valid_positions(
    size: int,
    kernel: int,
    output: int,
    stride: int,
    padding: int,
    dilation: int,
    kernel_dilation: int,
) -> int:
    """Pairs of output and kernel positions that meet an element of the input."""
    starts = np.arange(output)[:, None] * stride - padding
    index = starts + np.arange(kernel)[None] * kernel_dilation
    within = (index >= 0) & (index <= (size - 1) * dilation)
    return int(np.sum(within & (index % dilation == 0)))
