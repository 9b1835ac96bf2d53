"""Finished rows read into a cache, against one forward pass."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mgsr_jax.decoding.reading import read_on, read_whole, unread


@pytest.mark.slow
@pytest.mark.parametrize(
    ("block", "decode_rows"), [(1, None), (3, None), (4, 2), (20, 3)]
)
def test_reading_in_blocks_equals_one_forward_pass(block, decode_rows):
    """From the start, whole or in blocks, and again from a token that changed."""
    model, params = tiny.llama(scale=3.0)
    rows = tiny.complete(((2, 3), (1, 13), (4, 6), (3, 9), (1, 1)), width=14)

    @jax.jit
    def hidden_of(rows, changed):
        read = partial(read_on, model, params, block=block, decode_rows=decode_rows)
        blocks = read(unread(model, params, rows), rows)
        state = read_whole(model, params, rows, decode_rows=decode_rows)
        cut = jnp.minimum(changed + 1, rows.lengths)
        kept = dataclasses.replace(state.rows, lengths=cut)
        tokens = rows.tokens.at[jnp.arange(5), changed].set(7)
        rows = dataclasses.replace(rows, tokens=tokens)
        again = read(dataclasses.replace(state, rows=kept), rows)
        done = blocks.done & state.done & again.done
        first = blocks.hidden, state.hidden
        return first, again.hidden, done, model.forward(params, tokens)[0]

    changed = jnp.array([2, 5, 1, 8, 1])
    first, again, done, want_again = hidden_of(rows, changed)
    want, _ = model.forward(params, rows.tokens)
    assert done.all()
    for b, length in enumerate(rows.lengths.tolist()):
        read = b, slice(length - 1)
        for hidden in first:
            np.testing.assert_allclose(hidden[read], want[read], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(again[read], want_again[read], rtol=1e-5, atol=1e-5)
