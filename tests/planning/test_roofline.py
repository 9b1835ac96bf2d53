"""The work of compiled programs against counts by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mgsr_jax.planning.roofline import Cost, read_roofline, scopes
from mgsr_jax.planning.speeds import SPEEDS, Speed

FLOAT = 4


def array(*shape, sharding=None):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)


def roofline_of(function, *shapes, trips=None, domains=(0,)):
    text = jax.jit(function).lower(*shapes).compile().as_text()
    return read_roofline(text, trips=trips, domains=domains)


def close(value):
    return pytest.approx(value, rel=0.05)


def test_a_chain_of_products():
    x, a, b = array(256, 512), array(512, 1024), array(1024, 128)
    cost = roofline_of(lambda x, a, b: x @ a @ b, x, a, b).cost
    assert cost.flops == {"f32": 2 * 256 * 512 * 1024 + 2 * 256 * 1024 * 128}
    middle = 256 * 1024
    assert cost.read == close(FLOAT * (256 * 512 + 512 * 1024 + middle + 1024 * 128))
    assert cost.written == close(FLOAT * (middle + 256 * 128))
    assert (cost.within, cost.across) == (0, 0)


def layers(x, weights):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]


def test_a_loop_counts_once_a_trip():
    roofline = roofline_of(layers, array(64, 256), array(12, 256, 256))
    (loop,) = roofline.loops
    assert loop.trips == 12 and not loop.stated
    cost, x, w = roofline.cost, 64 * 256, 256 * 256
    assert cost.flops == {"f32": 12 * 2 * x * 256}
    # The compiler for CPUs copies the layer's weights, and writes before tanh.
    assert cost.read == close(12 * FLOAT * (2 * w + 2 * x))
    assert cost.written == close(12 * FLOAT * (w + 2 * x))


@pytest.fixture
def over_eight():
    mesh = Mesh(jax.devices()[:8], ("x",))
    return lambda *axes: NamedSharding(mesh, P(*axes))


def test_a_product_over_a_split_axis_sums_over_the_devices(over_eight):
    x = array(64, 512, sharding=over_eight(None, "x"))
    w = array(512, 256, sharding=over_eight("x"))

    def product(x, w):
        return lax.with_sharding_constraint(x @ w, over_eight())

    cost = roofline_of(product, x, w, domains=(0,) * 8).cost
    assert cost.flops == {"f32": 2 * 64 * 64 * 256}
    assert cost.within == close(2 * FLOAT * 64 * 256 * 7 / 8) and cost.across == 0


def test_split_weights_are_gathered(over_eight):
    x = array(64, 512, sharding=over_eight("x"))
    w = array(512, 256, sharding=over_eight("x"))

    def product(x, w):
        return x @ lax.with_sharding_constraint(w, over_eight())

    two = (0,) * 4 + (1,) * 4
    cost = roofline_of(product, x, w, domains=two).cost
    assert cost.flops == {"f32": 2 * 8 * 512 * 256}
    whole = FLOAT * 512 * 256
    assert cost.within == close(whole * 3 / 4)
    assert cost.across == close(whole / 2 / 4)


WIDTH, SLOTS = 256, 128


def decode(x, weight, cache):
    """Extend a row until its sum is negative, which data decide."""

    def extend(state):
        i, x, cache = state
        x = jnp.tanh(x @ weight)
        return i + 1, x, lax.dynamic_update_slice(cache, x, (i, 0))

    with jax.named_scope("extend"):
        state = lax.while_loop(
            lambda state: jnp.sum(state[1]) > 0, extend, (0, x, cache)
        )
    return state


DECODE_SHAPES = array(1, WIDTH), array(WIDTH, WIDTH), array(SLOTS, WIDTH)


def test_a_loop_that_data_end_counts_its_stated_trips():
    roofline = roofline_of(decode, *DECODE_SHAPES, trips={"extend": 100})
    (loop,) = roofline.loops
    assert loop.trips == 100 and loop.stated
    cost = roofline.in_loops("extend")
    # One weight and a few rows a token; the cache is written in place.
    assert cost.read == close(100 * FLOAT * WIDTH * WIDTH)
    assert cost.written < 100 * 10 * FLOAT * WIDTH
    assert cost.flops == {"f32": 100 * 2 * WIDTH * WIDTH}
    assert roofline.in_loops("other") == Cost()


def test_a_loop_without_known_trips_counts_once():
    roofline = roofline_of(decode, *DECODE_SHAPES)
    (loop,) = roofline.loops
    assert loop.trips is None
    assert roofline.cost.flops == {"f32": 2 * WIDTH * WIDTH}


def test_the_name_with_the_most_scopes_counts():
    @jax.named_scope("rewrite")
    def rewrite(*arguments):
        return decode(*arguments)

    trips = {"extend": 100, "rewrite/extend": 50, "rewrite": 1, "skd/extend": 7}
    (loop,) = roofline_of(rewrite, *DECODE_SHAPES, trips=trips).loops
    assert loop.trips == 50


def test_the_costlier_branch_counts_and_each_of_a_switch_its_share():
    x, w = array(64, 256), array(256, 256)

    def product(x, w, times):
        for _ in range(times):
            x = jnp.tanh(x @ w)
        return x

    def branches(i, x, w, counts):
        parts = [lambda x, w, n=n: product(x, w, n) for n in counts]
        return lax.switch(i, parts, x, w)

    i, one = jax.ShapeDtypeStruct((), jnp.int32), 2 * 64 * 256 * 256
    for counts, number in (((1, 3), 3), ((0, 2, 4), 2)):
        found = roofline_of(lambda i, x, w, c=counts: branches(i, x, w, c), i, x, w)
        assert found.cost.flops == pytest.approx({"f32": number * one})


def test_the_floor_is_the_slowest_part():
    speed = Speed({"bf16": 4.0, "f32": 2.0}, memory=10.0, within=5.0, across=1.0)
    cost = Cost({"bf16": 8.0, "f32": 8.0}, 30.0, 20.0, within=10.0, across=7.0)
    assert cost.seconds(speed) == {"compute": 6.0, "memory": 5.0, "links": 7.0}
    assert cost.floor(speed) == 7.0
    assert Cost({"f16": 8.0}).floor(speed) == 2.0  # as fast as the fastest


def test_the_largest_parts_are_named_by_their_scopes():
    def named(x, w, v):
        with jax.named_scope("large"):
            x = x @ w
        with jax.named_scope("small"):
            return x @ v

    shapes = array(64, 2048), array(2048, 2048), array(2048, 64)
    (large, seconds), (small, _) = roofline_of(named, *shapes).largest(SPEEDS["v5e"], 2)
    assert large.startswith("large/dot_general (")
    assert small.startswith("small/dot_general (")
    assert seconds == close(FLOAT * (2048 + 64 + 64) * 2048 / 819e9)


def test_scopes_leave_out_what_jax_adds():
    name = "jit(step)/transpose(jvp(jit(main)))/while/body/closed_call/student/dot"
    assert scopes(name) == "while/body/student/dot"
    assert scopes("(jit(f)/jvp(loss)/psum:jit(f)/update/add)") == "jvp(loss)/psum"


def test_what_the_compiler_adds_has_the_scopes_of_its_reader():
    text = """
ENTRY %main (x: f32[8,8]) -> f32[8,8] {
  %x = f32[8,8]{1,0} parameter(0)
  %copy.3 = f32[8,8]{0,1} copy(%x)
  %bitcast = f32[8,8]{1,0} bitcast(%copy.3)
  ROOT %dot.1.clone.2 = f32[8,8]{1,0} dot(%bitcast, %x), lhs_contracting_dims={1}, \
metadata={op_name="jit(f)/decode/while/body/dot_general"}
}
"""
    names = [work.name for work in read_roofline(text).works]
    assert names == ["decode/dot_general (copy)", "decode/dot_general (dot)"]
