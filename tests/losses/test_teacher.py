"""A teacher of K classes and a tail, against the equations in float64 numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from losses import reference

from mgsr_jax import losses
from mgsr_jax.losses import TopKTeacher, forward_kl_top_k, held_mass, top_k_teacher

B, T, V = 3, 4, 9
WHERE = jnp.array([[1, 1, 0, 1], [0, 1, 1, 1], [0, 0, 0, 0]], bool)


def logits(seed=0, dtype=jnp.float32, scale=2.0):
    both = np.random.default_rng(seed).normal(0, scale, (2, B, T, V))
    return tuple(jnp.asarray(x, dtype) for x in both)


def kl_with_tail(student, teacher, k, vocab_size=None):
    """KL at every position over the K most probable classes and one for all others."""
    student, teacher = (np.asarray(x, np.float64) for x in (student, teacher))
    out = np.zeros(student.shape[:-1])
    for at in np.ndindex(out.shape):
        log_q, log_p = (
            reference.log_softmax(x[at], vocab_size) for x in (student, teacher)
        )
        order = np.argsort(-log_p, kind="stable")
        listed, rest = order[:k], order[k:vocab_size]
        p, q = (
            np.append(np.exp(x[listed]), np.sum(np.exp(x[rest])))
            for x in (log_p, log_q)
        )
        some = p > 1e-9
        out[at] = np.sum(p[some] * (np.log(p[some]) - np.log(q[some])))
    return out


def from_dense(student, teacher, *, k, where=None, vocab_size=None):
    top_k = top_k_teacher(teacher, k, vocab_size=vocab_size)
    return forward_kl_top_k(student, top_k, where=where, vocab_size=vocab_size)


@pytest.mark.parametrize("k", [1, 3, V])
def test_the_tail_is_one_more_class(k):
    student, teacher = logits()
    values = from_dense(student, teacher, k=k)
    want = kl_with_tail(student, teacher, k)
    np.testing.assert_allclose(values, want, rtol=2e-5, atol=1e-6)
    assert np.all(want <= losses.forward_kl(student, teacher) + 1e-6)


@pytest.mark.parametrize("k", [1, 4])
def test_the_gradient_equals_the_equations(k):
    student, teacher = (x[0, :2] for x in logits(1))
    got = jax.grad(lambda s: jnp.sum(from_dense(s, teacher, k=k)))(student)
    want = reference.numeric_gradient(
        lambda s: np.sum(kl_with_tail(s, teacher, k)), student
    )
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
    assert np.all(np.any(np.asarray(got) != 0, axis=-1))


def test_classes_outside_of_the_k_have_a_gradient():
    """Renormalised over K they would have none, whatever mass they hold."""
    teacher = jnp.array([5.0, 4.0, 0.0, 0.0])
    student = jnp.array([5.0, 4.0, 3.0, 3.0])
    gradient = jax.grad(from_dense)(student, teacher, k=2)
    assert jnp.all(gradient[2:] > 1e-3)


def test_masked_positions_are_exactly_zero_whatever_their_logits():
    student, teacher = logits(2)
    top_k = top_k_teacher(teacher, 3)

    @jax.jit
    def run(student, top_k):
        def total(student):
            values = forward_kl_top_k(student, top_k, where=WHERE)
            return jnp.sum(values), values

        return jax.grad(total, has_aux=True)(student)

    gradient, values = run(student, top_k)
    spoilt = TopKTeacher(
        *(
            jnp.where(WHERE[..., None], x, bad)
            for x, bad in ((top_k.logits, jnp.nan), (top_k.indices, -7))
        ),
        jnp.where(WHERE, top_k.logsumexp, jnp.inf),
    )
    again = run(jnp.where(WHERE[..., None], student, jnp.nan), spoilt)
    np.testing.assert_array_equal(again[0], gradient)
    np.testing.assert_array_equal(again[1], values)
    assert not np.any(values[~WHERE]) and not np.any(gradient[~WHERE])
    assert np.all(values[WHERE] > 0)


def test_padded_columns_have_no_mass():
    student, teacher = logits(3)
    spoilt = (x.at[..., 6:].set(jnp.nan) for x in (student, teacher))
    got = from_dense(*spoilt, k=3, vocab_size=6)
    want = from_dense(student[..., :6], teacher[..., :6], k=3)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    narrow = forward_kl_top_k(
        student[..., :7], top_k_teacher(teacher, 3, vocab_size=6), vocab_size=6
    )
    np.testing.assert_allclose(narrow, want, rtol=1e-6)


@pytest.mark.parametrize("index", [V, V + 90, -1])
def test_a_class_that_the_student_lacks_has_infinite_loss(index):
    """A column of a wider teacher must not be read as the student's last one."""
    student, _ = logits(4)
    top_k = TopKTeacher(
        jnp.zeros((B, T, 2)),
        jnp.full((B, T, 2), index).at[..., 0].set(1),
        jnp.full((B, T), jnp.log(2.5)),
    )
    assert np.all(forward_kl_top_k(student, top_k) == jnp.inf)
    dac = losses.dac_kl_fixed((0.0, 1.0), student, top_k, num_candidates=2)
    assert np.all(dac.loss == jnp.inf)


def test_losses_of_hard_teachers_are_finite():
    student, teacher = logits(5)
    cases = {
        "one-hot": jnp.where(jnp.arange(V) == 2, 1e4, jnp.zeros((B, T, V))),
        "flat": jnp.zeros_like(teacher),
        "huge": jnp.sign(teacher) * 1e4,
        "-inf": teacher.at[..., 1:].set(-jnp.inf),
        "identical": student,
    }
    run = jax.jit(
        jax.value_and_grad(lambda s, t: jnp.sum(from_dense(s, t, k=3))),
    )
    for name, case in cases.items():
        value, gradient = run(student, case)
        assert np.isfinite(value) and value > -1e-5, name
        assert np.all(np.isfinite(gradient)), name
    assert abs(run(student, student)[0]) < 1e-5


def test_half_precision_teachers_give_float32_losses():
    student, teacher = logits(6, jnp.bfloat16)
    top_k = top_k_teacher(teacher, 3)
    values = forward_kl_top_k(student, top_k)
    assert values.dtype == top_k.logits.dtype == jnp.float32
    half = top_k._replace(logits=top_k.logits.astype(jnp.float16))
    np.testing.assert_allclose(forward_kl_top_k(student, half), values, rtol=2e-2)


def test_the_held_mass_is_the_sum_over_the_k_classes():
    _, teacher = logits(7)
    p = np.sort(np.asarray(jax.nn.softmax(teacher)), axis=-1)
    held = held_mass(top_k_teacher(teacher, 2), where=WHERE)
    np.testing.assert_allclose(
        held, np.where(WHERE, p[..., -2:].sum(-1), 0.0), rtol=1e-5
    )


@pytest.mark.usefixtures("without_type_checks")
def test_a_teacher_of_other_positions_is_refused():
    student, teacher = logits(8)
    top_k = top_k_teacher(teacher[:, 1:], 2)
    for loss in (
        forward_kl_top_k,
        functools.partial(losses.dac_kl_fixed, (0.1, 0.9)),
    ):
        with pytest.raises(ValueError, match="differ in positions"):
            loss(student, top_k)
    with pytest.raises(ValueError, match="k=0; expected at least 1"):
        top_k_teacher(teacher, 0)
