"""Figures of a compiled program."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mgsr_jax.planning.compiled import (
    collectives,
    compile_program,
    device_bytes,
    out_of_memory_line,
)


def test_collectives_are_counted_with_the_bytes_of_their_outputs():
    text = """
      %a = f32[4,8]{1,0} all-reduce(%x), to_apply=%add
      %b = (bf16[2,8], bf16[16,8]) all-gather-start(%y), dimensions={0}
      %c = bf16[16,8] all-gather-done(%b)
      %d = (f32[2], pred[3]) all-to-all(%u, %v)
    """
    assert collectives(text) == {
        "all-gather": (1, 256),
        "all-reduce": (1, 128),
        "all-to-all": (1, 11),
    }


def test_unread_arguments_and_resident_arrays_are_part_of_the_peak():
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    row = jax.ShapeDtypeStruct(
        (8, 4), jnp.float32, sharding=NamedSharding(mesh, P("x"))
    )
    assert device_bytes((row, row)) == 2 * 4 * 4 * 4
    add_one = jax.jit(lambda read, unread: read + 1)
    program, output = compile_program("add", add_one, (row, row), options={})
    assert program.arguments == 4 * 4 * 4
    assert program.peak >= 2 * program.arguments and output.shape == (8, 4)
    assert output.sharding.shard_shape(output.shape) == (4, 4)
    more = compile_program("add", add_one, (row, row), options={}, resident=1000)
    assert more[0].peak == program.peak + 1000


def test_the_line_with_the_numbers_is_taken_from_an_out_of_memory_report():
    report = "RESOURCE_EXHAUSTED: XLA:TPU compile\n  Used 20G of 15G hbm. Exceeded.\n"
    assert out_of_memory_line(report) == "Used 20G of 15G hbm. Exceeded"
    assert out_of_memory_line("RESOURCE_EXHAUSTED: too large") == "too large"
