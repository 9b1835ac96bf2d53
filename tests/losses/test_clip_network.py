"""DAC-KL's clip network: its start, its training, its inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from losses import reference
from losses.two_distributions import two_logits as logits

from mgsr_jax.losses import (
    ClipPrior,
    at_bound,
    dac_kl,
    dac_kl_fixed,
    init_clip_network,
)


def test_the_network_predicts_the_start_limits_before_training():
    student, teacher = logits()
    for seed in (0, 1):
        params = init_clip_network(jax.random.key(seed), num_candidates=8, hidden=4)
        learned = dac_kl(params, student, teacher)
        np.testing.assert_allclose(learned.lower, 0.1, atol=1e-6)
        np.testing.assert_allclose(learned.upper, 0.98, atol=1e-6)
        fixed = dac_kl_fixed((0.1, 0.98), student, teacher, num_candidates=8)
        for name, a, b in zip(learned._fields, learned, fixed, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5, err_msg=name)


def test_parameters_have_the_right_shapes_and_depend_on_the_key():
    def init(seed, **sizes):
        return init_clip_network(jax.random.key(seed), **sizes)

    shapes = jax.tree.map(jnp.shape, init(0))
    assert shapes["hidden"] == {"kernel": (1024, 128), "bias": (128,)}
    assert shapes["output"] == {"kernel": (128, 2), "bias": (2,)}
    a, b, c = (init(seed, num_candidates=6, hidden=32) for seed in (0, 0, 1))
    assert jax.tree.all(jax.tree.map(jnp.array_equal, a, b))
    assert not jnp.array_equal(a["hidden"]["kernel"], c["hidden"]["kernel"])
    # Inputs of variance 1 give activations of variance 1 for every K.
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
            out = dac_kl(params, student, teacher, width=0.1, signal=ClipPrior(0.0))
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
    assert float(jnp.std(last.lower)) > 1e-4  # limits differ by position
    assert jnp.any(params["hidden"]["kernel"] != 0)


def test_a_network_for_more_candidates_than_classes():
    student, teacher = logits((4, 16))
    params = init_clip_network(jax.random.key(0), num_candidates=40, hidden=4)
    params["output"]["kernel"] += 0.2
    got = dac_kl(params, student, teacher, vocab_size=9)
    expected = reference.dac_kl(params, student, teacher, vocab_size=9)
    for name, field, wanted in zip(got._fields, got, expected, strict=True):
        np.testing.assert_allclose(field, wanted, rtol=1e-4, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(got.candidate_mass, 1, atol=1e-6)


def test_at_bound_marks_limits_at_an_end_of_their_range():
    lower = jnp.array([0.001, 0.1, 0.499, 0.1, 0.1])
    upper = jnp.array([0.98, 0.98, 0.98, 0.501, 0.999])
    assert at_bound(lower, upper).tolist() == [1, 0, 1, 1, 1]
