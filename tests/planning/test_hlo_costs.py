"""FLOPs and memory traffic of single instructions."""

import pytest

from mgsr_jax.planning.hlo import parse_module
from mgsr_jax.planning.hlo_costs import flops, traffic

ROW, CACHE = 64 * 4, 512 * 64 * 4  # bytes of f32[1,64] and f32[512,64]

CACHE_UPDATE = """
%fused (a: f32[512,64], b: f32[1,64], c: s32[]) -> f32[512,64] {
  %a = f32[512,64]{1,0} parameter(0)
  %b = f32[1,64]{1,0} parameter(1)
  %negate = f32[1,64]{1,0} negate(%b)
  %c = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %update = f32[512,64]{1,0} dynamic-update-slice(%a, %negate, %c, %zero)
}

ENTRY %main (cache: f32[512,64], row: f32[1,64], i: s32[]) -> f32[512,64] {
  %cache = f32[512,64]{1,0} parameter(0)
  %row = f32[1,64]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %fusion = f32[512,64]{1,0} fusion(%cache, %row, %i), kind=kLoop, calls=%fused
}
"""


def root_traffic(text, in_memory=lambda _: True):
    module = parse_module(text)
    return traffic(module.entry, module.entry.root, module, in_memory)


def program(instruction, **parameters):
    """A program of parameters by name and type, and one instruction."""
    lines = [
        f"  %{name} = {type} parameter({i})"
        for i, (name, type) in enumerate(parameters.items())
    ]
    head = "ENTRY %main () -> f32[] {"
    return "\n".join((head, *lines, f"  ROOT %r = {instruction}", "}"))


def test_a_cache_is_written_in_place():
    assert root_traffic(CACHE_UPDATE) == (ROW + 4, ROW)


def test_a_cache_that_is_also_read_counts_whole():
    text = CACHE_UPDATE.replace("ROOT %update", "%update").replace(
        "}\n\nENTRY", "  ROOT %sum = f32[512,64]{1,0} add(%update, %a)\n}\n\nENTRY"
    )
    assert root_traffic(text) == (CACHE + ROW + 4, CACHE)


def test_a_fusion_that_slices_an_operand_reads_the_slice():
    text = """
%fused (a: f32[12,512,64], i: s32[]) -> f32[512,64] {
  %a = f32[12,512,64]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = f32[1,512,64]{2,1,0} dynamic-slice(%a, %i, %zero, %zero), \
dynamic_slice_sizes={1,512,64}
  %view = f32[512,64]{1,0} bitcast(%slice)
  ROOT %tanh = f32[512,64]{1,0} tanh(%view)
}
""" + program(
        "f32[512,64]{1,0} fusion(%layers, %i), kind=kLoop, calls=%fused",
        layers="f32[12,512,64]{2,1,0}",
        i="s32[]",
    )
    assert root_traffic(text) == (CACHE + 4, CACHE)


def test_slices_gathers_and_updates_count_their_part():
    cache, row = "f32[512,64]{1,0}", "f32[1,64]{1,0}"
    sliced = program(f"{row} dynamic-slice(%x, %i, %i)", x=cache, i="s32[]")
    assert root_traffic(sliced) == (ROW + 8, ROW)
    gathered = program(f"{row} gather(%x, %i), offset_dims={{1}}", x=cache, i="s32[1]")
    assert root_traffic(gathered) == (ROW + 4, ROW)
    updated = program(
        f"{cache} dynamic-update-slice(%x, %u, %i, %i)", x=cache, u=row, i="s32[]"
    )
    assert root_traffic(updated) == (ROW + 8, ROW)
    scattered = program(
        f"{cache} scatter(%x, %i, %u), to_apply=%f", x=cache, i="s32[1]", u=row
    )
    assert root_traffic(scattered) == (ROW + 4, ROW)


