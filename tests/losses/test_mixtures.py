"""Jensen-Shannon, the skewed KLs and TAID: bounds, limits, ends of their weights."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from losses import reference
from losses.two_distributions import assert_equals, normal, value_and_gradient

from mgsr_jax import losses


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jensen_shannon_equals_its_definition_and_is_bounded(beta):
    """Near-disjoint models: weights swapped in the mixture would give 1.9, not 0.3."""
    student, teacher = jnp.diag(jnp.full(4, 6.0)), jnp.diag(jnp.full(4, 6.0))[::-1]
    got = losses.jensen_shannon(student, teacher, beta=beta)
    assert_equals(got, reference.jensen_shannon, student, teacher, beta)
    bound = -beta * math.log(beta) - (1 - beta) * math.log1p(-beta)
    assert (got <= bound).all() and got.min() > 0.8 * bound
    disjoint = losses.jensen_shannon(100 * student, 100 * teacher, beta=beta)
    np.testing.assert_allclose(disjoint, bound, rtol=1e-6)

    def swapped(log_p, log_q):
        log_m = reference.log_mixture(1 - beta, log_p, log_q)
        return beta * reference.kl(log_p, log_m) + (1 - beta) * reference.kl(
            log_q, log_m
        )

    wrong = reference.divergence(swapped, student, teacher)
    assert (wrong > 1.5).all() == (beta != 0.5)


def test_jensen_shannon_tends_to_the_kls_and_is_zero_at_the_ends():
    student, teacher = normal(), normal(seed=1)
    for beta, kl in [(1e-4, losses.forward_kl), (1 - 1e-4, losses.reverse_kl)]:
        slope = losses.jensen_shannon(student, teacher, beta=beta) / 1e-4
        np.testing.assert_allclose(slope, kl(student, teacher), rtol=2e-2)
    for end in (0.0, 1.0):
        values, gradient = value_and_gradient(
            losses.jensen_shannon, student.at[:, 3].set(-jnp.inf), teacher, beta=end
        )
        np.testing.assert_allclose(values, 0, atol=1e-6)
        np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_jensen_shannon_of_swapped_models_equals_the_one_with_swapped_weights():
    student, teacher = normal(), normal(seed=1)
    np.testing.assert_allclose(
        losses.jensen_shannon(student, teacher, beta=0.2),
        losses.jensen_shannon(teacher, student, beta=0.8),
        rtol=1e-5,
    )


@pytest.mark.parametrize(
    "skewed, kl",
    [
        (losses.skewed_forward_kl, losses.forward_kl),
        (losses.skewed_reverse_kl, losses.reverse_kl),
    ],
)
def test_skewed_kl_is_the_kl_at_alpha_0_and_zero_at_alpha_1(skewed, kl):
    student, teacher = normal(scale=30.0), normal(scale=30.0, seed=1)
    for a, b in zip(
        value_and_gradient(skewed, student, teacher, alpha=0.0),
        value_and_gradient(kl, student, teacher),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    for part in value_and_gradient(skewed, student, teacher, alpha=1.0):
        np.testing.assert_allclose(part, 0, atol=1e-6)
    bounded = skewed(student, teacher, alpha=0.25)
    assert bounded.max() > 1 and (bounded <= math.log(4) + 1e-6).all()


@pytest.mark.parametrize(
    "loss, name, equation",
    [
        (losses.jensen_shannon, "beta", reference.jensen_shannon),
        (losses.skewed_forward_kl, "alpha", reference.skewed_forward_kl),
        (losses.skewed_reverse_kl, "alpha", reference.skewed_reverse_kl),
    ],
)
@pytest.mark.parametrize("weight", [0.0, 0.4, 1.0])
def test_the_gradient_of_a_mixtures_weight_is_right_at_0_and_1_too(
    loss, name, equation, weight
):
    student, teacher = normal((1, 6)), normal((1, 6), seed=1)
    got = jax.grad(lambda x: loss(student, teacher, **{name: x})[0])(weight)
    step = 1e-6
    low, high = max(weight - step, 0.0), min(weight + step, 1.0)
    low_value, high_value = (
        reference.divergence(equation, student, teacher, x)[0] for x in (low, high)
    )
    slope = (high_value - low_value) / (high - low)
    np.testing.assert_allclose(got, slope, rtol=1e-3, atol=1e-4)


def test_taid_is_zero_at_mix_0_and_forward_kl_at_mix_1():
    student, teacher = normal(), normal(seed=1)
    for part in value_and_gradient(losses.taid, student, teacher, mix=0.0):
        np.testing.assert_allclose(part, 0, atol=1e-6)
    for a, b in zip(
        value_and_gradient(losses.taid, student, teacher, mix=1.0),
        value_and_gradient(losses.forward_kl, student, teacher),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    # m has no gradient: the gradient is that of forward KL with m as the teacher.
    middle = 0.7 * student + 0.3 * teacher
    for a, b in zip(
        value_and_gradient(losses.taid, student, teacher, mix=0.3),
        value_and_gradient(losses.forward_kl, student, middle),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mix", [0.0, 1.0])
def test_taid_at_mix_0_and_1_with_a_class_that_the_teacher_excludes(mix):
    student, teacher = normal(), normal(seed=1)
    cut = teacher.at[:, 2].set(-jnp.inf)
    values, gradient = value_and_gradient(losses.taid, student, cut, mix=mix)
    assert_equals(values, reference.taid, student, cut, mix)
    assert jnp.all(jnp.isfinite(gradient))
    slope = jax.grad(lambda x: losses.taid(student, cut, mix=x).sum())(mix)
    assert jnp.isfinite(slope)
