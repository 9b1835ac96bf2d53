"""What only one of cross-entropy, forward KL, span correlation or the sums promises."""

import jax
import jax.numpy as jnp
import numpy as np
import reference

from mgsr_jax import losses


def normal(shape, seed=0, scale=2.0):
    x = np.random.default_rng(seed).normal(0, scale, shape)
    return jnp.asarray(x, jnp.float32)


def test_a_perfect_next_token_predictor_has_no_loss():
    labels = jnp.array([2, 0, 1])
    logits = 50.0 * jax.nn.one_hot(labels, 4)
    np.testing.assert_allclose(losses.cross_entropy(logits, labels), 0, atol=1e-6)
    # The same logits against the token itself, one step earlier, would not do.
    assert losses.cross_entropy(logits, jnp.roll(labels, 1)).min() > 40


def test_a_label_that_is_no_token_has_infinite_loss_unless_masked():
    logits, labels = normal((4, 6)), jnp.array([-100, 6, 5, 2])
    values = losses.cross_entropy(logits, labels, vocab_size=5)
    assert jnp.isposinf(values).tolist() == [True, True, True, False]
    where = jnp.array([False, False, False, True])
    masked = losses.cross_entropy(logits, labels, vocab_size=5, where=where)
    np.testing.assert_array_equal(masked, jnp.where(where, values, 0))


def test_forward_kl_is_zero_only_at_equality_and_not_symmetric():
    student, teacher = normal((5, 9)), normal((5, 9), seed=1)
    np.testing.assert_allclose(losses.forward_kl(teacher, teacher), 0, atol=1e-7)
    shifted = losses.forward_kl(teacher + 3, teacher)  # the same distribution
    np.testing.assert_allclose(shifted, 0, atol=1e-6)
    assert losses.forward_kl(student, teacher).min() > 0.1
    assert not np.allclose(
        losses.forward_kl(student, teacher), losses.forward_kl(teacher, student)
    )


def test_forward_kl_upcasts_before_the_softmax():
    """Near-equal models: a softmax in bfloat16 is off by a large factor."""
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


def test_a_student_that_excludes_the_teachers_class_is_infinitely_far():
    student = jnp.array([[0.0, -jnp.inf]])
    assert jnp.isposinf(losses.forward_kl(student, jnp.zeros((1, 2)))).all()
    only = jnp.array([[0.0, -jnp.inf]])
    assert losses.forward_kl(student, only).tolist() == [0.0]


def test_span_pairs():
    ids = jnp.array([[3, 3, 3, 7, 7, -1, -1, 7], [-2, -2, 0, 0, 1, 2, 2, 2]])
    expected = [[1, 1, 0, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 1, 1, 0]]
    assert losses.span_pairs(ids).astype(int).tolist() == expected
    where = jnp.ones_like(ids, bool).at[0, 1].set(False).at[1, 7].set(False)
    expected = [[0, 0, 0, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 1, 0, 0]]
    assert losses.span_pairs(ids, where).astype(int).tolist() == expected
    assert losses.span_pairs(ids[:, :1]).tolist() == [[False], [False]]


def test_span_correlation_reads_pairs_alone():
    student, teacher = normal((8, 6)), normal((8, 6), seed=1)
    ids = jnp.array([3, 3, 9, -1, -1, 5, 5, 5])
    values = losses.span_correlation(student, teacher, ids)
    pairs = losses.span_pairs(ids)
    assert pairs.astype(int).tolist() == [1, 0, 0, 0, 0, 1, 1, 0]
    np.testing.assert_array_equal(values > 0, pairs)
    # Scored, but in no pair: neither value nor gradient, not even from nan.
    spoilt = student.at[2:5].set(jnp.nan)
    total = jax.jit(
        jax.value_and_grad(lambda s: losses.span_correlation(s, teacher, ids).sum())
    )
    clean, spoilt = total(student), total(spoilt)
    assert clean[0] == spoilt[0]
    np.testing.assert_array_equal(clean[1], spoilt[1])
    assert not jnp.any(spoilt[1][2:5]) and jnp.all(jnp.any(spoilt[1][5:] != 0, -1))


def test_span_correlation_of_near_equal_models_is_not_taken_for_zero():
    """The rounding floor cuts nothing that a float32 student can resolve."""
    teacher, ids = normal((4, 50)), jnp.zeros(4, int)
    student = teacher + normal((4, 50), seed=1, scale=1e-4)
    expected = reference.span_correlation(student, teacher, ids)
    assert expected[:3].max() < 1e-4
    got = losses.span_correlation(student, teacher, ids)
    np.testing.assert_allclose(got, expected, rtol=1e-2)
    np.testing.assert_array_equal(losses.span_correlation(teacher, teacher, ids), 0)


def test_sums_add_and_divide_once():
    values, where = jnp.array([1.0, 2.0, jnp.nan, 5.0]), jnp.array([1, 1, 0, 1], bool)
    whole = losses.masked_sum(values, where)
    assert whole == (8.0, 3.0) and losses.masked_mean(values, where) == 8 / 3
    halves = [losses.masked_sum(values[i : i + 2], where[i : i + 2]) for i in (0, 2)]
    assert jax.tree.map(jnp.add, *halves) == whole
    half = losses.masked_sum(jnp.full(2048, 1.001, jnp.bfloat16), jnp.ones(2048, bool))
    assert half.total.dtype == half.count.dtype == jnp.float32
    assert half.count == 2048  # bfloat16 would stop at 256


def test_sums_give_masked_values_no_gradient():
    values, where = jnp.array([1.0, jnp.nan]), jnp.array([True, False])
    gradient = jax.grad(losses.masked_mean)(values, where)
    assert gradient.tolist() == [1.0, 0.0]
    nowhere = jnp.zeros(2, bool)
    assert losses.masked_mean(values, nowhere) == 0
    assert jax.grad(losses.masked_mean)(values, nowhere).tolist() == [0.0, 0.0]
