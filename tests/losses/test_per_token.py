"""Arguments, checks and bad inputs of all divergences of two distributions."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from losses.two_distributions import EVERY, normal, value_and_gradient

from mgsr_jax import losses

every = pytest.mark.parametrize("loss", EVERY.values(), ids=EVERY)


@every
def test_zero_at_equality_and_positive_elsewhere(loss):
    student, teacher = normal(), normal(seed=1)
    assert value_and_gradient(loss, student, teacher)[0].min() > 1e-3
    for equal in (teacher, teacher + 3):  # the same distribution
        values, gradient = value_and_gradient(loss, equal, teacher)
        np.testing.assert_allclose(values, 0, atol=1e-6)
        np.testing.assert_allclose(gradient, 0, atol=1e-6)


@every
@pytest.mark.parametrize("side", [0, 1])
def test_nan_in_logits_gives_nan_at_its_position(loss, side):
    """The loss of a run that went wrong must show it."""
    pair = [normal(), normal(seed=1)]
    pair[side] = pair[side].at[2, 3].set(jnp.nan)
    values, _ = value_and_gradient(loss, *pair)
    assert jnp.isnan(values).tolist() == [False, False, True, False, False]


@every
def test_temperature_divides_both_logits(loss):
    student, teacher = normal(), normal(seed=1)
    got, _ = value_and_gradient(loss, student, teacher, temperature=2.5)
    want, _ = value_and_gradient(loss, student / 2.5, teacher / 2.5)
    np.testing.assert_allclose(got, want, rtol=1e-5)


# (student, teacher): the value where that side excludes a class that the other has.
# Both are finite for the losses that are not listed. No gradient may be nan.
EXCLUDED = {
    "forward_kl": (math.inf, None),
    "reverse_kl": (None, math.inf),
    "symmetric_kl": (math.inf, math.inf),
    "adaptive_kl": (math.inf, math.inf),
    "entropy_gated_kl": (math.inf, math.inf),
    "per_class_kl": (math.inf, math.inf),
    "logit_difference": (None, math.inf),
    "reverse_kl_top_k": (None, math.inf),
}


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("excludes", ["student", "teacher"])
def test_a_class_that_only_one_side_excludes_has_a_finite_gradient(name, excludes):
    student, teacher = normal(), normal(seed=1)
    if excludes == "student":
        student = student.at[:, 4].set(-jnp.inf)
    else:
        teacher = teacher.at[:, 4].set(-jnp.inf)
    values, gradient = value_and_gradient(EVERY[name], student, teacher)
    assert jnp.all(jnp.isfinite(gradient))
    assert jnp.any(gradient != 0)
    wanted = EXCLUDED.get(name, (None, None))[excludes == "teacher"]
    assert jnp.all(jnp.isposinf(values) == (wanted == math.inf))


@pytest.mark.parametrize("number", [-0.1, 1.5, 2])
def test_a_number_outside_0_to_1_is_refused(number):
    pair = normal(), normal(seed=1)
    for loss, name in [
        (losses.jensen_shannon, "beta"),
        (losses.skewed_forward_kl, "alpha"),
        (losses.skewed_reverse_kl, "alpha"),
        (losses.adaptive_kl, "head_mass"),
        (losses.taid, "mix"),
        (losses.logit_difference, "alpha"),
    ]:
        with pytest.raises(ValueError, match=f"^{name}={number}; expected .* 0 to 1$"):
            loss(*pair, **{name: number})
        with pytest.raises(ValueError, match=f"^{name}={number}; expected"):
            jax.jit(functools.partial(loss, **{name: number}))(*pair)


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan")])
def test_a_temperature_that_is_not_above_zero_is_refused(temperature):
    for loss in (losses.forward_kl, losses.jensen_shannon, losses.adaptive_kl):
        with pytest.raises(ValueError, match=f"temperature={temperature}; expected"):
            loss(jnp.zeros(3), jnp.ones(3), temperature=temperature)
