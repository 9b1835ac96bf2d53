"""What every loss promises, whatever it computes."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgsr_jax import losses
from mgsr_jax.losses._divergences import jitted_per_token

B, T, V, K = 3, 6, 10, 4
LABELS = jnp.array([[1, 2, 0, 4, 4, 3], [0, 1, 2, 3, 4, 5], [5, 5, 1, 0, 2, 2]])
SPAN_IDS = jnp.array([[0, 0, 0, 1, 1, 1], [-1, 2, 2, 2, 3, 3], [4, 4, 4, 4, -1, -1]])
# Rows of every kind: ragged, with a hole, and one where nothing is scored.
WHERE = jnp.array([[1, 1, 1, 1, 1, 0], [0, 1, 1, 0, 1, 1], [0, 0, 0, 0, 0, 0]], bool)
CLIP = losses.init_clip_network(jax.random.key(1), num_candidates=K, hidden=4)
LEARNED = CLIP | {"output": CLIP["output"] | {"kernel": jnp.full((4, 2), 0.3)}}


def cross_entropy(student, teacher, **kwargs):
    del teacher
    rows, length, _ = student.shape
    return losses.cross_entropy(student, LABELS[:rows, :length], **kwargs)


def dac_kl(student, teacher, **kwargs):
    return losses.dac_kl(LEARNED, student, teacher, **kwargs).loss


def dac_kl_fixed(student, teacher, **kwargs):
    limits = (0.1, jnp.asarray(0.9))
    return losses.dac_kl_fixed(
        limits, student, teacher, num_candidates=K, **kwargs
    ).loss


def span_correlation(student, teacher, **kwargs):
    rows, length, _ = student.shape
    span_ids = SPAN_IDS[:rows, :length]
    return losses.span_correlation(student, teacher, span_ids, **kwargs)


def taid(student, teacher, **kwargs):
    return losses.taid(student, teacher, mix=0.3, **kwargs)


def one_row(loss, student, teacher, b, **kwargs):
    """The loss of row b alone, [T]: its own labels and spans, no batch axis."""
    length = student.shape[0]
    if loss is cross_entropy:
        return losses.cross_entropy(student, LABELS[b, :length], **kwargs)
    if loss is span_correlation:
        span_ids = SPAN_IDS[b, :length]
        return losses.span_correlation(student, teacher, span_ids, **kwargs)
    return loss(student, teacher, **kwargs)


# Infinite where the student has probability that the teacher's logits exclude.
NEED_THE_TEACHERS_SUPPORT = [
    losses.reverse_kl,
    losses.symmetric_kl,
    losses.adaptive_kl,
]
PAIRED = [
    losses.forward_kl,
    *NEED_THE_TEACHERS_SUPPORT,
    losses.total_variation,
    losses.jensen_shannon,
    losses.skewed_forward_kl,
    losses.skewed_reverse_kl,
    losses.alpha_beta_divergence,
    taid,
    dac_kl,
    dac_kl_fixed,
    span_correlation,
]
every_loss = pytest.mark.parametrize("loss", [cross_entropy, *PAIRED])
every_pair = pytest.mark.parametrize("loss", PAIRED)
# The divergences share everything but the equation, which sees one position at a time.
every_walk = pytest.mark.parametrize(
    "loss",
    [
        cross_entropy,
        losses.forward_kl,
        losses.adaptive_kl,
        dac_kl,
        dac_kl_fixed,
        span_correlation,
    ],
)


def logits(seed=0, shape=(B, T, V), dtype=jnp.float32):
    both = np.random.default_rng(seed).normal(0, 2, (2, *shape))
    return tuple(jnp.asarray(x, dtype) for x in both)


# Compiling is most of the time here, and a third shorter like this.
quick_jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


@quick_jit(static_argnames=("loss", "vocab_size"))
def gradients(loss, student, teacher, where=None, vocab_size=None):
    """(values, gradient of their sum for the student, for the teacher)."""

    def total(student, teacher):
        values = loss(student, teacher, where=where, vocab_size=vocab_size)
        return jnp.sum(values), values

    (_, values), found = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(
        student, teacher
    )
    return values, *found


@every_loss
def test_masked_positions_are_exactly_zero_whatever_stands_there(loss):
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
def test_permuting_unscored_logits_changes_nothing_and_scored_ones_does(loss):
    student, teacher = logits(1)
    plain = loss(student, teacher, where=WHERE)
    rolled = jnp.roll(student, 1, axis=-1)
    unscored = jnp.where(WHERE[..., None], student, rolled)
    np.testing.assert_array_equal(loss(unscored, teacher, where=WHERE), plain)
    for t in range(2):
        scored = student.at[0, t].set(rolled[0, t])
        assert jnp.any(loss(scored, teacher, where=WHERE)[0] != plain[0])


@every_loss
def test_a_mask_equals_a_slice(loss):
    student, teacher = logits(2)
    keep = 4
    where = jnp.broadcast_to(jnp.arange(T) < keep, (B, T))
    masked, gradient, _ = gradients(loss, student, teacher, where)
    for b in range(B):

        def total(s, b=b):
            return jnp.sum(one_row(loss, s, teacher[b, :keep], b))

        sliced, of_slice = jax.value_and_grad(total)(student[b, :keep])
        np.testing.assert_allclose(jnp.sum(masked[b]), sliced, rtol=1e-5)
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


@every_pair
@pytest.mark.parametrize("columns", [(8, 10), (10, 8)])
def test_teacher_and_student_may_be_padded_differently(loss, columns):
    student, teacher = logits(4)
    student, teacher = student[..., : columns[0]], teacher[..., : columns[1]]
    values, gradient, _ = gradients(loss, student, teacher, vocab_size=7)
    sliced, of_slice, _ = gradients(loss, student[..., :7], teacher[..., :7])
    np.testing.assert_allclose(values, sliced, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(gradient[..., :7], of_slice, rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="expected vocab_size"):
        loss(student, teacher)
    with pytest.raises(ValueError, match="vocab_size=9 for logits of 8 columns"):
        loss(student, teacher, vocab_size=9)


@every_loss
def test_vocab_size_out_of_range_is_refused(loss):
    for size in (0, -1, V + 1):
        with pytest.raises(ValueError, match=f"vocab_size={size} for logits of {V}"):
            loss(*logits(), vocab_size=size)


@every_loss
def test_bfloat16_goes_in_and_float32_comes_out(loss):
    student, teacher = logits(5, dtype=jnp.bfloat16)
    values, gradient, _ = gradients(loss, student, teacher, WHERE)
    assert values.dtype == jnp.float32 and gradient.dtype == jnp.bfloat16
    upcast = loss(student.astype(jnp.float32), teacher.astype(jnp.float32), where=WHERE)
    np.testing.assert_allclose(values, upcast, rtol=1e-5, atol=1e-7)


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
        if name == "-inf teacher" and loss in NEED_THE_TEACHERS_SUPPORT:
            assert jnp.all(jnp.isposinf(values) == WHERE), name
        else:
            assert jnp.all(jnp.isfinite(values)), name
        assert jnp.all(jnp.isfinite(gradient)), name


@every_loss
def test_a_batch_without_a_scored_position_is_zero(loss):
    student, teacher = logits(7)
    nowhere = jnp.zeros((B, T), bool)
    values, gradient, _ = gradients(loss, student * jnp.nan, teacher, nowhere)
    assert not jnp.any(values) and not jnp.any(gradient)
    assert losses.masked_mean(values, nowhere) == 0


@every_loss
def test_one_token_is_enough(loss):
    student, teacher = logits(8, shape=(1, 1, V))
    values, gradient, _ = gradients(loss, student, teacher)
    assert values.shape == (1, 1)
    assert jnp.all(jnp.isfinite(gradient))
    assert jnp.any(values != 0) != (loss is span_correlation)  # one token is no pair


@every_loss
def test_jit_vmap_grad_remat_and_scan_agree(loss):
    student, teacher = logits(9)
    row = functools.partial(one_row, loss, b=0)

    @quick_jit
    def transformed(student, teacher):
        batched = jax.vmap(row)(student, teacher)
        scanned = jax.lax.map(lambda pair: row(*pair), (student, teacher))
        remat = jax.vmap(jax.grad(lambda s, t: jnp.sum(jax.checkpoint(row)(s, t))))
        return batched, scanned, remat(student, teacher)

    batched, scanned, remat = transformed(student, teacher)
    np.testing.assert_allclose(batched, scanned, rtol=1e-5, atol=1e-6)
    for b in range(B):

        def alone(s, b=b):
            return jnp.sum(row(s, teacher[b]))

        value, gradient = jax.value_and_grad(alone)(student[b])
        np.testing.assert_allclose(jnp.sum(batched[b]), value, rtol=1e-5)
        np.testing.assert_allclose(remat[b], gradient, rtol=1e-5, atol=1e-6)
    assert jnp.any(batched[1] != batched[0])


@every_walk
def test_a_sum_of_micro_batches_is_the_batch(loss):
    """Ragged rows, one of them empty: 1x8, 2x4 and 8x1 give the same gradient."""
    rng = np.random.default_rng(0)
    inputs = jnp.asarray(rng.normal(size=(8, T, 5)), jnp.float32)
    teacher = jnp.asarray(rng.normal(size=(8, T, V)), jnp.float32)
    where = jnp.arange(T)[None] < jnp.asarray([6, 1, 4, 0, 2, 5, 3, 6])[:, None]
    weights = jnp.asarray(rng.normal(size=(5, V)), jnp.float32)

    def total(weights, inputs, teacher, where):
        def row(x, t, w):
            return one_row(loss, x @ weights, t, 0, where=w)

        return losses.masked_sum(jax.vmap(row)(inputs, teacher, where), where)

    gradient = quick_jit(jax.value_and_grad(lambda *a: tuple(total(*a)), has_aux=True))
    results = []
    for size in (8, 4, 1):
        sums, counts, gradients = 0.0, 0.0, jnp.zeros_like(weights)
        for i in range(0, 8, size):
            part = (x[i : i + size] for x in (inputs, teacher, where))
            (value, count), found = gradient(weights, *part)
            sums, counts, gradients = sums + value, counts + count, gradients + found
        results.append((sums / counts, gradients / counts))
    for value, found in results[1:]:
        np.testing.assert_allclose(value, results[0][0], rtol=1e-5)
        np.testing.assert_allclose(found, results[0][1], rtol=1e-4, atol=1e-6)


@every_pair
def test_logits_of_other_positions_are_refused(loss, without_type_checks):
    student, teacher = logits()
    with pytest.raises(ValueError, match="differ in their pos"):
        loss(student, teacher[:, 1:])


def test_numbers_are_traced_so_that_a_sweep_compiles_once():
    student, teacher = logits(10)

    def compiles(function, calls):
        before = function._cache_size()
        for call in calls:
            call()
        return function._cache_size() - before

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
    ]:
        fixed = {"mix": 0.5} if loss is losses.taid else {}
        calls = [lambda x=x: loss(*pair, **(fixed | {name: x})) for x in sweep]  # noqa: B023
        assert compiles(jitted_per_token, calls) <= 1, name
    # The cache is shared: nothing above was answered without a compilation of its own.
    assert (
        compiles(jitted_per_token, [lambda: losses.forward_kl(*pair, vocab_size=9)])
        == 1
    )
    widths = [
        lambda x=x: losses.dac_kl(
            CLIP, student[:1], teacher[:1], width=x, prior_weight=2 * x
        )
        for x in sweep
    ]
    assert compiles(losses.dac_kl, widths) == 1
    limits = [
        lambda x=x: losses.dac_kl_fixed((x, x + 0.5), student[:1], teacher[:1], width=x)
        for x in sweep
    ]
    assert compiles(losses.dac_kl_fixed, limits) == 1


def test_the_import_needs_nothing_but_jax():
    code = (
        "import sys, mgsr_jax.losses; "
        "print(*{name.split('.')[0] for name in sys.modules})"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert {"jax", "jaxtyping", "mgsr_jax"} <= set(found)
    heavy = {"flax", "optax", "orbax", "transformers", "datasets", "torch", "grain"}
    assert not heavy & set(found)
