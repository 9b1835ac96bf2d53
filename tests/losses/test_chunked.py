"""The chunked pass equals the dense one, and stores and computes nothing twice."""

import collections
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from losses import hlo
from losses.chunk_problem import (
    TOKENS,
    B,
    D,
    T,
    V,
    all_losses,
    assert_close,
    dense,
    differentiated,
    in_chunks,
    light_loss,
    light_problem,
    problem,
    unembed,
)

from mgsr_jax import losses
from mgsr_jax.losses import chunked, default_chunk_size, project


@pytest.mark.slow
@pytest.mark.parametrize("chunk_size", [2, 6, 8, 500])
def test_value_metrics_and_gradients_equal_the_dense_ones(chunk_size):
    """One new token per chunk, a padded last chunk, full chunks, one chunk for all."""
    arguments = problem()
    want = differentiated(dense())(*arguments)
    got = differentiated(in_chunks(chunk_size))(*arguments)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(want))
    assert_close(got, want)


@pytest.mark.slow
@pytest.mark.parametrize(("chunk_size", "rows"), [(6, 1), (500, 3)])
def test_chunks_within_chunks_equal_the_dense_pass(chunk_size, rows):
    """Logits of a chunk are the tokens of an inner one; each has its own overlap."""
    arguments = problem(10)
    run = in_chunks(chunk_size, rows=rows)
    want = differentiated(dense())(*arguments)
    assert_close(differentiated(run)(*arguments), want)
    assert_close(jax.jit(run)(*arguments), want[0])


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
def test_chunks_without_a_scored_token_are_skipped(share):
    """Only chunks with a token of `where` run; all other tokens have gradient 0."""
    rng = np.random.default_rng(12)
    head, hidden = (
        jnp.asarray(rng.normal(size=D)),
        jnp.asarray(rng.normal(size=(B, T, D))),
    )
    weights = jnp.asarray(rng.uniform(0.5, 1, (B, T)))
    where = jnp.asarray(rng.random((B, T)) < share)
    got = differentiated(_skipping)(head, hidden, weights, where)
    (value, chunks), gradients = got
    (want, _), want_gradients = differentiated(_all_at_once)(
        head, hidden, weights, where
    )
    np.testing.assert_allclose(value, want, rtol=2e-6)
    for gradient, expected in zip(gradients, want_gradients, strict=True):
        np.testing.assert_allclose(gradient, expected, rtol=2e-5, atol=1e-6)
    assert chunks == -(-int(where.sum()) // 4)
    assert chunks == jax.jit(_skipping)(head, hidden, weights, where)[1]


def _squares(head, hidden, aux):
    weights, where = aux
    return jnp.sum(weights * where * jnp.square(hidden @ head)), jnp.ones(())


def _skipping(head, hidden, weights, where):
    aux = weights, where
    return chunked(_squares, head, hidden, aux, chunk_size=4, overlap=0, where=where)


def _all_at_once(head, hidden, weights, where):
    return _squares(head, hidden, (weights, where))


def test_rows_are_chunked_in_the_order_of_their_tokens():
    trained, hidden, teacher_head, aux = light_problem()
    hidden_BT, aux_BT = jax.tree.map(
        lambda x: x.reshape(B, T, *x.shape[1:]), (hidden, aux)
    )
    run = differentiated(in_chunks(6, light_loss))
    want = run(trained, hidden, teacher_head, aux)
    (value, metrics), (d_trained, d_hidden) = run(
        trained, hidden_BT, teacher_head, aux_BT
    )
    assert d_hidden.shape == (B, T, D)
    got = (value, metrics), (d_trained, d_hidden.reshape(TOKENS, D))
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_every_pair_across_a_border_is_counted():
    """One new token per chunk: every pair of neighbours is across a border."""
    trained, hidden, teacher_head, aux = problem(1)
    aux |= {
        "where": jnp.ones(TOKENS, bool),
        "weights": jnp.tile(jnp.eye(3)[2], (21, 1)),
    }
    count = np.sum(losses.span_pairs(aux["span_ids"]))
    assert count == TOKENS - 1 - 4
    arguments = trained, hidden, teacher_head, aux
    want = differentiated(dense())(*arguments)
    (value, metrics), gradients = differentiated(in_chunks(2))(*arguments)
    np.testing.assert_allclose(value, want[0][0], rtol=1e-6)
    np.testing.assert_allclose(gradients[1], want[1][1], rtol=1e-4, atol=1e-7)
    assert metrics["sft"].count == TOKENS


def test_chunks_without_overlap_equal_the_dense_pass():
    trained, hidden, _, aux = problem(2)

    def loss(head, hidden, aux):
        logits = unembed(head, hidden)
        values = losses.cross_entropy(logits, aux["labels"], where=aux["where"])
        return jnp.sum(aux["weights"][:, 0] * values), ()

    run = functools.partial(chunked, loss, chunk_size=4, overlap=0)
    got = differentiated(run)(trained["head"], hidden, aux)
    assert_close(got, differentiated(loss)(trained["head"], hidden, aux))


def test_gradients_are_scaled_by_the_cotangent_of_the_sum():
    arguments = light_problem(3)

    def scaled(function):
        def run(*arguments):
            value, metrics = function(*arguments)
            return jnp.sin(value / 9), metrics

        return differentiated(run)(*arguments)

    got, want = scaled(in_chunks(6, light_loss)), scaled(dense(light_loss))
    assert_close(got, want, rtol=1e-5)


def test_metrics_have_no_gradient():
    def metric(*arguments):
        return in_chunks(6, light_loss)(*arguments)[1]["token"].total

    gradients = jax.jit(jax.grad(metric, (0, 1)))(*light_problem())
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradients))


