"""KL in both directions, their mean, and total variation."""

import jax
import jax.numpy as jnp
import numpy as np
from losses import reference
from losses.two_distributions import normal

from mgsr_jax import losses


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
