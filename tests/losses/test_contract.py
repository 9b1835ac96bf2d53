"""Promises that every loss keeps, whatever it computes."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from losses.every_loss import (
    CLIP,
    EVERY,
    EVERY_PATH,
    LABELS,
    NEED_THE_TEACHERS_SUPPORT,
    PAIRED,
    SPAN_IDS,
    WHERE,
    B,
    T,
    cross_entropy,
    sampled_reverse_kl,
    span_correlation,
)

from mgsr_jax import losses
from mgsr_jax.losses._per_token import jitted_per_token

V = 10


def name_of(loss):
    return loss.__name__


every_loss = pytest.mark.parametrize("loss", EVERY, ids=name_of)
every_path = pytest.mark.parametrize("loss", EVERY_PATH, ids=name_of)
every_paired_path = pytest.mark.parametrize(
    "loss", [loss for loss in EVERY_PATH if loss is not cross_entropy], ids=name_of
)
every_pair = pytest.mark.parametrize("loss", PAIRED, ids=name_of)


def logits(seed=0, shape=(B, T, V), dtype=jnp.float32):
    both = np.random.default_rng(seed).normal(0, 2, (2, *shape))
    return tuple(jnp.asarray(x, dtype) for x in both)


@jax.jit(static_argnames=("loss", "vocab_size"))
def _gradients(loss, student, teacher, labels, span_ids, where, vocab_size):
    def total(student, teacher):
        values = loss(
            student, teacher, labels, span_ids, where=where, vocab_size=vocab_size
        )
        return jnp.sum(values), values

    (_, values), both = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(
        student, teacher
    )
    return values, *both


def gradients(loss, student, teacher, where=None, vocab_size=None, row=None):
    """(values, gradient of their sum for the student, for the teacher).

    `row` gives labels and spans of one row to logits without a batch axis.
    """
    index = row if row is not None else slice(student.shape[0])
    length = student.shape[-2]
    labels, span_ids = LABELS[index, ..., :length], SPAN_IDS[index, ..., :length]
    return _gradients(loss, student, teacher, labels, span_ids, where, vocab_size)


@every_loss
def test_masked_positions_are_exactly_zero_whatever_their_logits(loss):
    student, teacher = logits()
    clean, clean_gradient, _ = gradients(loss, student, teacher, WHERE)
    assert jnp.any(clean != 0) and jnp.any(clean_gradient != 0)
    for garbage in (jnp.nan, jnp.inf, -jnp.inf):
        spoilt = (jnp.where(WHERE[..., None], x, garbage) for x in (student, teacher))
        values, gradient, of_teacher = gradients(loss, *spoilt, WHERE)
        np.testing.assert_array_equal(values, clean)
        np.testing.assert_array_equal(gradient, clean_gradient)
        assert not jnp.any(values[~WHERE]) and not jnp.any(gradient[~WHERE])
        assert not jnp.any(of_teacher)


@every_loss
def test_only_logits_of_scored_positions_change_a_value(loss):
    student, teacher = logits(1)
    plain, *_ = gradients(loss, student, teacher, WHERE)
    rolled = jnp.roll(student, 1, axis=-1)
    unscored = jnp.where(WHERE[..., None], student, rolled)
    np.testing.assert_array_equal(gradients(loss, unscored, teacher, WHERE)[0], plain)
    for t in range(2):
        scored = student.at[0, t].set(rolled[0, t])
        assert jnp.any(gradients(loss, scored, teacher, WHERE)[0][0] != plain[0])


@pytest.mark.slow
@every_loss
def test_a_mask_equals_a_slice(loss):
    student, teacher = logits(2)
    keep = 4
    where = jnp.broadcast_to(jnp.arange(T) < keep, (B, T))
    masked, gradient, _ = gradients(loss, student, teacher, where)
    for b in range(B):
        row = student[b, :keep], teacher[b, :keep]
        sliced, of_slice, _ = gradients(loss, *row, row=b)
        np.testing.assert_allclose(jnp.sum(masked[b]), jnp.sum(sliced), rtol=1e-5)
        np.testing.assert_allclose(gradient[b, :keep], of_slice, rtol=1e-5, atol=1e-6)


@every_loss
def test_vocab_size_equals_a_slice(loss):
    student, teacher = logits(3)
    spoilt = (x.at[..., 7:].set(jnp.nan) for x in (student, teacher))
    masked, gradient, _ = gradients(loss, *spoilt, vocab_size=7)
    sliced, of_slice, _ = gradients(loss, student[..., :7], teacher[..., :7])
    np.testing.assert_allclose(masked, sliced, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(gradient[..., :7], of_slice, rtol=1e-5, atol=1e-7)
    assert not jnp.any(gradient[..., 7:])


@pytest.mark.slow
@every_paired_path
@pytest.mark.parametrize("columns", [(8, 10), (10, 8)])
def test_teacher_and_student_may_be_padded_differently(loss, columns):
    student, teacher = logits(4)
    student, teacher = student[..., : columns[0]], teacher[..., : columns[1]]
    values, gradient, _ = gradients(loss, student, teacher, vocab_size=7)
    sliced, of_slice, _ = gradients(loss, student[..., :7], teacher[..., :7])
    np.testing.assert_allclose(values, sliced, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(gradient[..., :7], of_slice, rtol=1e-5, atol=1e-7)


@every_pair
@pytest.mark.parametrize("columns", [(8, 10), (10, 8)])
def test_different_widths_without_a_fitting_vocab_size_are_refused(loss, columns):
    student, teacher = logits(4)
    student, teacher = student[..., : columns[0]], teacher[..., : columns[1]]
    with pytest.raises(ValueError, match="expected vocab_size"):
        loss(student, teacher, LABELS, SPAN_IDS)
    with pytest.raises(ValueError, match="vocab_size=9 for logits of 8 columns"):
        loss(student, teacher, LABELS, SPAN_IDS, vocab_size=9)


@every_loss
def test_vocab_size_out_of_range_is_refused(loss):
    for size in (0, -1, V + 1):
        with pytest.raises(ValueError, match=f"vocab_size={size} for logits of {V}"):
            loss(*logits(), LABELS, SPAN_IDS, vocab_size=size)


@every_path
def test_bfloat16_logits_give_float32_losses_and_bfloat16_gradients(loss):
    student, teacher = logits(5, dtype=jnp.bfloat16)
    values, gradient, _ = gradients(loss, student, teacher, WHERE)
    assert values.dtype == jnp.float32 and gradient.dtype == jnp.bfloat16
    upcast = (x.astype(jnp.float32) for x in (student, teacher))
    want, *_ = gradients(loss, *upcast, WHERE)
    np.testing.assert_allclose(values, want, rtol=1e-5, atol=1e-7)


@every_loss
def test_gradients_are_finite_where_inputs_are_hard(loss):
    student, teacher = logits(6)
    cases = {
        "identical": (teacher, teacher),
        "flat": (jnp.zeros_like(student), jnp.zeros_like(teacher)),
        "huge": (jnp.sign(student) * 1e4, jnp.sign(teacher) * 1e4),
        "one-hot": (student, jnp.where(jnp.arange(V) == 2, 1e4, jnp.zeros((B, T, V)))),
        "-inf": (student.at[..., 7].set(-jnp.inf), teacher.at[..., 7].set(-jnp.inf)),
        "-inf teacher": (student, teacher.at[..., 2:].set(-jnp.inf)),
    }
    for name, (s, t) in cases.items():
        values, gradient, _ = gradients(loss, s, t, WHERE)
        infinite = jnp.zeros_like(WHERE)
        if name == "-inf teacher" and loss in NEED_THE_TEACHERS_SUPPORT:
            infinite = WHERE
        elif name == "-inf teacher" and loss is sampled_reverse_kl:
            infinite = WHERE & (LABELS >= 2)
        assert jnp.all(jnp.isposinf(values) == infinite), name
        assert jnp.all(jnp.isfinite(values) != infinite), name
        assert jnp.all(jnp.isfinite(gradient)), name


@every_loss
def test_a_batch_without_a_scored_position_is_zero(loss):
    student, teacher = logits(7)
    nowhere = jnp.zeros((B, T), bool)
    values, gradient, _ = gradients(loss, student * jnp.nan, teacher, nowhere)
    assert not jnp.any(values) and not jnp.any(gradient)
    assert losses.masked_mean(values, nowhere) == 0


@every_path
def test_a_single_token_has_a_loss(loss):
    student, teacher = logits(8, shape=(1, 1, V))
    values, gradient, _ = gradients(loss, student, teacher)
    assert values.shape == (1, 1)
    assert jnp.all(jnp.isfinite(gradient))
    assert jnp.any(values != 0) != (loss is span_correlation)  # one token is no pair


@every_path
def test_vmap_map_grad_and_remat_agree(loss):
    length = 4  # as in the test of slices: the same program for a row
    student, teacher = (x[:, :length] for x in logits(9))

    def row(student, teacher):
        return loss(student, teacher, LABELS[0, :length], SPAN_IDS[0, :length])

    @jax.jit
    def transformed(student, teacher):
        batched = jax.vmap(row)(student, teacher)
        mapped = jax.lax.map(lambda pair: row(*pair), (student, teacher))
        remat = jax.vmap(jax.grad(lambda s, t: jnp.sum(jax.checkpoint(row)(s, t))))
        return batched, mapped, remat(student, teacher)

    batched, mapped, remat = transformed(student, teacher)
    np.testing.assert_allclose(batched, mapped, rtol=1e-5, atol=1e-6)
    for b in range(B):
        values, gradient, _ = gradients(loss, student[b], teacher[b], row=0)
        np.testing.assert_allclose(jnp.sum(batched[b]), jnp.sum(values), rtol=1e-5)
        np.testing.assert_allclose(remat[b], gradient, rtol=1e-5, atol=1e-6)
    assert jnp.any(batched[1] != batched[0])


@every_path
def test_a_sum_of_micro_batches_equals_the_batch(loss):
    """Ragged rows, one of them empty: 1 batch of 8 and 8 of 1 give equal gradients."""
    rng = np.random.default_rng(0)
    inputs = jnp.asarray(rng.normal(size=(8, T, 5)), jnp.float32)
    teacher = jnp.asarray(rng.normal(size=(8, T, V)), jnp.float32)
    where = jnp.arange(T)[None] < jnp.asarray([6, 1, 4, 0, 2, 5, 3, 6])[:, None]
    weights = jnp.asarray(rng.normal(size=(5, V)), jnp.float32)

    def total(weights, inputs, teacher, where):
        def row(x, t, w):
            return loss(x @ weights, t, LABELS[0], SPAN_IDS[0], where=w)

        return losses.masked_sum(jax.vmap(row)(inputs, teacher, where), where)

    gradient = jax.jit(jax.value_and_grad(lambda *a: tuple(total(*a)), has_aux=True))
    results = []
    for size in (8, 1):
        sums, counts, total_gradient = 0.0, 0.0, jnp.zeros_like(weights)
        for i in range(0, 8, size):
            micro_batch = (x[i : i + size] for x in (inputs, teacher, where))
            (value, count), of_weights = gradient(weights, *micro_batch)
            sums, counts = sums + value, counts + count
            total_gradient += of_weights
        results.append((sums / counts, total_gradient / counts))
    (value, of_weights), (summed_value, summed_gradient) = results
    np.testing.assert_allclose(summed_value, value, rtol=1e-5)
    np.testing.assert_allclose(summed_gradient, of_weights, rtol=1e-4, atol=1e-6)


@every_pair
def test_logits_of_different_positions_are_refused(loss, without_type_checks):
    student, teacher = logits()
    with pytest.raises(ValueError, match="differ in their pos"):
        loss(student, teacher[:, 1:], LABELS, SPAN_IDS)


def compiles(function, calls):
    before = function._cache_size()
    for call in calls:
        call()
    return function._cache_size() - before


def test_a_sweep_over_a_number_compiles_once():
    student, teacher = logits(10)
    sweep = (0.013, 0.017, 0.5)
    pair = student[:1], teacher[:1]
    for loss, name in [
        (losses.forward_kl, "temperature"),
        (losses.jensen_shannon, "beta"),
        (losses.skewed_forward_kl, "alpha"),
        (losses.skewed_reverse_kl, "alpha"),
        (losses.adaptive_kl, "head_mass"),
        (losses.alpha_beta_divergence, "alpha"),
        (losses.alpha_beta_divergence, "beta"),
        (losses.taid, "mix"),
        (losses.entropy_gated_kl, "threshold"),
        (losses.logit_difference, "alpha"),
        (losses.reverse_kl_top_k, "temperature"),
    ]:
        fixed = {"mix": 0.5} if loss is losses.taid else {}
        calls = [functools.partial(loss, *pair, **(fixed | {name: x})) for x in sweep]
        assert compiles(jitted_per_token, calls) <= 1, name
    # All divergences share one cache: a new static argument does add an entry.
    other = [lambda: losses.forward_kl(*pair, vocab_size=9)]
    assert compiles(jitted_per_token, other) == 1


def test_a_sweep_over_dac_kls_numbers_compiles_once():
    student, teacher = (x[:1] for x in logits(10))
    sweep = (0.013, 0.017, 0.5)
    widths = [
        lambda x=x: losses.dac_kl(
            CLIP, student, teacher, width=x, signal=losses.ClipPrior(x)
        )
        for x in sweep
    ]
    assert compiles(losses.dac_kl, widths) == 1
    limits = [
        lambda x=x: losses.dac_kl_fixed((x, x + 0.5), student, teacher, width=x)
        for x in sweep
    ]
    assert compiles(losses.dac_kl_fixed, limits) == 1


def test_the_import_needs_only_jax():
    code = (
        "import sys, mgsr_jax.losses; "
        "print(*{name.split('.')[0] for name in sys.modules})"
    )
    modules = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert {"jax", "jaxtyping", "mgsr_jax"} <= set(modules)
    heavy = {"flax", "optax", "orbax", "transformers", "datasets", "torch", "grain"}
    assert not heavy & set(modules)
