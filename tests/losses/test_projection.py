"""A head's matrix as a Projection: the gradient that is summed in place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from losses.chunk_problem import (
    D,
    V,
    assert_close,
    dense,
    differentiated,
    in_chunks,
    light_loss,
    light_problem,
)

from mgsr_jax.losses import Projection, _projection, chunked, project


def test_the_gradient_is_summed_block_by_block(monkeypatch):
    """Blocks of 16 rows: the last one starts earlier and counts no row twice."""
    monkeypatch.setattr(_projection, "_BLOCK", 4 * D * 16)
    arguments = light_problem(7)
    # Not the cached function: it may have been compiled with the usual blocks.
    run = in_chunks.__wrapped__(6, light_loss)
    got = differentiated.__wrapped__(run)(*arguments)
    assert_close(got, differentiated(dense(light_loss))(*arguments))


def test_a_projection_is_multiplied_once_and_with_every_token():
    kernel, hidden = jnp.ones((V, D)), jnp.ones((6, D))

    def twice(shared, hidden, aux):
        return jnp.sum(project(hidden, shared) - project(hidden, shared)), ()

    def of_some(shared, hidden, aux):
        return jnp.sum(project(hidden[:2], shared)), ()

    for fn, message in ((twice, "again"), (of_some, r"\(2, 5\), first")):
        with pytest.raises(ValueError, match=message):
            jax.grad(
                lambda kernel, fn=fn: chunked(
                    fn, Projection(kernel), hidden, (), chunk_size=3, overlap=0
                )[0]
            )(kernel)


def test_a_projection_can_be_cast_but_not_changed():
    """The tape would miss the gradient of any other operation on the kernel."""
    kernel, hidden = jnp.ones((V, D)), jnp.ones((6, D))

    def gradient(change):
        def fn(shared, hidden, aux):
            head = jax.tree.map(change, shared)
            return jnp.sum(jnp.square(project(hidden, head["kernel"]))), ()

        def loss(kernel):
            shared = {"kernel": Projection(kernel)}
            return chunked(fn, shared, hidden, (), chunk_size=3, overlap=0)[0]

        return jax.grad(loss)(kernel)

    cast = gradient(lambda p: p.astype(jnp.bfloat16))
    np.testing.assert_array_equal(cast, gradient(lambda p: p))
    for change in (lambda p: 2 * p, lambda p: p + jnp.sum(p), lambda p: p.kernel):
        with pytest.raises((TypeError, AttributeError), match="Taped"):
            gradient(change)


def test_a_projection_in_half_precision_is_multiplied_in_half_precision():
    """bfloat16 factors, float32 sums; the gradient has the parameter's dtype."""
    trained, hidden, teacher_head, aux = light_problem(8)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (trained, hidden))
    results = []
    for function in (in_chunks(6, light_loss), dense(light_loss)):
        (value, _), gradients = differentiated(function)(*half, teacher_head, aux)
        results.append((value, gradients))
    assert_close(*results, rtol=1e-2)
