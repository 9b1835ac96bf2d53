"""Inputs and checks for the tests of losses between two distributions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from losses import reference

from mgsr_jax import losses

EVERY = {
    "forward_kl": losses.forward_kl,
    "reverse_kl": losses.reverse_kl,
    "symmetric_kl": losses.symmetric_kl,
    "total_variation": losses.total_variation,
    "jensen_shannon": losses.jensen_shannon,
    "skewed_forward_kl": losses.skewed_forward_kl,
    "skewed_reverse_kl": losses.skewed_reverse_kl,
    "adaptive_kl": losses.adaptive_kl,
    "alpha_beta": losses.alpha_beta_divergence,
    "taid": functools.partial(losses.taid, mix=0.5),
    "entropy_gated_kl": functools.partial(losses.entropy_gated_kl, threshold=0.0),
    "per_class_kl": losses.per_class_kl,
    "logit_difference": losses.logit_difference,
    "reverse_kl_top_k": functools.partial(losses.reverse_kl_top_k, top_k=9),
}


def normal(shape=(5, 9), seed=0, scale=2.0):
    x = np.random.default_rng(seed).normal(0, scale, shape)
    return jnp.asarray(x, jnp.float32)


def two_logits(shape=(8, 16), seed=0):
    """Logits of student and teacher."""
    both = np.random.default_rng(seed).normal(0, 2, (2, *shape))
    return tuple(jnp.asarray(x, jnp.float32) for x in both)


def assert_equals(got, equation, student, teacher, *numbers, rtol=1e-5, **options):
    """Check that `got` is `equation` as the reference computes it."""
    expected = reference.divergence(equation, student, teacher, *numbers, **options)
    np.testing.assert_allclose(got, expected, rtol=rtol, atol=1e-6)


@functools.partial(jax.jit, static_argnames="loss")
def value_and_gradient(loss, student, teacher, **numbers):
    def total(student):
        values = loss(student, teacher, **numbers)
        return jnp.sum(values), values

    (_, values), gradient = jax.value_and_grad(total, has_aux=True)(student)
    return values, gradient
