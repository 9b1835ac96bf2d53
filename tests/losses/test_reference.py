"""Values and gradients of every loss against float64 numpy, also for hard inputs."""

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from losses import reference

from mgsr_jax import losses

T, V, K = 5, 12, 6
LABELS = np.array([3, 0, 7, 2, 5])
SPAN_IDS = np.array([4, 4, 4, 6, 6])
WEIGHTS = np.array([0.5, -1.0, 2.0, 1.5, 0.7])  # unequal, so that no row hides another


def normal(seed, scale=2.0):
    return np.random.default_rng(seed).normal(0, scale, (T, V)).astype(np.float32)


def no_mass_in_two_columns():
    teacher, student = normal(0), normal(1)
    teacher[:, [1, 9]] = student[:, [1, 9]] = -np.inf
    return student, teacher


def one_hot():
    return normal(1), np.where(np.arange(V) == LABELS[:, None], 1e4, 0).astype("f")


INPUTS = {
    "usual": lambda: (normal(1), normal(0)),
    "bfloat16": lambda: tuple(
        np.asarray(jnp.asarray(normal(i), jnp.bfloat16)) for i in (1, 0)
    ),
    "huge": lambda: (np.sign(normal(1)) * 1e4 + normal(3), np.sign(normal(0)) * 1e4),
    "one-hot teacher": one_hot,
    "one-hot student": lambda: one_hot()[::-1],
    "tied teacher": lambda: (normal(1), np.round(normal(0) / 2)),
    "flat teacher": lambda: (normal(1), np.zeros((T, V), np.float32)),
    "identical": lambda: (normal(0), normal(0)),
    "no mass in two columns": no_mass_in_two_columns,
}


def clip_params(num_candidates=K, seed=0):
    """A network that has moved away from its start, so that limits differ by row."""
    params = losses.init_clip_network(
        jax.random.key(seed), num_candidates=num_candidates, hidden=8
    )
    noise = np.random.default_rng(seed).normal(0, 0.4, (8, 2)).astype(np.float32)
    params["output"]["kernel"] = jnp.asarray(noise)
    return params


@pytest.fixture(params=INPUTS)
def logits(request):
    return INPUTS[request.param]()


@jax.jit(static_argnames="function")
def weighted(function, x, *rest):
    """Values of `function`, and the gradient in x of their weighted sum."""

    def scalar(x):
        values = function(x, *rest)
        return jnp.sum(jnp.asarray(WEIGHTS, jnp.float32) * values), values

    (_, values), gradient = jax.value_and_grad(scalar, has_aux=True)(x)
    return values, gradient


def check(function, expected, student, teacher, **tolerance):
    """Compare with `expected(student)`, the reference, and its numerical gradient."""
    values, gradient = weighted(function, jnp.asarray(student), jnp.asarray(teacher))
    assert values.dtype == jnp.float32
    tolerance = {"rtol": 2e-5, "atol": 2e-5} | tolerance
    np.testing.assert_allclose(values, expected(student), **tolerance)
    numeric = reference.numeric_gradient(lambda x: WEIGHTS @ expected(x), student)
    half = gradient.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.asarray(gradient, np.float64),
        numeric,
        rtol=1e-2 if half else 1e-3,
        atol=1e-4,
    )


def cross_entropy(student, teacher):
    return losses.cross_entropy(student, jnp.asarray(LABELS))


def test_cross_entropy_equals_the_reference(logits):
    student, teacher = logits
    student = np.where(np.isinf(student), 0, student)  # every label can occur
    check(cross_entropy, lambda s: reference.cross_entropy(s, LABELS), student, teacher)


def forward_kl_soft(student, teacher):
    return losses.forward_kl(student, teacher, temperature=2.0)


def test_forward_kl_equals_the_reference(logits):
    student, teacher = logits

    def expected(s):
        return reference.forward_kl(s, teacher, temperature=2.0)

    check(forward_kl_soft, expected, student, teacher)


