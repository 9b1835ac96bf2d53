"""DAC-KL: when it is zero, its prior, its mask, its settings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from losses import reference
from losses.two_distributions import two_logits as logits

from mgsr_jax import losses
from mgsr_jax.losses import (
    ClipFidelity,
    ClipPrior,
    dac_kl,
    dac_kl_fixed,
    init_clip_network,
)

LIMITS = (0.2, 0.9)


def clipped(teacher, limits, num_candidates):
    """log p_hat over the vocabulary of one position; -inf outside the candidates."""
    log_p, _, _, level, is_target = reference.candidates(
        teacher, teacher, num_candidates, None
    )
    log_w = reference.log_mask(log_p, level, is_target, *limits, 0.01)
    order = np.argsort(-np.asarray(teacher), kind="stable")[:num_candidates]
    full = np.full(len(teacher), -np.inf)
    full[order] = reference.log_softmax(log_w + log_p)
    return full


@pytest.mark.slow
@pytest.mark.parametrize("num_candidates", [16, 5])
def test_zero_at_the_clipped_teacher_and_positive_at_the_teacher(num_candidates):
    _, teacher = logits()
    p_hat = np.stack([clipped(t, LIMITS, num_candidates) for t in np.asarray(teacher)])

    def loss(student):
        out = dac_kl_fixed(LIMITS, student, teacher, num_candidates=num_candidates)
        return jnp.sum(out.loss), out

    gradient, at_p_hat = jax.jit(jax.grad(loss, has_aux=True))(
        jnp.asarray(p_hat, jnp.float32)
    )
    np.testing.assert_allclose(at_p_hat.loss, 0, atol=2e-5)
    np.testing.assert_allclose(gradient, 0, atol=2e-5)
    at_p = dac_kl_fixed(LIMITS, teacher, teacher, num_candidates=num_candidates)
    assert (np.asarray(at_p.loss) > 1e-3).all()


def test_the_prior_is_added_to_the_loss_of_scored_positions():
    student, teacher = logits()
    params = init_clip_network(jax.random.key(0), num_candidates=8, hidden=4)
    params["output"]["bias"] += 1.0
    where = jnp.arange(8) < 5
    out = dac_kl(params, student, teacher, where=where, signal=ClipPrior(7.0))
    bare = dac_kl(params, student, teacher, where=where, signal=ClipPrior(0.0))
    prior = 7 * ((out.lower - 0.1) ** 2 + (out.upper - 0.98) ** 2)
    assert float(prior[0]) > 0.05
    np.testing.assert_allclose(
        out.loss - bare.loss, jnp.where(where, prior, 0), rtol=1e-4, atol=1e-5
    )


def test_masked_positions_change_neither_the_fields_nor_the_networks_gradient():
    student, teacher = logits()
    params = init_clip_network(jax.random.key(0), num_candidates=8, hidden=4)
    params["output"]["kernel"] += 0.2
    where = jnp.arange(8) % 3 == 0

    @jax.jit
    def gradient(params, student, teacher, where):
        def loss(params):
            out = dac_kl(params, student, teacher, where=where)
            return jnp.sum(out.loss), out

        return jax.grad(loss, has_aux=True)(params)

    masked, out = gradient(params, student.at[1].set(jnp.nan), teacher, where)
    for name, field in zip(out._fields, out, strict=True):
        assert not jnp.any(field[~where]), name
        assert jnp.all(field[where] > 0), name
    scored, _ = gradient(params, student[where], teacher[where], jnp.ones(3, bool))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        masked,
        scored,
    )
    nowhere, _ = gradient(params, student, teacher, jnp.zeros(8, bool))
    assert not any(jnp.any(leaf) for leaf in jax.tree.leaves(nowhere))


def test_classes_that_cannot_occur_have_weight_zero():
    student, teacher = logits((4, 16))
    teacher = teacher.at[:, 3:].set(-jnp.inf)
    out = dac_kl_fixed((0.0, 1.0), student, teacher, num_candidates=8, width=0.1)
    assert (np.asarray(out.kept_classes) <= 3).all()
    np.testing.assert_allclose(out.candidate_mass, 1, atol=1e-6)
    certain = teacher.at[:, 1:].set(-jnp.inf)
    out = dac_kl_fixed((0.4, 0.6), student, certain, num_candidates=8)
    np.testing.assert_allclose(out.kept_classes, 1)
    expected = reference.cross_entropy(student, np.zeros(4, int))
    np.testing.assert_allclose(out.loss, expected, rtol=1e-5)


def test_classes_whose_probability_underflows_are_not_counted():
    student, teacher = logits((4, 16))
    teacher = teacher.at[:, 3:].add(-200.0)  # e^-200 is 0 in float32
    out = dac_kl_fixed((0.0, 1.0), student, teacher, num_candidates=8, width=0.1)
    without = teacher.at[:, 3:].set(-jnp.inf)
    want = dac_kl_fixed((0.0, 1.0), student, without, num_candidates=8, width=0.1)
    np.testing.assert_allclose(out.kept_classes, want.kept_classes, rtol=1e-5)
    np.testing.assert_allclose(out.loss, want.loss, rtol=1e-5)


@pytest.mark.parametrize("num_candidates", [5, 16, 20])
@pytest.mark.parametrize("tied", ["bfloat16", "integers", "signed zeros"])
def test_the_order_of_the_vocabulary_changes_nothing(tied, num_candidates):
    """Sixteen-bit logits tie: among the candidates, at the last and at the target."""
    student, teacher = logits((6, 40))
    teacher = {
        "bfloat16": (teacher / 4 + 20).astype(jnp.bfloat16),
        "integers": jnp.round(teacher),
        "signed zeros": jnp.where(teacher > 0, 0.0, -0.0),
    }[tied]
    _, counts = np.unique(np.asarray(teacher, np.float32)[0], return_counts=True)
    assert counts.max() > 2
    params = init_clip_network(
        jax.random.key(0), num_candidates=num_candidates, hidden=4
    )
    params["output"]["kernel"] += 0.5

    @jax.jit
    def run(params, student, teacher):
        def loss(params, student):
            out = dac_kl(params, student, teacher, signal=ClipFidelity())
            return jnp.sum(out.loss), out

        gradients, out = jax.grad(loss, (0, 1), has_aux=True)(params, student)
        return out, gradients

    out, (of_params, of_student) = run(params, student, teacher)
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(40)
        got, (moved, got_student) = run(params, student[:, order], teacher[:, order])
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
            (got, got_student),
            (out, of_student[:, order]),
        )
        # Divided by the width, 0.01, a level's rounding is a hundred times as large.
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
            moved,
            of_params,
        )


def test_limits_may_differ_by_position():
    student, teacher = logits()
    lower = jnp.linspace(0.0, 0.4, 8)
    out = dac_kl_fixed((lower, 0.95), student, teacher, num_candidates=8)
    for i in (0, 7):
        one = dac_kl_fixed((lower[i], 0.95), student[i], teacher[i], num_candidates=8)
        np.testing.assert_allclose(out.loss[i], one.loss, rtol=1e-5)
    assert out.kept_mass[0] != out.kept_mass[7]
    np.testing.assert_array_equal(out.lower, lower)


def test_without_normalization_the_divergence_can_be_negative():
    student, teacher = logits()
    wide = {"num_candidates": 16, "width": 1e-3}
    # Nothing clipped: both forms are the forward KL of the whole distribution.
    full = losses.forward_kl(student, teacher)
    for normalization in ("teacher", "none"):
        out = dac_kl_fixed(
            (-1.0, 2.0), student, teacher, normalization=normalization, **wide
        )
        np.testing.assert_allclose(out.loss, full, rtol=1e-5, atol=1e-6)
    # Clipped, the unnormalised form has no lower bound.
    sharper = jnp.where(teacher == teacher.max(-1, keepdims=True), 20.0, teacher)
    none = dac_kl_fixed((0.49, 0.5), sharper, teacher, normalization="none", **wide)
    kept = dac_kl_fixed((0.49, 0.5), sharper, teacher, **wide)
    assert float(none.loss.min()) < -1e-2 and float(kept.loss.min()) > -1e-6


def test_unknown_settings_are_refused(without_type_checks):
    student, teacher = logits()
    with pytest.raises(ValueError, match="normalization='student'; expected 'teacher'"):
        dac_kl_fixed(LIMITS, student, teacher, normalization="student")
    with pytest.raises(ValueError, match="num_candidates=0"):
        dac_kl_fixed(LIMITS, student, teacher, num_candidates=0)
    params = init_clip_network(jax.random.key(0), num_candidates=8, hidden=4)
    with pytest.raises(ValueError, match="'none' with ClipFidelity.*expected 'teach"):
        dac_kl(params, student, teacher, normalization="none", signal=ClipFidelity())
