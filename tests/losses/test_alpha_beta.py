"""The alpha-beta divergence: its special cases, exponents, and precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from losses import reference
from losses.two_distributions import assert_equals, normal, value_and_gradient

from mgsr_jax import losses

# (alpha, beta, equation, tolerance): limits are evaluated near their point, not at it.
LIMITS = {
    "forward KL": (1.0, 1e-3, reference.kl, 1e-2),
    "reverse KL": (1e-3, 1.0, reference.reverse_kl, 1e-2),
    "squared distance": (
        1.0,
        1.0,
        lambda p, q: sum((np.exp(p) - np.exp(q)) ** 2) / 2,
        1e-5,
    ),
    "Hellinger": (
        0.5,
        0.5,
        lambda p, q: 2 * sum((np.exp(p / 2) - np.exp(q / 2)) ** 2),
        1e-5,
    ),
    "Amari": (
        0.3,
        0.7,
        lambda p, q: (1 - sum(np.exp(0.3 * p + 0.7 * q))) / 0.21,
        1e-5,
    ),
}


@pytest.mark.parametrize("alpha, beta, equation, rtol", LIMITS.values(), ids=LIMITS)
def test_alpha_beta_contains_other_divergences(alpha, beta, equation, rtol):
    student, teacher = normal(), normal(seed=1)
    got = losses.alpha_beta_divergence(student, teacher, alpha=alpha, beta=beta)
    assert_equals(got, equation, student, teacher, rtol=rtol)


@pytest.mark.parametrize(
    "alpha, beta", [(1.5, -0.5), (-0.5, 1.5), (0.4, -0.9), (-0.3, -0.4), (0.01, 0.02)]
)
def test_alpha_beta_with_exponents_of_any_sign(alpha, beta):
    student, teacher = normal(), normal(seed=1)
    got = losses.alpha_beta_divergence(student, teacher, alpha=alpha, beta=beta)
    assert_equals(got, reference.alpha_beta, student, teacher, alpha, beta)
    far = jnp.where(jnp.arange(9) < 3, student, -1e4 + student)
    values, gradient = value_and_gradient(
        losses.alpha_beta_divergence, far, teacher, alpha=alpha, beta=beta
    )
    assert jnp.all(values > 0) and jnp.all(jnp.isfinite(gradient))
    assert jnp.all(jnp.isposinf(values) == (beta < 0 or alpha + beta < 0))


def test_alpha_beta_of_near_equal_models_does_not_cancel():
    """The sum of the equation differs from 1 by 1e-7: float32 would round it away."""
    teacher = normal((4, 500))
    student = teacher + normal((4, 500), seed=1, scale=1e-3)
    got = losses.alpha_beta_divergence(student, teacher)
    expected = reference.divergence(reference.alpha_beta, student, teacher, 0.2, 0.7)
    np.testing.assert_allclose(got, expected, rtol=2e-3)
    p, q = jax.nn.softmax(teacher), jax.nn.softmax(student)
    terms = p**0.2 * q**0.7 - 2 / 9 * p**0.9 - 7 / 9 * q**0.9
    assert np.abs(-jnp.sum(terms, -1) / 0.14 / expected - 1).max() > 0.1


@pytest.mark.parametrize("alpha, beta", [(0, 1.0), (1.0, 0.0), (0.5, -0.5)])
def test_exponents_of_zero_are_refused(alpha, beta):
    with pytest.raises(ValueError, match="expected neither to be 0, nor their sum"):
        losses.alpha_beta_divergence(normal(), normal(), alpha=alpha, beta=beta)