def forward_kl_sharpened(student, teacher):
    return losses.forward_kl(student, teacher, temperature=2.0, teacher_temperature=0.7)


def test_forward_kl_to_a_sharpened_teacher_equals_the_reference(logits):
    student, teacher = logits

    def expected(s):
        # The teacher's logits are scaled so that both can be divided by 2.
        sharper = np.asarray(teacher, np.float64) * 2.0 / 0.7
        return reference.forward_kl(s, sharper, temperature=2.0)

    check(forward_kl_sharpened, expected, student, teacher)


def test_a_teacher_temperature_equal_to_the_temperature_changes_nothing():
    student, teacher = map(jnp.asarray, INPUTS["usual"]())
    same = losses.forward_kl(student, teacher, temperature=2.0, teacher_temperature=2.0)
    want = losses.forward_kl(student, teacher, temperature=2.0)
    np.testing.assert_allclose(same, want, rtol=1e-6)
    with pytest.raises(ValueError, match="teacher_temperature=0.0; expected a number"):
        losses.forward_kl(student, teacher, teacher_temperature=0.0)


def jensen_shannon(student, teacher):
    return losses.jensen_shannon(student, teacher, beta=0.1)


def skewed_reverse_kl(student, teacher):
    return losses.skewed_reverse_kl(student, teacher, alpha=0.3)


def adaptive_kl(student, teacher):
    return losses.adaptive_kl(student, teacher, head_mass=0.7)


def taid(student, teacher):
    return losses.taid(student, teacher, mix=0.4, temperature=2.0)


def logit_difference(student, teacher):
    return losses.logit_difference(student, teacher, alpha=0.3, temperature=2.0)


def reverse_kl_top_k(student, teacher):
    return losses.reverse_kl_top_k(student, teacher, top_k=4, support="union")


STOPS_A_STUDENT = (adaptive_kl, taid, losses.per_class_kl, logit_difference)


@pytest.mark.parametrize(
    "function, equation, numbers",
    [
        (losses.reverse_kl, reference.reverse_kl, ()),
        (losses.symmetric_kl, reference.symmetric_kl, ()),
        (losses.total_variation, reference.total_variation, ()),
        (jensen_shannon, reference.jensen_shannon, (0.1,)),
        (losses.skewed_forward_kl, reference.skewed_forward_kl, (0.1,)),
        (skewed_reverse_kl, reference.skewed_reverse_kl, (0.3,)),
        (losses.alpha_beta_divergence, reference.alpha_beta, (0.2, 0.7)),
        (adaptive_kl, reference.adaptive_kl, (0.7,)),
        (taid, reference.taid, (0.4,)),
        (losses.entropy_gated_kl, reference.entropy_gated_kl, (0.8,)),
        (losses.per_class_kl, reference.per_class_kl, ()),
        (logit_difference, reference.logit_difference, (0.3,)),
        (reverse_kl_top_k, reference.reverse_kl_top_k, (4, "union")),
    ],
)
def test_a_divergence_equals_the_reference(logits, function, equation, numbers):
    student, teacher = logits
    held = student if function in STOPS_A_STUDENT else None
    temperature = 2.0 if function in (taid, logit_difference) else 1.0

    def expected(s):
        return reference.divergence(
            equation, s, teacher, *numbers, held=held, temperature=temperature
        )

    at_a_corner = np.array_equal(student, teacher)
    if function is losses.total_variation and at_a_corner:  # 0 by our choice
        values, gradient = weighted(function, *map(jnp.asarray, logits))
        assert not values.any() and not gradient.any()
    else:
        check(function, expected, student, teacher)


def span_correlation(student, teacher):
    return losses.span_correlation(student, teacher, jnp.asarray(SPAN_IDS))


