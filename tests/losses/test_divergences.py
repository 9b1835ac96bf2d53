"""KL in both directions, their mean, and total variation."""

import jax
import jax.numpy as jnp
import numpy as np
from losses import reference
from losses.two_distributions import normal

from mgsr_jax import losses
from mgsr_jax.losses import _divergences


def test_forward_kl_is_zero_only_at_equality_and_not_symmetric():
    student, teacher = normal((5, 9)), normal((5, 9), seed=1)
    np.testing.assert_allclose(losses.forward_kl(teacher, teacher), 0, atol=1e-7)
    shifted = losses.forward_kl(teacher + 3, teacher)  # the same distribution
    np.testing.assert_allclose(shifted, 0, atol=1e-6)
    assert losses.forward_kl(student, teacher).min() > 0.1
    assert not np.allclose(
        losses.forward_kl(student, teacher), losses.forward_kl(teacher, student)
    )


def test_forward_kl_casts_to_float32_before_the_softmax():
    """Near-equal models: a softmax in bfloat16 is wrong by a large factor."""
    teacher = normal((4, 8192), scale=3.0)
    student = teacher + normal((4, 8192), seed=1, scale=0.05)
    student, teacher = (x.astype(jnp.bfloat16) for x in (student, teacher))
    expected = reference.forward_kl(np.asarray(student), np.asarray(teacher))
    got = losses.forward_kl(student, teacher)
    np.testing.assert_allclose(got, expected, rtol=1e-3)
    log_p, log_q = jax.nn.log_softmax(teacher), jax.nn.log_softmax(student)
    naive = jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1).astype(jnp.float32)
    assert np.abs(np.asarray(naive) / expected - 1).max() > 0.1


def test_forward_kl_at_the_size_of_a_real_vocabulary():
    student, teacher = normal((2, 50257), seed=2), normal((2, 50257), seed=3)
    np.testing.assert_allclose(
        losses.forward_kl(student, teacher),
        reference.forward_kl(student, teacher),
        rtol=1e-5,
    )


def test_forward_kl_is_infinite_where_only_the_student_excludes_a_class():
    student = jnp.array([[0.0, -jnp.inf]])
    assert jnp.isposinf(losses.forward_kl(student, jnp.zeros((1, 2)))).all()
    both_exclude = jnp.array([[0.0, -jnp.inf]])
    assert losses.forward_kl(student, both_exclude).tolist() == [0.0]


def test_total_variation_is_flat_where_two_classes_agree_as_documented():
    """The width of the zone without gradient grows with |log p|."""
    log_p = np.float32([-1.0, -20.0])
    for log, inside, outside in zip(log_p, (1e-6, 1e-5), (5e-6, 5e-5), strict=True):
        # Two classes share the rest, so that only the first one may be in the zone.
        rest = np.log((1 - np.exp(log)) * np.array([0.3, 0.7]))
        teacher = np.array([log, *rest], np.float32)
        for distance, flat in ((inside, True), (outside, False)):
            student = jnp.asarray(teacher + np.array([distance, 0.1, -0.1], np.float32))
            student -= jax.nn.logsumexp(student)
            student = student.at[0].set(log + np.float32(distance))
            gap = _divergences.gap(jnp.asarray(teacher), student)
            assert (float(gap[0]) == 0) == flat
            assert float(gap[1]) > 0