def test_the_value_is_the_same_without_differentiation():
    arguments = problem(4)
    want = differentiated(dense())(*arguments)[0]
    assert_close(jax.jit(in_chunks(6))(*arguments), want)


def test_remat_and_scan_give_the_same_gradients():
    trained, hidden, teacher_head, aux = light_problem(5)
    run = in_chunks(6, light_loss)
    want = differentiated(run)(trained, hidden, teacher_head, aux)
    remat = differentiated(jax.checkpoint(run))(trained, hidden, teacher_head, aux)
    assert_close(remat, want)

    def two_micro_batches(trained, hidden):
        def micro_batch(total, _):
            value, _ = run(trained, hidden, teacher_head, aux)
            return total + value, None

        return jax.lax.scan(micro_batch, jnp.zeros(()), length=2)[0], ()

    (value, _), gradients = differentiated(two_micro_batches)(trained, hidden)
    double = jax.tree.map(lambda x: 2 * x, (want[0][0], want[1]))
    assert_close((value, gradients), double)


def test_half_precision_is_summed_in_float32():
    """512 ones: a sum of ones in bfloat16 stops at 256."""

    def loss(head, hidden, aux):
        return jnp.sum(hidden @ head), ()

    ones = jnp.ones((512, 1), jnp.bfloat16)
    run = functools.partial(chunked, loss, chunk_size=1, overlap=0)
    (value, _), (gradient, d_hidden) = differentiated(run)(
        jnp.ones(1, jnp.bfloat16), ones, ()
    )
    assert value == 512 and value.dtype == jnp.float32
    assert gradient == 512 and gradient.dtype == d_hidden.dtype == jnp.bfloat16


def test_a_batch_without_a_scored_token_is_zero():
    trained, hidden, teacher_head, aux = problem(6)
    aux["where"] = jnp.zeros(TOKENS, bool)
    (value, _), gradients = differentiated(in_chunks(6))(
        trained, hidden, teacher_head, aux
    )
    assert value == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradients))


