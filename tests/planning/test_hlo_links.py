"""Bytes that collectives send, within a domain and across."""

import pytest

from mgsr_jax.planning.hlo import parse_module
from mgsr_jax.planning.hlo_links import Sent, replica_groups, sent

ONE = (0,) * 8
TWO = (0,) * 4 + (1,) * 4
ALL = "replica_groups=[1,8]<=[8]"
SMALL, LARGE = 8 * 4 * 4, 64 * 4 * 4  # bytes of f32[8,4] and f32[64,4]


def sent_by(result, opcode, operand, attributes, domains):
    module = parse_module(f"""
ENTRY %main (p: {operand}) -> {result} {{
  %p = {operand}{{1,0}} parameter(0)
  ROOT %r = {result} {opcode}(%p), {attributes}
}}
""")
    return sent(module.entry, module.entry.root, module, domains)


@pytest.mark.parametrize(
    ("opcode", "operand", "result", "one", "two"),
    [
        ("all-gather", "f32[8,4]", "f32[64,4]", 7 / 8, (3 / 4, 1 / 8)),
        ("reduce-scatter", "f32[64,4]", "f32[8,4]", 7 / 8, (3 / 4, 1 / 8)),
        ("all-reduce", "f32[64,4]", "f32[64,4]", 7 / 4, (3 / 2, 1 / 4)),
        ("all-to-all", "f32[64,4]", "f32[64,4]", 7 / 8, (3 / 8, 1 / 2)),
    ],
)
def test_a_group_sends_what_no_algorithm_can_save(opcode, operand, result, one, two):
    """Shares of the whole array; with two domains, within and across."""
    assert sent_by(result, opcode, operand, ALL, ONE) == (one * LARGE, 0)
    within, across = sent_by(result, opcode, operand, ALL, TWO)
    assert (within / LARGE, across / LARGE) == two


def test_the_start_of_an_asynchronous_collective_counts_its_result():
    result = "(f32[8,4]{1,0}, f32[64,4]{1,0})"
    found = sent_by(result, "all-gather-start", "f32[8,4]", ALL, ONE)
    assert found == (LARGE * 7 // 8, 0)
    done = sent_by("f32[64,4]", "all-gather-done", "f32[8,4]", "", ONE)
    assert done == Sent()


def test_a_group_within_a_domain_sends_nothing_across():
    groups = "replica_groups={{0,1},{2,3},{4,5},{6,7}}"
    found = sent_by("f32[16,4]", "all-gather", "f32[8,4]", groups, TWO)
    assert found == (SMALL, 0)
    pairs = "replica_groups=[4,2]<=[2,4]T(1,0)"  # device i with i + 4
    found = sent_by("f32[16,4]", "all-gather", "f32[8,4]", pairs, TWO)
    assert found == (0, SMALL)


def test_a_permutation_sends_its_operand():
    def permuted(pairs):
        attributes = f"source_target_pairs={{{pairs}}}"
        permute = "collective-permute", "f32[8,4]"
        return sent_by("f32[8,4]", *permute, attributes, TWO)

    assert permuted("{0,1},{1,2}") == (SMALL, 0)
    assert permuted("{3,4}") == (0, SMALL)
    assert permuted("{0,1},{3,4}") == (SMALL, SMALL)
    assert permuted("{2,2}") == (0, 0)


def test_other_operations_send_nothing():
    assert sent_by("f32[8,4]", "negate", "f32[8,4]", "", ONE) == Sent()


def test_groups_are_read_in_each_notation():
    assert replica_groups("replica_groups={}", 3) == [[0, 1, 2]]
    assert replica_groups("channel_id=1", 2) == [[0, 1]]
    assert replica_groups("replica_groups={{0,2},{1,3}}, x={1}", 4) == [[0, 2], [1, 3]]
    assert replica_groups("replica_groups=[2,2]<=[4]", 4) == [[0, 1], [2, 3]]


@pytest.mark.parametrize(
    ("mesh", "groups"),
    [
        ("mesh['a'=2,'b'=4] {'b'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("mesh['a'=2,'b'=4] {'a'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("mesh['a'=2,'b'=4] {'a','b'}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("mesh['a'=1,'b'=8] {'b':(1)2}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("mesh['b'=8] {'b':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        (
            "mesh['a'=1,'b'=4,'c'=2], device_ids=([2,4]T(1,0)) {'b'}",
            [[0, 1, 2, 3], [4, 5, 6, 7]],
        ),
    ],
)
def test_groups_along_axes_of_a_mesh(mesh, groups):
    attributes = f"channel_id=7, replica_groups={mesh}, dimensions={{2}}"
    assert replica_groups(attributes, 8) == groups
