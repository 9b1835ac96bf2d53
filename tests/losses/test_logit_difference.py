"""Logit differences of all pairs of classes, without a loop over pairs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from losses import reference
from losses.two_distributions import assert_equals, normal, value_and_gradient

from mgsr_jax import losses


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_sum_over_classes_equals_the_sum_over_pairs(alpha):
    student, teacher = normal((5, 9)), normal((5, 9), seed=1)
    got = losses.logit_difference(student, teacher, alpha=alpha)
    assert_equals(got, reference.logit_difference, student, teacher, alpha)


def test_the_gradient_is_that_of_the_published_code():
    """q (d - sum q d), with raw logits: a constant in them changes nothing."""
    student, teacher = normal() + 5, normal(seed=1) - 3
    _, gradient = value_and_gradient(losses.logit_difference, student, teacher)
    q, d = jax.nn.softmax(student), student - teacher
    want = q * (d - jnp.sum(q * d, -1, keepdims=True))
    np.testing.assert_allclose(gradient, want, rtol=1e-4, atol=1e-6)


def test_an_error_between_two_improbable_classes_counts_under_its_own_weights():
    """Their KL is nearly 0; their logits are 8 apart."""
    teacher = jnp.array([20.0, 0.0, 0.0])
    student = jnp.array([20.0, 4.0, -4.0])
    assert losses.forward_kl(student, teacher) < 1e-5
    q = np.exp(reference.log_softmax(student))
    wanted = np.sum(q * (np.array([0.0, 4.0, -4.0]) ** 2)) / 2
    np.testing.assert_allclose(
        losses.logit_difference(student, teacher), wanted, rtol=1e-3
    )


def test_large_logits_cost_no_precision():
    student, teacher = normal(scale=1.0), normal(seed=1, scale=1.0)
    # Multiples of 1/256, so that 10^4 more is exact.
    student, teacher = (jnp.round(x * 256) / 256 for x in (student, teacher))
    plain = losses.logit_difference(student, teacher)
    shifted = losses.logit_difference(student + 1e4, teacher - 1e4)
    np.testing.assert_allclose(shifted, plain, rtol=1e-5)
