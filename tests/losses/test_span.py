"""Span pairs and span correlation."""

import jax
import jax.numpy as jnp
import numpy as np
from losses import reference
from losses.two_distributions import normal

from mgsr_jax import losses


def test_span_pairs_are_neighbours_in_one_span():
    ids = jnp.array([[3, 3, 3, 7, 7, -1, -1, 7], [-2, -2, 0, 0, 1, 2, 2, 2]])
    expected = [[1, 1, 0, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 1, 1, 0]]
    assert losses.span_pairs(ids).astype(int).tolist() == expected
    where = jnp.ones_like(ids, bool).at[0, 1].set(False).at[1, 7].set(False)
    expected = [[0, 0, 0, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 1, 0, 0]]
    assert losses.span_pairs(ids, where).astype(int).tolist() == expected
    assert losses.span_pairs(ids[:, :1]).tolist() == [[False], [False]]


def test_only_tokens_in_pairs_have_a_value_or_a_gradient():
    student, teacher = normal((8, 6)), normal((8, 6), seed=1)
    ids = jnp.array([3, 3, 9, -1, -1, 5, 5, 5])
    pairs = losses.span_pairs(ids)
    assert pairs.astype(int).tolist() == [1, 0, 0, 0, 0, 1, 1, 0]

    @jax.jit
    def gradient(student):
        def total(student):
            values = losses.span_correlation(student, teacher, ids)
            return values.sum(), values

        return jax.grad(total, has_aux=True)(student)

    clean, values = gradient(student)
    np.testing.assert_array_equal(values > 0, pairs)
    # Scored, but in no pair: not even nan reaches a value or a gradient.
    spoilt, spoilt_values = gradient(student.at[2:5].set(jnp.nan))
    np.testing.assert_array_equal(values, spoilt_values)
    np.testing.assert_array_equal(clean, spoilt)
    assert not jnp.any(spoilt[2:5]) and jnp.all(jnp.any(spoilt[5:] != 0, -1))


def test_near_equal_models_have_a_span_correlation_above_zero():
    """The rounding floor removes nothing that a float32 student can resolve."""
    teacher, ids = normal((4, 50)), jnp.zeros(4, int)
    student = teacher + normal((4, 50), seed=1, scale=1e-4)
    expected = reference.span_correlation(student, teacher, ids)
    assert expected[:3].max() < 1e-4
    got = losses.span_correlation(student, teacher, ids)
    np.testing.assert_allclose(got, expected, rtol=1e-2)
    np.testing.assert_array_equal(losses.span_correlation(teacher, teacher, ids), 0)
