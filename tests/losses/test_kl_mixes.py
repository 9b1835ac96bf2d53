"""The gate of the entropy-gated KL, and the weights of the KL per class."""

import jax.numpy as jnp
import numpy as np
from losses import reference
from losses.two_distributions import assert_equals, normal, value_and_gradient

from mgsr_jax import losses


def test_forward_kl_is_added_only_where_the_teacher_is_uncertain():
    student = normal()
    teacher = normal(seed=1) * jnp.array([0.1, 4.0, 1.0, 4.0, 0.1])[:, None]
    entropy = reference.divergence(lambda p, q: reference.entropy(p), student, teacher)
    uncertain = entropy > 0.8
    assert 1 < uncertain.sum() < 5
    values, gradient = value_and_gradient(losses.entropy_gated_kl, student, teacher)
    reverse, of_reverse = value_and_gradient(losses.reverse_kl, student, teacher)
    forward, of_forward = value_and_gradient(losses.forward_kl, student, teacher)
    np.testing.assert_allclose(values, reverse + uncertain * forward, rtol=1e-6)
    want = of_reverse + uncertain[:, None] * of_forward
    np.testing.assert_allclose(gradient, want, rtol=1e-5, atol=1e-6)


def test_a_gate_that_is_never_or_always_open_gives_one_kl_or_both():
    student, teacher = normal(), normal(seed=1)
    for threshold, other in [(1e9, 0.0), (-1.0, losses.forward_kl(student, teacher))]:
        got = losses.entropy_gated_kl(student, teacher, threshold=threshold)
        np.testing.assert_allclose(
            got, losses.reverse_kl(student, teacher) + other, rtol=1e-6
        )


def test_the_temperature_counts_in_the_entropy():
    """The teacher is certain at temperature 1, and uncertain at 4."""
    student, teacher = normal(), 3 * normal(seed=1)
    got = losses.entropy_gated_kl(student, teacher, temperature=4.0)
    assert_equals(
        got, reference.entropy_gated_kl, student, teacher, 0.8, temperature=4.0
    )
    reverse = losses.reverse_kl(student, teacher, temperature=4.0)
    assert jnp.any(got > reverse + 0.01)


def test_a_closed_gate_hides_an_infinite_forward_kl():
    student = normal().at[:, 4].set(-jnp.inf)
    values, gradient = value_and_gradient(
        losses.entropy_gated_kl, student, normal(seed=1), threshold=1e9
    )
    assert jnp.all(jnp.isfinite(values)) and jnp.all(jnp.isfinite(gradient))


def test_the_kl_per_class_has_the_value_of_two_symmetric_kls_and_another_gradient():
    student, teacher = normal(), normal(seed=1)
    values, gradient = value_and_gradient(losses.per_class_kl, student, teacher)
    symmetric, of_symmetric = value_and_gradient(losses.symmetric_kl, student, teacher)
    np.testing.assert_allclose(values, 2 * symmetric, rtol=1e-5)
    assert jnp.abs(gradient - 2 * of_symmetric).max() > 0.05