def test_span_correlation_equals_the_reference(logits):
    student, teacher = logits

    def expected(s):
        return reference.span_correlation(s, teacher, SPAN_IDS)

    if np.array_equal(student, teacher):  # a corner of the norm: 0 by our choice
        values, gradient = weighted(span_correlation, *map(jnp.asarray, logits))
        assert not values.any() and not gradient.any()
    else:
        check(span_correlation, expected, student, teacher)


LIMITS = (0.2, 0.9)


def dac_kl_teacher(student, teacher):
    return losses.dac_kl_fixed(
        LIMITS, student, teacher, num_candidates=K, width=0.05
    ).loss


def dac_kl_none(student, teacher):
    return losses.dac_kl_fixed(
        LIMITS, student, teacher, num_candidates=K, width=0.05, normalization="none"
    ).loss


@pytest.mark.parametrize("function", [dac_kl_teacher, dac_kl_none])
def test_dac_kl_fixed_equals_the_reference(logits, function):
    student, teacher = logits

    def expected(s):
        return reference.dac_kl(
            None,
            s,
            teacher,
            fixed=LIMITS,
            num_candidates=K,
            width=0.05,
            normalization=function.__name__.removeprefix("dac_kl_"),
        )[0]

    check(function, expected, student, teacher, rtol=1e-4)


SIGNALS = {
    "prior": losses.ClipPrior(3.0),
    "fidelity": losses.ClipFidelity(0.7),
    "unnormalised": losses.ClipUnnormalised(),
}


@pytest.mark.parametrize("name", SIGNALS)
def test_every_field_of_dac_kl_equals_the_reference(logits, name):
    student, teacher = logits
    params, signal = clip_params(), SIGNALS[name]
    arrays = jnp.asarray(student), jnp.asarray(teacher)
    got = losses.dac_kl(params, *arrays, signal=signal)
    expected = reference.dac_kl(params, student, teacher, signal=(name, *signal))
    for name, field, wanted in zip(got._fields, got, expected, strict=True):
        np.testing.assert_allclose(field, wanted, rtol=1e-4, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("name", SIGNALS)
def test_the_students_gradient_in_dac_kl_does_not_flow_through_the_limits(name):
    """It is that of the divergence to the clipped teacher, whatever the signal."""
    student, teacher = INPUTS["usual"]()
    params = clip_params()
    _, lower, upper, *_ = reference.dac_kl(params, student, teacher)

    def loss(s):
        out = losses.dac_kl(params, s, jnp.asarray(teacher), signal=SIGNALS[name])
        return jnp.sum(out.loss)

    def expected(s):
        rows = zip(zip(lower, upper, strict=True), s, teacher, strict=True)
        return sum(
            reference.dac_kl(None, x, t, fixed=limits, num_candidates=K)[0]
            for limits, x, t in rows
        )

    gradient = jax.jit(jax.grad(loss))(jnp.asarray(student))
    numeric = reference.numeric_gradient(expected, student)
    np.testing.assert_allclose(gradient, numeric, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "normalization"),
    [
        ("prior", "teacher"),
        ("prior", "none"),
        ("fidelity", "teacher"),
        ("unnormalised", "teacher"),
        ("unnormalised", "none"),
    ],
)
def test_the_clip_networks_gradient_in_dac_kl_flows_through_the_mask(
    name, normalization
):
    student, teacher = INPUTS["usual"]()
    params, signal = clip_params(), SIGNALS[name]
    settings = {"width": 0.05, "normalization": normalization}
    by_network = {"signal": (name, *signal), "by_network": True} | settings

    def loss(p):
        arrays = jnp.asarray(student), jnp.asarray(teacher)
        return jnp.sum(losses.dac_kl(p, *arrays, signal=signal, **settings).loss)

    gradient = jax.jit(jax.grad(loss))(params)
    for layer, name in [("output", "bias"), ("output", "kernel"), ("hidden", "bias")]:

        def expected(x, layer=layer, name=name):
            moved = params | {layer: params[layer] | {name: x}}
            return reference.dac_kl(moved, student, teacher, **by_network)[0].sum()

        numeric = reference.numeric_gradient(expected, params[layer][name])
        assert np.abs(numeric).max() > 1e-3
        np.testing.assert_allclose(gradient[layer][name], numeric, rtol=2e-3, atol=1e-4)


