"""Weights of tokens: their values, masks and shards, and that none has a gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from losses import reference
from losses.two_distributions import normal

from mgsr_jax import losses

B, T, V = 3, 6, 9
WHERE = jnp.array([[1, 1, 1, 1, 1, 0], [0, 1, 1, 0, 1, 1], [0, 0, 0, 0, 0, 0]], bool)


def logits(seed=0):
    scale = jnp.array([[[0.3], [1.0], [4.0]] * 2])  # certain and uncertain positions
    return normal((B, T, V), seed) * scale


def entropies(x, vocab_size=None):
    at = reference.positions(
        lambda row: reference.entropy(reference.log_softmax(row, vocab_size)),
        np.float64(x),
    )
    return np.reshape(at, x.shape[:-1])


def student_entropy(student, teacher, **kwargs):
    return losses.student_entropy_weights(student, **kwargs)


def teacher_entropy(student, teacher, **kwargs):
    return losses.teacher_entropy_weights(teacher, **kwargs)


def student_entropy_by_hand(student, teacher, floor, vocab_size=None):
    return np.where(entropies(student, vocab_size) > 0.8, 1.0, floor)


def teacher_entropy_by_hand(student, teacher, floor, vocab_size=None):
    return np.where(entropies(teacher, vocab_size) <= 0.8, 1.0, floor)


def acceptance_by_hand(student, teacher, floor, vocab_size=None):
    """Sort the teacher's classes and keep 5."""
    student, teacher = (np.asarray(x)[..., :vocab_size] for x in (student, teacher))
    best = np.argsort(-teacher, axis=-1)[..., :5]
    accepted = np.any(best == np.argmax(student, axis=-1)[..., None], axis=-1)
    return np.where(accepted, 1.0, floor)


LOCAL = {
    "student_entropy": (student_entropy, student_entropy_by_hand),
    "teacher_entropy": (teacher_entropy, teacher_entropy_by_hand),
    "acceptance": (losses.acceptance_weights, acceptance_by_hand),
}
every = pytest.mark.parametrize("weights, by_hand", LOCAL.values(), ids=LOCAL)


def test_the_entropy_equals_the_reference():
    x = logits().at[..., 2].set(-jnp.inf)
    got = losses.entropy(x, where=WHERE, vocab_size=7)
    np.testing.assert_allclose(
        got, np.where(WHERE, entropies(x, 7), 0), rtol=1e-5, atol=1e-6
    )
    half = losses.entropy(x.astype(jnp.bfloat16))
    assert half.dtype == jnp.float32


@every
def test_weights_equal_the_reference(weights, by_hand):
    student, teacher = logits(), logits(1)
    want = by_hand(student, teacher, 0.25)
    assert {1.0, 0.25} == set(want.ravel())
    got = weights(student, teacher, floor=0.25)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, want)


@every
def test_masked_positions_and_padding_columns_are_not_read(weights, by_hand):
    student, teacher = logits(2), logits(3)
    want = np.where(WHERE, by_hand(student, teacher, 0.25, vocab_size=7), 0)
    bad = jnp.where(WHERE[..., None] & (jnp.arange(V) < 7)[None, None], 0, jnp.nan)
    got = weights(student + bad, teacher + bad, where=WHERE, floor=0.25, vocab_size=7)
    np.testing.assert_array_equal(got, want)


@every
def test_weights_have_no_gradient(weights, by_hand):
    def weighted(student, teacher):
        values = losses.forward_kl(student, teacher)
        return jnp.sum(weights(student, teacher, floor=0.25) * values)

    def constant(student, teacher):
        values = losses.forward_kl(student, teacher)
        return jnp.sum(by_hand(logits(), logits(1), 0.25) * values)

    got, want = (jax.grad(f, (0, 1))(logits(), logits(1)) for f in (weighted, constant))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, want)


@every
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_split_vocabulary_gives_the_same_weights(weights, by_hand, kind):
    student, teacher = (jnp.pad(logits(s), ((0, 0), (0, 0), (0, 3))) for s in (4, 5))
    want = weights(student, teacher, where=WHERE, vocab_size=V)
    mesh = jax.make_mesh((4,), ("tensor",), axis_types=(kind,))
    axis = "tensor" if kind == AxisType.Auto else None
    with jax.set_mesh(mesh):
        place = NamedSharding(mesh, P(None, None, "tensor"))
        both = jax.device_put((student, teacher), place)
        got = jax.jit(
            lambda s, t: weights(s, t, where=WHERE, vocab_size=V, vocab_axis=axis)
        )(*both)
    np.testing.assert_array_equal(got, want)


def test_a_floor_outside_0_to_1_is_refused():
    for weights, _ in LOCAL.values():
        with pytest.raises(ValueError, match="^floor=1.5; expected .* 0 to 1$"):
            weights(logits(), logits(), floor=1.5)


def test_acceptance_counts_the_teachers_classes_above_the_students_choice():
    teacher = jnp.array([[4.0, 3.0, 2.0, 1.0]] * 4)
    student = 9 * jnp.eye(4)
    for k in range(1, 5):
        got = losses.acceptance_weights(student, teacher, top_k=k, floor=0.0)
        assert got.tolist() == [1.0] * k + [0.0] * (4 - k)


def discrepancies_by_hand(d, where, gain):
    out = np.zeros(d.shape)
    for b in range(len(d)):
        total, before = sum(d[b][where[b]]), 0.0
        for t in np.flatnonzero(where[b]):
            out[b, t] = 1 + gain * (1 - (before / total if total else 0))
            before += d[b, t]
    return out


def test_discrepancy_weights_equal_the_reference():
    d = np.abs(np.random.default_rng(0).normal(size=(B, T)))
    spoilt = jnp.where(WHERE, jnp.asarray(d, jnp.float32), jnp.nan)
    got = losses.discrepancy_weights(spoilt, where=WHERE, gain=0.7)
    want = discrepancies_by_hand(d, np.asarray(WHERE), 0.7)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert got[0, 0] == jnp.float32(1.7) and jnp.all(jnp.diff(got[0, :5]) < 0)
    jitted = jax.jit(lambda d, g: losses.discrepancy_weights(d, where=WHERE, gain=g))
    np.testing.assert_array_equal(jitted(spoilt, 0.7), got)


def test_equal_models_and_excluded_tokens_give_finite_discrepancy_weights():
    assert losses.discrepancy_weights(jnp.zeros(3)).tolist() == [1.5, 1.5, 1.5]
    excluded = jnp.array([0.3, jnp.inf, 0.2, jnp.inf])
    assert losses.discrepancy_weights(excluded).tolist() == [1.5, 1.5, 1.0, 1.0]
    gradient = jax.grad(lambda d: jnp.sum(losses.discrepancy_weights(d)))(jnp.ones(3))
    assert not jnp.any(gradient)
