"""Trips of loops that a compiler does not write down."""

import pytest

from mgsr_jax.planning.hlo import parse_module
from mgsr_jax.planning.hlo_trips import trip_count

# As a TPU's compiler writes it: the comparison is a fusion, the limit may be carried.
LOOP = """
%fused_compare (a: s32[], b: s32[]) -> pred[] {{
  %a = s32[]{{:T(128)}} parameter(0)
  %b = s32[]{{:T(128)}} parameter(1)
  ROOT %compare = pred[]{{:T(512)}} compare(%a, %b), direction={direction}
}}

%condition (p: (s32[], f32[8], s32[])) -> pred[] {{
  %p = (s32[]{{:T(128)}}, f32[8]{{0:T(128)S(1)}}, s32[]) parameter(0)
  %counter = s32[]{{:T(128)}} get-tuple-element(%p), index=0
  %limit = s32[]{{:T(128)}} get-tuple-element(%p), index=2
  %constant = s32[]{{:T(128)}} constant(12)
  ROOT %less = pred[]{{:T(512)}} fusion(%counter, %{limit}), kind=kLoop, \
calls=%fused_compare
}}

%body (q: (s32[], f32[8], s32[])) -> (s32[], f32[8], s32[]) {{
  %q = (s32[], f32[8]{{0}}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%q), index=0
  %x = f32[8]{{0}} get-tuple-element(%q), index=1
  %n = s32[] get-tuple-element(%q), index=2
  %step = s32[] constant({step})
  %next = s32[] {advance}(%i, %step)
  ROOT %out = (s32[], f32[8]{{0}}, s32[]) tuple(%next, %x, %n)
}}

ENTRY %main (x: f32[8], m: s32[]) -> (s32[], f32[8], s32[]) {{
  %x.1 = f32[8]{{0}} parameter(0)
  %m = s32[] parameter(1)
  %start = s32[] constant({start})
  %copied = s32[] copy(%start)
  %ten = s32[] constant(10)
  %init = (s32[], f32[8]{{0}}, s32[]) tuple(%copied, %x.1, %{given})
  ROOT %while = (s32[], f32[8]{{0}}, s32[]) while(%init), condition=%condition, \
body=%body{more}
}}
"""
DEFAULTS = {
    "direction": "LT",
    "limit": "constant",
    "step": 1,
    "advance": "add",
    "start": 0,
    "given": "ten",
    "more": "",
}


@pytest.mark.parametrize(
    ("changes", "trips"),
    [
        ({}, 12),
        ({"start": 2}, 10),
        ({"step": 5}, 3),
        ({"direction": "LE"}, 13),
        ({"start": 20}, 0),
        ({"limit": "limit"}, 10),
        ({"limit": "limit", "given": "m"}, None),
        ({"advance": "multiply"}, None),
        ({"step": 0}, None),
        ({"direction": "NE"}, None),
        ({"more": ', backend_config={"known_trip_count":{"n":"7"}}'}, 7),
    ],
)
def test_a_counted_loop_is_recognised(changes, trips):
    module = parse_module(LOOP.format(**DEFAULTS | changes))
    assert trip_count(module.entry, module.entry.root, module) == trips
