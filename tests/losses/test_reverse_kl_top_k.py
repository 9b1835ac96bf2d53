"""Reverse KL on the most probable classes: which they are, and what the tail is."""

import jax.numpy as jnp
import numpy as np
import pytest
from losses import reference
from losses.two_distributions import assert_equals, normal, value_and_gradient

from mgsr_jax import losses


@pytest.mark.parametrize("support", ["student", "union"])
@pytest.mark.parametrize("k", [1, 3, 8])
def test_the_tail_is_one_more_class(k, support):
    student, teacher = normal((20, 9)), normal((20, 9), seed=1)
    got = losses.reverse_kl_top_k(student, teacher, top_k=k, support=support)
    assert_equals(got, reference.reverse_kl_top_k, student, teacher, k, support)
    assert jnp.all(got <= losses.reverse_kl(student, teacher) + 1e-6)


def test_more_classes_come_closer_to_the_reverse_kl():
    student, teacher = normal((20, 9)), normal((20, 9), seed=1)
    values = [
        jnp.mean(losses.reverse_kl_top_k(student, teacher, top_k=k, support=support))
        for k, support in [(1, "student"), (1, "union"), (3, "union"), (9, "student")]
    ]
    assert values == sorted(values) and values[0] < values[-1]
    for part, whole in zip(
        value_and_gradient(losses.reverse_kl_top_k, student, teacher),
        value_and_gradient(losses.reverse_kl, student, teacher),
        strict=True,
    ):  # K is 32 by default
        np.testing.assert_allclose(part, whole, rtol=1e-5, atol=1e-6)


def test_classes_in_the_tail_have_a_gradient_by_its_mass_only():
    """Renormalised over the K classes they would have none."""
    student = jnp.array([[4.0, 3.0, 1.0, 0.0]])
    teacher = jnp.array([[4.0, 3.0, -2.0, -1.0]])
    _, gradient = value_and_gradient(
        lambda s, t: losses.reverse_kl_top_k(s, t, top_k=2), student, teacher
    )
    tail = gradient[0, 2:] / jnp.exp(student[0, 2:])
    assert jnp.all(gradient[0, 2:] > 1e-3)
    np.testing.assert_allclose(tail[0], tail[1], rtol=1e-5)


def test_the_order_of_classes_does_not_matter_where_some_are_equal():
    student = jnp.array([[1.0, 2.0, 1.0, 0.0, 1.0]])
    teacher = jnp.array([[0.0, 1.0, 3.0, 2.0, 0.5]])
    order = jnp.array([4, 3, 2, 1, 0])
    for support in ("student", "union"):
        one, other = (
            losses.reverse_kl_top_k(s, t, top_k=2, support=support)
            for s, t in [(student, teacher), (student[:, order], teacher[:, order])]
        )
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_settings_that_it_cannot_work_with_are_refused():
    with pytest.raises(ValueError, match="top_k=0; expected at least 1"):
        losses.reverse_kl_top_k(normal(), normal(), top_k=0)


@pytest.mark.usefixtures("without_type_checks")
def test_an_unknown_support_is_refused():
    with pytest.raises(ValueError, match="support='teacher'; expected 'student' or"):
        losses.reverse_kl_top_k(normal(), normal(), support="teacher")