def test_operations_without_data_of_their_own_are_free():
    cache = "f32[512,64]{1,0}"
    for instruction in (
        "f32[64,512]{1,0} bitcast(%x)",
        f"({cache}) tuple(%x)",
        f"{cache} copy-done(%x)",
        f'{cache} custom-call(%x), custom_call_target="Sharding"',
    ):
        assert root_traffic(program(instruction, x=cache)) == (0, 0)


def test_a_tpus_fast_memory_is_not_main_memory():
    slow, fast = "f32[512,64]{1,0:T(8,128)}", "f32[512,64]{1,0:T(8,128)S(1)}"

    def on_tpu(instruction, x):
        text = program(instruction, x=x)
        return root_traffic(text, lambda array: array.space == 0)

    prefetch = f"({fast}, {slow}, u32[]{{:S(2)}}) copy-start(%x)"
    assert on_tpu(prefetch, slow) == (CACHE, 0)
    assert on_tpu(f"{fast} negate(%x)", fast) == (0, 0)
    assert on_tpu(f"{slow} negate(%x)", fast) == (0, CACHE)


def test_the_workspace_of_cublas_is_no_result():
    product = (
        "(f32[8,32]{1,0}, s8[4194304]{0}) custom-call(%x, %w), "
        'custom_call_target="__cublas$lt$matmul"'
    )
    operands = {"x": "bf16[8,16]{1,0}", "w": "bf16[16,32]{1,0}"}
    assert root_traffic(program(product, **operands)) == (2 * 16 * 40, 4 * 8 * 32)


def product_flops(instruction, **operands):
    module = parse_module(program(instruction, **operands))
    return flops(module.entry, module.entry.root, module)


@pytest.mark.parametrize(
    "instruction",
    [
        "f32[4,8,32]{2,1,0} dot(%x, %w), lhs_batch_dims={0}, rhs_batch_dims={0}, "
        "lhs_contracting_dims={2}, rhs_contracting_dims={1}",
        # A GPU's compiler calls cuBLAS, whose workspace is a second result.
        "(f32[4,8,32]{2,1,0}, s8[1024]{0}) custom-call(%x, %w), "
        'custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":'
        '{"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"],'
        '"rhs_contracting_dimensions":["1"]}}}',
        # A TPU's compiler writes a batch axis as a dilated window.
        "f32[4,8,32]{2,1,0} convolution(%x, %w), window={size=4 stride=3 pad=0_0 "
        "lhs_dilate=4}, dim_labels=0bf_0io->0bf",
    ],
    ids=["dot", "cublas", "convolution"],
)
def test_products_with_a_batch_axis(instruction):
    x, w = "bf16[4,8,16]{2,1,0}", "bf16[4,16,32]{2,1,0}"
    found = product_flops(instruction, x=x, w=w)
    assert found == {"bf16": 2 * 4 * 8 * 16 * 32}


def test_a_product_counts_in_its_wider_operand():
    dot = "f32[8,32] dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}"
    assert product_flops(dot, x="f32[8,16]", w="s8[16,32]") == {"f32": 2 * 8 * 16 * 32}


def test_a_convolution_over_positions():
    """Five positions of a window of 3 over 5 elements, padded by 1: 13 are inside."""
    window = "window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f"
    found = product_flops(
        f"f32[2,5,6] convolution(%x, %w), {window}", x="f32[2,5,7]", w="f32[3,7,6]"
    )
    assert found == {"f32": 2 * 2 * 13 * 7 * 6}


def test_a_kernel_states_its_flops():
    call = (
        'bf16[8] custom-call(%x), custom_call_target="tpu_custom_call", backend_config='
        '{"custom_call_config":{"body":"AA==","cost_estimate":{"flops":"276824064",'
        '"transcendentals":"2097152","bytes_accessed":"4194304"}}}'
    )
    assert product_flops(call, x="bf16[8]") == {"bf16": 276824064}


def test_other_custom_calls_have_no_flops():
    call = 'f32[8] custom-call(%x), custom_call_target="TopK"'
    assert not product_flops(call, x="f32[8]")