def test_differentiating_a_closed_over_value_raises():
    _, hidden, _, _ = problem()

    def loss(head):
        def fn(shared, tokens, aux):
            return jnp.sum(tokens @ head), ()

        return chunked(fn, (), hidden, (), chunk_size=4)[0]

    with pytest.raises(TypeError, match="[Tt]racer"):
        jax.grad(loss)(jnp.ones((D, V)))


@pytest.mark.parametrize(("chunk_size", "overlap"), [(1, 1), (4, 3), (4, -1), (0, 0)])
def test_a_chunk_size_below_twice_the_overlap_is_refused(chunk_size, overlap):
    with pytest.raises(ValueError, match=f"chunk_size={chunk_size}, overlap={overlap}"):
        chunked(
            all_losses, (), jnp.ones((4, 2)), (), chunk_size=chunk_size, overlap=overlap
        )


def test_aux_without_the_tokens_axes_is_refused():
    hidden, head = jnp.ones((4, 2)), jnp.ones((9, 2))
    with pytest.raises(
        ValueError, match=r"aux\['head'\] \(9, 2\).*belongs into shared"
    ):
        chunked(all_losses, (), hidden, {"head": head}, chunk_size=2)


def test_the_default_chunk_size_fills_a_fixed_memory():
    assert default_chunk_size(50257, "cpu") == 24 * 2**20 // (4 * 50257)
    assert default_chunk_size(50257, "gpu") == 256 * 2**20 // (4 * 50257)
    assert default_chunk_size(10**7, "cpu") == 64
    assert default_chunk_size(1000) == default_chunk_size(1000, jax.default_backend())


@functools.cache
def compiled(tokens, chunk_size, **how):
    gradient = jax.value_and_grad(in_chunks(chunk_size, **how), (0, 1), has_aux=True)
    return jax.jit(gradient).lower(*problem(tokens=tokens)).compile()


def temporary_bytes(*sizes, **how):
    return compiled(*sizes, **how).memory_analysis().temp_size_in_bytes


def rows_of_logits(text):
    """The largest number of rows of logits, with all V columns, in one array."""
    return max(int(np.prod(dims)) // V for dims in hlo.sizes(text) if V in dims[1:])


def test_no_array_has_the_logits_of_all_tokens():
    tokens, chunk_size = 64, 9
    assert rows_of_logits(compiled(tokens, chunk_size).as_text()) <= 3 * chunk_size
    gradient = jax.jit(jax.grad(lambda *x: dense(light_loss)(*x)[0]))
    text = gradient.lower(*light_problem(tokens=tokens)).compile().as_text()
    assert rows_of_logits(text) >= tokens


def test_no_product_with_the_head_is_computed_twice():
    """Student and teacher forward, the head's gradient, the hidden states'."""
    text = compiled(64, 9).as_text()
    results = re.findall(r"f32\[(\d+),(\d+)\]\S* dot\(", text)
    counted = collections.Counter(tuple(map(int, dims)) for dims in results)
    logits = {(9, V), (V, 9)}  # the transpose where there are few rows
    assert sum(counted[dims] for dims in logits) == 2
    assert counted[V, D] == counted[9, D] == 1
    assert not any(V in dims for dims in counted.keys() - {*logits, (V, D)})


def test_memory_does_not_grow_with_the_tokens():
    """Tokens are not copied: each chunk adds a value and four sums to a list."""
    few, chunks = 64, 8
    grown = temporary_bytes(17 * few, 9) - temporary_bytes(few, 9)
    assert grown <= 16 * chunks * 5 * 4 + 1024
    assert 16 * few * D * 4 > 2 * (16 * chunks * 5 * 4 + 1024)  # no room for states


@pytest.mark.slow
def test_logits_in_inner_chunks_take_two_arrays():
    """The student's, which their gradient overwrites, and the teacher's."""

    def arrays(**how):
        many, few = (
            temporary_bytes(256, size, unembed=_product, **how) for size in (129, 65)
        )
        return (many - few) / (64 * V * 4)

    assert arrays(rows=4) <= 2.2
    assert arrays() >= 5


def _product(head, hidden):
    return project(hidden, head["kernel"])
