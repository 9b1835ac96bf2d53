"""Adaptive KL: which classes are the head."""

import jax.numpy as jnp
import numpy as np
import pytest
from losses import reference
from losses.two_distributions import assert_equals, normal

from mgsr_jax import losses

HEADS = {
    # teacher's probabilities, head_mass, the columns of the head
    "one": ([0.6, 0.3, 0.1], 0.5, [0]),
    "two": ([0.3, 0.1, 0.4, 0.2], 0.5, [0, 2]),
    "ties at the threshold": ([0.2, 0.35, 0.2, 0.2, 0.05], 0.5, [0, 1, 2, 3]),
    "flat": ([0.25] * 4, 0.5, [0, 1, 2, 3]),
    "nearly ties": ([0.5 + 3e-7, 0.5 - 3e-7], 0.4, [0]),
    "empty": ([0.9, 0.1], 0.0, []),
    "empty, with a teacher that is certain": ([1.0, 1e-80], 0.0, []),
    # The last probability is 0 in float32; its logit is not -inf.
    "every class that can occur": ([0.7, 0.3 - 1e-12, 1e-12, 1e-80], 1.0, [0, 1, 2]),
}


@pytest.mark.slow
@pytest.mark.parametrize("probs, head_mass, head", HEADS.values(), ids=HEADS)
def test_adaptive_kl_finds_the_head(probs, head_mass, head):
    student = jnp.array([[0.1, 2.0, -0.7, 1.1, 0.4][: len(probs)]])
    teacher = jnp.asarray(np.log([probs]), jnp.float32)
    got = losses.adaptive_kl(student, teacher, head_mass=head_mass)
    p, q = np.array(probs), np.exp(reference.log_softmax(student[0]))
    gap = np.abs(p - q)
    forward = losses.forward_kl(student, teacher)
    reverse = losses.reverse_kl(student, teacher)
    assert forward != reverse and jnp.isfinite(reverse)
    weight = gap[head].sum() / gap.sum()
    np.testing.assert_allclose(
        got, weight * forward + (1 - weight) * reverse, rtol=1e-5
    )
    in_order = jnp.argsort(student[0])  # the same classes in another order
    again = losses.adaptive_kl(
        student[:, in_order], teacher[:, in_order], head_mass=head_mass
    )
    np.testing.assert_allclose(got, again, rtol=1e-5)


@pytest.mark.parametrize("head_mass", [0.05, 0.5, 0.95])
def test_adaptive_kls_head_equals_the_one_from_a_sort(head_mass):
    """37 columns of few values: ties everywhere, also in the rest of a vector loop."""
    rng = np.random.default_rng(0)
    teacher = jnp.asarray(rng.integers(0, 7, (60, 37)), jnp.float32) / 3
    student = normal((60, 37))
    got = losses.adaptive_kl(student, teacher, head_mass=head_mass)
    assert_equals(got, reference.adaptive_kl, student, teacher, head_mass)


def test_adaptive_kl_is_a_plain_kl_at_head_mass_0_and_1():
    student, teacher = normal(), normal(seed=1)
    for head_mass, kl in [(0.0, losses.reverse_kl), (1.0, losses.forward_kl)]:
        got = losses.adaptive_kl(student, teacher, head_mass=head_mass)
        np.testing.assert_allclose(got, kl(student, teacher), rtol=1e-5)
