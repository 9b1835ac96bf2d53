"""What only some of the divergences promise: bounds, limits, ends of their numbers."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.sharding import AxisType, PartitionSpec

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
}
WITH_LOOPS_AND_NUMBERS = [losses.adaptive_kl, losses.jensen_shannon]
every = pytest.mark.parametrize("loss", EVERY.values(), ids=EVERY)


def normal(shape=(5, 9), seed=0, scale=2.0):
    x = np.random.default_rng(seed).normal(0, scale, shape)
    return jnp.asarray(x, jnp.float32)


def expect(got, equation, student, teacher, *numbers, rtol=1e-5, **options):
    """`got` is `equation`, by the reference."""
    expected = reference.divergence(equation, student, teacher, *numbers, **options)
    np.testing.assert_allclose(got, expected, rtol=rtol, atol=1e-6)


@functools.partial(jax.jit, static_argnames="loss")
def value_and_gradient(loss, student, teacher, **numbers):
    def total(student):
        values = loss(student, teacher, **numbers)
        return jnp.sum(values), values

    (_, values), gradient = jax.value_and_grad(total, has_aux=True)(student)
    return values, gradient


@every
def test_zero_at_equality_and_positive_elsewhere(loss):
    student, teacher = normal(), normal(seed=1)
    assert loss(student, teacher).min() > 1e-3
    for equal in (teacher, teacher + 3):  # the same distribution
        values, gradient = value_and_gradient(loss, equal, teacher)
        np.testing.assert_allclose(values, 0, atol=1e-6)
        np.testing.assert_allclose(gradient, 0, atol=1e-6)


@every
@pytest.mark.parametrize("side", [0, 1])
def test_nan_is_not_hidden(loss, side):
    """A run that has gone wrong must be seen in its loss."""
    pair = [normal(), normal(seed=1)]
    pair[side] = pair[side].at[2, 3].set(jnp.nan)
    assert jnp.isnan(loss(*pair)).tolist() == [False, False, True, False, False]


@every
def test_temperature_divides_both_logits(loss):
    student, teacher = normal(), normal(seed=1)
    got = loss(student, teacher, temperature=2.5)
    np.testing.assert_allclose(got, loss(student / 2.5, teacher / 2.5), rtol=1e-5)


@pytest.mark.parametrize(
    "loss, kind",
    [(loss, AxisType.Auto) for loss in EVERY.values()]
    + [(loss, AxisType.Explicit) for loss in WITH_LOOPS_AND_NUMBERS],
)
def test_a_split_vocabulary_changes_nothing(loss, kind):
    student, teacher = normal((4, 3, 16)), normal((4, 3, 16), seed=1)
    where = jnp.arange(12).reshape(4, 3) % 5 > 0

    def total(student, teacher, where, **split):
        values = loss(student, teacher, where=where, vocab_size=13, **split)
        return jnp.sum(jnp.square(values)), values

    expected = jax.jit(jax.value_and_grad(total, has_aux=True))(student, teacher, where)
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(kind,) * 2)
    with jax.set_mesh(mesh):
        split = {"vocab_axis": "tensor"} if kind == AxisType.Auto else {}
        place = PartitionSpec("data", None, "tensor")
        student, teacher = (jax.device_put(x, place) for x in (student, teacher))
        where = jax.device_put(where, PartitionSpec("data", None))
        gradient = jax.value_and_grad(functools.partial(total, **split), has_aux=True)
        got = jax.jit(gradient)(student, teacher, where)
    for a, b in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


# Where one side excludes what the other holds: infinite, but never nan backwards.
SIDES = {
    "forward_kl": (math.inf, None),
    "reverse_kl": (None, math.inf),
    "symmetric_kl": (math.inf, math.inf),
    "adaptive_kl": (math.inf, math.inf),
    "skewed_reverse_kl": (None, None),
    "skewed_forward_kl": (None, None),
}


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("excludes", ["student", "teacher"])
def test_a_class_that_one_side_excludes(name, excludes):
    student, teacher = normal(), normal(seed=1)
    if excludes == "student":
        student = student.at[:, 4].set(-jnp.inf)
    else:
        teacher = teacher.at[:, 4].set(-jnp.inf)
    values, gradient = value_and_gradient(EVERY[name], student, teacher)
    assert jnp.all(jnp.isfinite(gradient))
    assert jnp.any(gradient != 0)
    wanted = SIDES.get(name, (None, None))[excludes == "teacher"]
    assert jnp.all(jnp.isposinf(values) == (wanted == math.inf))


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jensen_shannon_is_the_definition_and_bounded(beta):
    """Near-disjoint models: weights swapped in the mixture would give 1.9, not 0.3."""
    student, teacher = jnp.diag(jnp.full(4, 6.0)), jnp.diag(jnp.full(4, 6.0))[::-1]
    got = losses.jensen_shannon(student, teacher, beta=beta)
    expect(got, reference.jensen_shannon, student, teacher, beta)
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


def test_jensen_shannon_of_swapped_models_is_that_of_the_other_weight():
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
def test_skewed_kls_at_the_ends_of_alpha(skewed, kl):
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
def test_the_weight_of_a_mixture_has_the_true_gradient_at_its_ends_too(
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


def test_taid_moves_from_the_student_to_the_teacher():
    student, teacher = normal(), normal(seed=1)
    for part in value_and_gradient(losses.taid, student, teacher, mix=0.0):
        np.testing.assert_allclose(part, 0, atol=1e-6)
    for a, b in zip(
        value_and_gradient(losses.taid, student, teacher, mix=1.0),
        value_and_gradient(losses.forward_kl, student, teacher),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    # m holds still: the gradient is that of forward KL from m as a teacher.
    middle = 0.7 * student + 0.3 * teacher
    for a, b in zip(
        value_and_gradient(losses.taid, student, teacher, mix=0.3),
        value_and_gradient(losses.forward_kl, student, middle),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mix", [0.0, 1.0])
def test_taid_at_the_ends_with_classes_that_one_side_excludes(mix):
    student, teacher = normal(), normal(seed=1)
    cut = teacher.at[:, 2].set(-jnp.inf)
    values, gradient = value_and_gradient(losses.taid, student, cut, mix=mix)
    expect(values, reference.taid, student, cut, mix)
    assert jnp.all(jnp.isfinite(gradient))
    slope = jax.grad(lambda x: losses.taid(student, cut, mix=x).sum())(mix)
    assert jnp.isfinite(slope)


# (alpha, beta, equation, tolerance): limits are taken near, not at, their point.
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
def test_alpha_beta_contains_others(alpha, beta, equation, rtol):
    student, teacher = normal(), normal(seed=1)
    got = losses.alpha_beta_divergence(student, teacher, alpha=alpha, beta=beta)
    expect(got, equation, student, teacher, rtol=rtol)


@pytest.mark.parametrize(
    "alpha, beta", [(1.5, -0.5), (-0.5, 1.5), (0.4, -0.9), (-0.3, -0.4), (0.01, 0.02)]
)
def test_alpha_beta_with_exponents_of_any_sign(alpha, beta):
    student, teacher = normal(), normal(seed=1)
    got = losses.alpha_beta_divergence(student, teacher, alpha=alpha, beta=beta)
    expect(got, reference.alpha_beta, student, teacher, alpha, beta)
    far = jnp.where(jnp.arange(9) < 3, student, -1e4 + student)
    values, gradient = value_and_gradient(
        losses.alpha_beta_divergence, far, teacher, alpha=alpha, beta=beta
    )
    assert jnp.all(values > 0) and jnp.all(jnp.isfinite(gradient))
    assert jnp.all(jnp.isposinf(values) == (beta < 0 or alpha + beta < 0))


def test_alpha_beta_of_near_equal_models_does_not_cancel():
    """A sum near 1 that differs from 1 by 1e-7: nothing is left of it in float32."""
    teacher = normal((4, 500))
    student = teacher + normal((4, 500), seed=1, scale=1e-3)
    got = losses.alpha_beta_divergence(student, teacher)
    expected = reference.divergence(reference.alpha_beta, student, teacher, 0.2, 0.7)
    np.testing.assert_allclose(got, expected, rtol=2e-3)
    p, q = jax.nn.softmax(teacher), jax.nn.softmax(student)
    terms = p**0.2 * q**0.7 - 2 / 9 * p**0.9 - 7 / 9 * q**0.9
    assert np.abs(-jnp.sum(terms, -1) / 0.14 / expected - 1).max() > 0.1


HEADS = {
    # teacher's probabilities, head_mass, the columns of the head
    "one": ([0.6, 0.3, 0.1], 0.5, [0]),
    "two": ([0.3, 0.1, 0.4, 0.2], 0.5, [0, 2]),
    "ties at the threshold": ([0.2, 0.35, 0.2, 0.2, 0.05], 0.5, [0, 1, 2, 3]),
    "flat": ([0.25] * 4, 0.5, [0, 1, 2, 3]),
    "nearly ties": ([0.5 + 3e-7, 0.5 - 3e-7], 0.4, [0]),
    "nothing": ([0.9, 0.1], 0.0, []),
    "nothing, of a certain teacher": ([1.0, 1e-80], 0.0, []),
    # The last one is 0 in float32; its logit is not -inf.
    "everything that can occur": ([0.7, 0.3 - 1e-12, 1e-12, 1e-80], 1.0, [0, 1, 2]),
}


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
def test_adaptive_kls_head_is_that_of_a_sort(head_mass):
    """37 columns, a few values: ties everywhere, also where vector loops have ended."""
    rng = np.random.default_rng(0)
    teacher = jnp.asarray(rng.integers(0, 7, (60, 37)), jnp.float32) / 3
    student = normal((60, 37))
    got = losses.adaptive_kl(student, teacher, head_mass=head_mass)
    expect(got, reference.adaptive_kl, student, teacher, head_mass)


def test_adaptive_kl_at_the_ends_of_head_mass():
    student, teacher = normal(), normal(seed=1)
    for head_mass, kl in [(0.0, losses.reverse_kl), (1.0, losses.forward_kl)]:
        got = losses.adaptive_kl(student, teacher, head_mass=head_mass)
        np.testing.assert_allclose(got, kl(student, teacher), rtol=1e-5)


@pytest.mark.parametrize("number", [-0.1, 1.5, 2])
def test_numbers_out_of_range_are_refused_where_they_are_known(number):
    pair = normal(), normal(seed=1)
    for loss, name in [
        (losses.jensen_shannon, "beta"),
        (losses.skewed_forward_kl, "alpha"),
        (losses.skewed_reverse_kl, "alpha"),
        (losses.adaptive_kl, "head_mass"),
        (losses.taid, "mix"),
    ]:
        with pytest.raises(ValueError, match=f"^{name}={number}; expected .* 0 to 1$"):
            loss(*pair, **{name: number})
        with pytest.raises(ValueError, match=f"^{name}={number}; expected"):
            jax.jit(functools.partial(loss, **{name: number}))(*pair)


@pytest.mark.parametrize("alpha, beta", [(0, 1.0), (1.0, 0.0), (0.5, -0.5)])
def test_exponents_of_zero_are_refused(alpha, beta):
    with pytest.raises(ValueError, match="expected neither to be 0, nor their sum"):
        losses.alpha_beta_divergence(normal(), normal(), alpha=alpha, beta=beta)


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan")])
def test_a_temperature_is_above_zero(temperature):
    for loss in (losses.forward_kl, losses.jensen_shannon, losses.adaptive_kl):
        with pytest.raises(ValueError, match=f"temperature={temperature}; expected"):
            loss(jnp.zeros(3), jnp.ones(3), temperature=temperature)
