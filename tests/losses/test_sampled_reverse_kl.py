"""The estimate from a sampled token: its expectation, and how noisy it is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from losses import reference
from losses.two_distributions import normal

from mgsr_jax import losses

ROWS, V = 6, 9
TOKENS = jnp.array([3, 0, 8, 1, 3, 5])


@functools.partial(jax.jit, static_argnames="temperature")
def run(student, teacher, tokens, baseline=1.0, temperature=1.0):
    def total(student):
        values = losses.sampled_reverse_kl(
            student, teacher, tokens, baseline=baseline, temperature=temperature
        )
        return jnp.sum(values), values

    gradient, values = jax.grad(total, has_aux=True)(student)
    return values, gradient


@pytest.mark.parametrize("baseline", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_value_and_gradient_equal_the_reference(baseline, temperature):
    student, teacher = normal((ROWS, V)), normal((ROWS, V), seed=1)
    values, gradient = run(student, teacher, TOKENS, baseline, temperature)
    for row, token in enumerate(TOKENS.tolist()):
        log_p, held = (
            reference.log_softmax(np.float64(x[row]) / temperature)
            for x in (teacher, student)
        )
        np.testing.assert_allclose(values[row], held[token] - log_p[token], rtol=1e-5)

        def surrogate(x, log_p=log_p, held=held, token=token):
            log_q = reference.log_softmax(x / temperature)
            return reference.sampled_reverse_kl(log_p, log_q, token, baseline, held)

        want = reference.numeric_gradient(surrogate, student[row])
        np.testing.assert_allclose(gradient[row], want, rtol=1e-3, atol=1e-5)


def of_every_token(classes, baseline):
    """q, values, gradients for each token that may be sampled, and the whole KL's."""
    student, teacher = normal((1, classes)), normal((1, classes), seed=1)
    shape = (classes, classes)
    every = jnp.broadcast_to(student, shape), jnp.broadcast_to(teacher, shape)
    values, gradients = run(*every, jnp.arange(classes), baseline)
    whole = jax.value_and_grad(lambda s: losses.reverse_kl(s, teacher)[0])(student)
    return jax.nn.softmax(student[0]), values, gradients, whole


@pytest.mark.parametrize("baseline", [0.0, 0.5, 1.0])
def test_its_expectation_is_the_reverse_kl_and_its_gradient(baseline):
    q, values, gradients, (kl, gradient) = of_every_token(V, baseline)
    np.testing.assert_allclose(q @ values, kl, rtol=1e-5)
    np.testing.assert_allclose(q @ gradients, gradient[0], rtol=1e-4, atol=1e-6)


def test_the_baseline_reduces_the_variance():
    def variance(baseline):
        q, _, gradients, (_, gradient) = of_every_token(50, baseline)
        return q @ jnp.sum(jnp.square(gradients - gradient), -1)

    assert variance(1.0) < 0.5 * variance(0.0)


def test_equal_models_have_no_gradient_and_no_value():
    teacher = normal((ROWS, V))
    values, gradient = run(teacher + 3, teacher, TOKENS)
    np.testing.assert_allclose(values, 0, atol=1e-6)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_an_excluded_token_is_infinite_and_another_excluded_class_is_not():
    student, teacher = normal((ROWS, V)), normal((ROWS, V), seed=1)
    cut = teacher.at[:, 3].set(-jnp.inf)
    values, gradient = run(student, cut, TOKENS)
    assert jnp.isposinf(values).tolist() == (TOKENS == 3).tolist()
    assert jnp.all(jnp.isfinite(gradient))
    moved = jnp.any(gradient != 0, axis=-1)
    assert moved.tolist() == (TOKENS != 3).tolist()
    values, gradient = run(student, teacher, jnp.array([V, -1, 0, 1, 2, 3]))
    assert jnp.isposinf(values).tolist() == [True, True, *[False] * 4]
    assert not jnp.any(gradient[:2])


def test_a_baseline_outside_0_to_1_and_a_bad_temperature_are_refused():
    pair = normal((ROWS, V)), normal((ROWS, V), seed=1)
    with pytest.raises(ValueError, match="^baseline=1.5; expected .* 0 to 1$"):
        losses.sampled_reverse_kl(*pair, TOKENS, baseline=1.5)
    with pytest.raises(ValueError, match="temperature=0; expected"):
        losses.sampled_reverse_kl(*pair, TOKENS, temperature=0)
