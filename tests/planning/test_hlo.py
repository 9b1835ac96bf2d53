"""The grammar of compiled text, on lines of the compilers for CPU, TPU and GPU."""

import jax
import jax.numpy as jnp
import pytest

from mgsr_jax.planning.hlo import ArrayType, leaves, parse_module, parse_type

HEAD = "HloModule jit_f, is_scheduled=true, entry_computation_layout={(f32[8]{0})}"


def instruction(line):
    """One line as the root of a program."""
    named = [f"  %{name} = f32[8]{{0}} parameter({i})" for i, name in enumerate("abc")]
    text = "\n".join(
        (HEAD, "", "ENTRY %main (a: f32[8]) -> f32[8] {", *named, line, "}")
    )
    return parse_module(text).entry.root


def test_a_cpus_fusion():
    found = instruction(
        "  ROOT %ynn_fusion.1 = f32[64,256]{1,0} fusion(%a, %b), kind=kCustom, "
        "calls=%fused_computation, metadata={op_name="
        '"jit(layers)/while/body/closed_call/dot_general" stack_frame_id=9}, '
        'backend_config={"outer_dimension_partitions":[]}'
    )
    assert found.opcode == "fusion" and found.operands == ("a", "b")
    assert found.type == ArrayType("f32", (64, 256))
    assert found.called("calls") == ["fused_computation"]
    assert found.op_name == "jit(layers)/while/body/closed_call/dot_general"


def test_a_tpus_prefetch_and_loop():
    found = instruction(
        "  ROOT %copy-start.150 = (bf16[2,16]{1,0:T(8,128)(2,1)S(1)}, "
        "bf16[2,16]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%a)"
    )
    assert [array.space for array in leaves(found.type)] == [1, 0, 2]
    found = instruction(
        "  ROOT %while.611 = (s32[8,64]{1,0:T(8,128)}, "
        "/*index=1*/f32[16]{0:T(128)S(1)}) while(%a), "
        "condition=%wide.region_26.35_spmd, body=%wide.region_8.31_spmd, "
        'metadata={op_name="jit(f)/decode/while" stack_frame_id=33}'
    )
    assert found.called("body") == ["wide.region_8.31_spmd"]
    assert found.called("condition") == ["wide.region_26.35_spmd"]
    assert [array.shape for array in leaves(found.type)] == [(8, 64), (16,)]


def test_a_gpus_collective_of_several_arrays():
    found = instruction(
        "  ROOT %all-gather-start.2 = ((bf16[32,128]{1,0}, bf16[32,256]{1,0}), "
        "(bf16[256,128]{1,0}, bf16[256,256]{1,0})) "
        "all-gather-start(%a, /*index=1*/%b), "
        "channel_id=11, replica_groups=mesh['axis_0'=8] {'axis_0'}, dimensions={0}"
    )
    assert found.operands == ("a", "b") and found.integers("dimensions") == [0]
    operands, results = found.type
    assert [array.bytes for array in leaves(operands)] == [32 * 256, 32 * 512]
    assert [array.bytes for array in leaves(results)] == [256 * 256, 256 * 512]


def test_types_before_operands_are_no_operands():
    """Some versions print them."""
    found = instruction(
        "  ROOT %n = f32[8]{0:T(128)} add(f32[8]{0:T(128)} %a, f32[] %b)"
    )
    assert found.operands == ("a", "b")


def test_branches_are_called_in_order():
    found = instruction(
        "  ROOT %c = f32[8]{0} conditional(%a, %b, %c.1), "
        "branch_computations={%branch_0, %branch_1.clone}"
    ).called("branch_computations")
    assert found == ["branch_0", "branch_1.clone"]


def test_sizes_of_types():
    sizes = {"pred[3]": 3, "s4[3]": 2, "f8e4m3fn[5]": 5, "f32[]": 4, "token[]": 0}
    for text, size in (sizes | {"s32[<=8,2]{1,0}": 64, "c64[2]": 16}).items():
        (array,) = leaves(parse_type(text))
        assert array.bytes == size, text


def test_a_compiled_program_is_read_whole():
    """Every computation and instruction of the text, and nothing else."""

    def f(x):
        with jax.named_scope('a "name" (of) % and {'):
            return jax.lax.fori_loop(0, 3, lambda i, x: jnp.sin(x) @ x, x)

    shape = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    text = jax.jit(f).lower(shape).compile().as_text()
    module = parse_module(text)
    lines = [line for line in text.splitlines() if " = " in line and "%" in line]
    read = [i for c in module.computations.values() for i in c.instructions.values()]
    assert len(read) == len(lines)
    for computation in module.computations.values():
        for i in computation.instructions.values():
            assert set(i.operands) <= computation.instructions.keys()
    assert module.entry.root.name in module.entry.instructions


def test_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        parse_module("module @jit_f {}")
    with pytest.raises(ValueError, match="not closed"):
        instruction("  ROOT %r = f32[8]{0} negate(%a")
    with pytest.raises(ValueError, match="no opcode"):
        instruction("  ROOT %r = f32[8]{0} %a")