def test_the_doctests_of_dac_kl_show_the_references_numbers():
    teacher, student = np.array([[4.0, 2.0, 1.0, 0.0, -1.0]]), np.zeros((1, 5))
    start = losses.init_clip_network(jax.random.key(0), num_candidates=4)
    assert f"{reference.dac_kl(start, student, teacher)[0][0]:.3f}" == "1.076"
    fixed = reference.dac_kl(
        None, student, teacher, fixed=(0.05, 1.0), num_candidates=512
    )
    assert f"{fixed[0][0]:.3f} {fixed[3][0]:.3f}" == "1.017 0.994"


elements = st.floats(-30, 30, width=32)
pairs = hnp.arrays(np.float32, (2, 4, 7), elements=elements).map(
    lambda x: np.round(x * 1024) / 1024
)
few = hypothesis.settings(
    max_examples=40, deadline=None, database=None, derandomize=True
)


@few
@hypothesis.given(pairs)
def test_forward_kl_of_any_logits_is_not_negative(pair):
    student, teacher = pair
    got = np.asarray(losses.forward_kl(jnp.asarray(student), jnp.asarray(teacher)))
    assert (got >= -1e-6).all()
    np.testing.assert_allclose(
        got, reference.forward_kl(student, teacher), rtol=1e-4, atol=1e-5
    )


exponents = st.floats(0.05, 2.0)


@few
@hypothesis.given(pairs, st.floats(0.0, 1.0), exponents, exponents)
def test_divergences_of_any_logits_are_not_negative(pair, weight, alpha, beta):
    student, teacher = map(jnp.asarray, pair)
    cases = [
        (losses.reverse_kl, {}, reference.reverse_kl),
        (losses.symmetric_kl, {}, reference.symmetric_kl),
        (losses.total_variation, {}, reference.total_variation),
        (losses.jensen_shannon, {"beta": weight}, reference.jensen_shannon),
        (losses.skewed_forward_kl, {"alpha": weight}, reference.skewed_forward_kl),
        (losses.skewed_reverse_kl, {"alpha": weight}, reference.skewed_reverse_kl),
        (losses.taid, {"mix": weight}, reference.taid),
        (losses.per_class_kl, {}, reference.per_class_kl),
        (losses.entropy_gated_kl, {"threshold": 0.8}, reference.entropy_gated_kl),
        (losses.logit_difference, {"alpha": weight}, reference.logit_difference),
        (
            losses.alpha_beta_divergence,
            {"alpha": alpha, "beta": beta},
            reference.alpha_beta,
        ),
    ]
    for loss, numbers, equation in cases:
        got = np.asarray(loss(student, teacher, **numbers))
        expected = reference.divergence(equation, *pair, *numbers.values())
        assert (got >= -1e-6).all(), loss
        np.testing.assert_allclose(
            got, expected, rtol=1e-4, atol=1e-5, err_msg=loss.__name__
        )


@few
@hypothesis.given(pairs, st.floats(0.0, 0.5), st.floats(0.5, 1.0))
def test_dac_kl_of_any_logits_is_not_negative(pair, lower, upper):
    student, teacher = pair
    got = losses.dac_kl_fixed(
        (lower, upper), jnp.asarray(student), jnp.asarray(teacher), num_candidates=5
    )
    expected = reference.dac_kl(
        None, student, teacher, fixed=(lower, upper), num_candidates=5
    )
    assert (np.asarray(got.loss) >= -1e-5).all()
    for name, field, wanted in zip(got._fields, got, expected, strict=True):
        np.testing.assert_allclose(field, wanted, rtol=3e-4, atol=1e-4, err_msg=name)
