"""DAC-KL's own promises: when it is zero, what its network starts from and learns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from mgsr_jax import losses
from mgsr_jax.losses import dac_kl, dac_kl_fixed, init_clip_network

LIMITS = (0.2, 0.9)


def logits(shape=(8, 16), seed=0):
    both = np.random.default_rng(seed).normal(0, 2, (2, *shape))
    return tuple(jnp.asarray(x, jnp.float32) for x in both)


def clipped(teacher, limits, num_candidates):
    """log p_hat over the vocabulary of one position; -inf outside the candidates."""
    log_p, _, log_rest = reference.candidates(teacher, teacher, num_candidates, None)
    order = np.argsort(-np.asarray(teacher), kind="stable")[:num_candidates]
    above, log_w = 0.0, np.zeros(len(order))
    for k in range(1, len(order)):
        share = np.exp(log_p[k] - log_rest)
        above += share
        c = 1 - (above - share / 2)
        log_w[k] = reference.log_sigmoid((c - limits[0]) / 0.01)
        log_w[k] += reference.log_sigmoid((limits[1] - c) / 0.01)
    full = np.full(len(teacher), -np.inf)
    full[order] = reference.log_softmax(log_w + log_p)
    return full


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
    # KL(p_hat || p) is the entropy-weighted log of the kept mass; here it is exact.
    assert (np.asarray(at_p.loss) > 1e-3).all()


def test_the_network_starts_at_its_limits_everywhere():
    student, teacher = logits()
    for seed in (0, 1):
        params = init_clip_network(jax.random.key(seed), num_candidates=8, hidden=4)
        learned = dac_kl(params, student, teacher)
        np.testing.assert_allclose(learned.lower, 0.1, atol=1e-6)
        np.testing.assert_allclose(learned.upper, 0.98, atol=1e-6)
        fixed = dac_kl_fixed((0.1, 0.98), student, teacher, num_candidates=8)
        for name, a, b in zip(learned._fields, learned, fixed, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5, err_msg=name)


def test_the_networks_shapes_and_its_key():
    def init(seed, **sizes):
        return init_clip_network(jax.random.key(seed), **sizes)

    shapes = jax.tree.map(jnp.shape, init(0))
    assert shapes["hidden"] == {"kernel": (1024, 128), "bias": (128,)}
    assert shapes["output"] == {"kernel": (128, 2), "bias": (2,)}
    a, b, c = (init(seed, num_candidates=6, hidden=32) for seed in (0, 0, 1))
    assert jax.tree.all(jax.tree.map(jnp.array_equal, a, b))
    assert not jnp.array_equal(a["hidden"]["kernel"], c["hidden"]["kernel"])
    # Unit-size inputs give unit-size activations, whatever K is.
    assert 0.8 < 12 * float(jnp.var(a["hidden"]["kernel"])) < 1.2
    for sizes in ({"num_candidates": 0}, {"hidden": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            init(0, **sizes)


def test_a_few_steps_train_the_network():
    student, teacher = logits()
    params = init_clip_network(jax.random.key(0), num_candidates=8, hidden=16)

    @jax.jit
    def step(params):
        def loss(params):
            out = dac_kl(params, student, teacher, width=0.1, prior_weight=0.0)
            return jnp.mean(out.loss), out

        (value, out), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        moved = jax.tree.map(lambda p, g: p - 0.3 * g, params, gradient)
        return moved, value, out

    history = []
    for _ in range(12):
        params, value, out = step(params)
        history.append((float(value), out))
    (before, first), (after, last) = history[0], history[-1]
    assert after < before - 1e-2
    assert float(jnp.abs(last.lower - first.lower).min()) > 1e-3
    assert float(jnp.std(last.lower)) > 1e-4  # it tells positions apart
    assert jnp.any(params["hidden"]["kernel"] != 0)


def test_the_prior_is_part_of_the_loss_where_scored():
    student, teacher = logits()
    params = init_clip_network(jax.random.key(0), num_candidates=8, hidden=4)
    params["output"]["bias"] += 1.0
    where = jnp.arange(8) < 5
    out = dac_kl(params, student, teacher, where=where, prior_weight=7.0)
    bare = dac_kl(params, student, teacher, where=where, prior_weight=0.0)
    prior = 7 * ((out.lower - 0.1) ** 2 + (out.upper - 0.98) ** 2)
    assert float(prior[0]) > 0.05
    np.testing.assert_allclose(
        out.loss - bare.loss, jnp.where(where, prior, 0), rtol=1e-4, atol=1e-5
    )


def test_masked_positions_reach_neither_the_record_nor_the_network():
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

    found, out = gradient(params, student.at[1].set(jnp.nan), teacher, where)
    for name, field in zip(out._fields, out, strict=True):
        assert not jnp.any(field[~where]), name
        assert jnp.all(field[where] > 0), name
    alone, _ = gradient(params, student[where], teacher[where], jnp.ones(3, bool))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        found,
        alone,
    )
    nowhere, _ = gradient(params, student, teacher, jnp.zeros(8, bool))
    assert not any(jnp.any(leaf) for leaf in jax.tree.leaves(nowhere))


def test_a_network_for_more_candidates_than_tokens():
    student, teacher = logits((4, 16))
    params = init_clip_network(jax.random.key(0), num_candidates=40, hidden=4)
    params["output"]["kernel"] += 0.2
    got = dac_kl(params, student, teacher, vocab_size=9)
    expected = reference.dac_kl(params, student, teacher, vocab_size=9)
    for name, field, wanted in zip(got._fields, got, expected, strict=True):
        np.testing.assert_allclose(field, wanted, rtol=1e-4, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(got.candidate_mass, 1, atol=1e-6)


def test_classes_that_cannot_occur_weigh_nothing():
    student, teacher = logits((4, 16))
    teacher = teacher.at[:, 3:].set(-jnp.inf)
    out = dac_kl_fixed((0.0, 1.0), student, teacher, num_candidates=8, width=0.1)
    assert (np.asarray(out.kept_classes) <= 3).all()
    np.testing.assert_allclose(out.candidate_mass, 1, atol=1e-6)
    alone = teacher.at[:, 1:].set(-jnp.inf)
    out = dac_kl_fixed((0.4, 0.6), student, alone, num_candidates=8)
    np.testing.assert_allclose(out.kept_classes, 1)
    expected = reference.cross_entropy(student, np.zeros(4, int))
    np.testing.assert_allclose(out.loss, expected, rtol=1e-5)


def test_limits_may_differ_by_position():
    student, teacher = logits()
    lower = jnp.linspace(0.0, 0.4, 8)
    out = dac_kl_fixed((lower, 0.95), student, teacher, num_candidates=8)
    for i in (0, 7):
        alone = dac_kl_fixed((lower[i], 0.95), student[i], teacher[i], num_candidates=8)
        np.testing.assert_allclose(out.loss[i], alone.loss, rtol=1e-5)
    assert out.kept_mass[0] != out.kept_mass[7]
    np.testing.assert_array_equal(out.lower, lower)


def test_what_normalization_means():
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


def test_settings_that_mean_nothing_are_refused(without_type_checks):
    student, teacher = logits()
    with pytest.raises(ValueError, match="normalization='student'; expected 'teacher'"):
        dac_kl_fixed(LIMITS, student, teacher, normalization="student")
    with pytest.raises(ValueError, match="num_candidates=0"):
        dac_kl_fixed(LIMITS, student, teacher, num_candidates=0)
