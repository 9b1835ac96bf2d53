"""The chunked pass against the dense one, and what it must not hold or compute."""

import collections
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from losses import hlo

from mgsr_jax import losses
from mgsr_jax.losses import Projection, chunked, project

# V is the size of nothing else, so that a pattern in the program's text is conclusive.
B, T, D, WIDER, V, K = 3, 7, 5, 6, 83, 4
TOKENS = B * T


def unembed(head, hidden):
    """What a head may have beside its matrix: scale, bias, soft cap."""
    logits = 0.7 * project(2.0 * hidden, head["kernel"])
    bias = jnp.broadcast_to(head["bias"], logits.shape)
    return 3.0 * jnp.tanh((logits + bias) / 3.0)


def problem(seed=0, tokens=TOKENS, dtype=jnp.float32):
    """(differentiated: head, clip network), hidden states, (teacher's head), aux."""
    rng = np.random.default_rng(seed)

    def normal(*shape, scale=1.0):
        return jnp.asarray(rng.normal(0, scale, shape), dtype)

    clip = losses.init_clip_network(jax.random.key(1), num_candidates=K, hidden=4)
    clip["output"]["kernel"] = jnp.full((4, 2), 0.3)
    trained = {
        "head": {"kernel": normal(V, D), "bias": jnp.linspace(-1, 1, V)},
        "clip": clip,
    }
    aux = {
        "teacher": normal(tokens, WIDER),
        "labels": jnp.asarray(rng.integers(0, V, tokens), jnp.int32),
        "where": jnp.asarray(rng.random(tokens) < 0.7),
        # Pairs everywhere: no border between chunks falls between phrases alone.
        "span_ids": jnp.asarray(np.arange(tokens) // 5, jnp.int32),
        "weights": jnp.asarray(rng.uniform(0.1, 1, (tokens, 3)), jnp.float32),
    }
    return trained, normal(tokens, D), normal(V, WIDER), aux


def of_logits(clip, student, aux, *, overlap=1):
    """Cross-entropy, DAC-KL and span correlation: weighted sum and metrics."""
    n = student.shape[0]
    where = aux["scored"] & (jnp.arange(n) < n - overlap)
    sft = losses.cross_entropy(student, aux["labels"], where=where)
    dac = losses.dac_kl(clip, student, aux["teacher"], where=where)
    span = losses.span_correlation(
        student, aux["teacher"], aux["span_ids"], where=aux["where"]
    )
    values = jnp.stack([sft, dac.loss, span], axis=-1)
    metrics = {
        "sft": losses.masked_sum(sft, where),
        "kept_mass": losses.masked_sum(dac.kept_mass, where),
    }
    return jnp.sum(aux["weights"] * values), metrics


def all_losses(shared, hidden, aux, *, overlap=1, rows=None, unembed=unembed):
    """Those of hidden states; with `rows` the logits are read so many at a time."""
    n = hidden.shape[0]
    student = unembed(shared["head"], hidden)
    teacher = jnp.einsum("nd,vd->nv", aux["teacher"], shared["teacher_head"])
    scored = aux["where"] & (jnp.arange(n) < n - overlap)
    aux = aux | {"teacher": teacher, "scored": scored}
    if rows is None:
        return of_logits(shared["clip"], student, aux, overlap=0)
    return chunked(of_logits, shared["clip"], student, aux, chunk_size=rows + 1)


def dense(trained, hidden, teacher_head, aux):
    shared = trained | {"teacher_head": teacher_head}
    return all_losses(shared, hidden, aux, overlap=0)


def in_chunks(trained, hidden, teacher_head, aux, *, chunk_size, **how):
    head = trained["head"] | {"kernel": Projection(trained["head"]["kernel"])}
    shared = trained | {"head": head, "teacher_head": teacher_head}
    fn = functools.partial(all_losses, **how)
    return chunked(fn, shared, hidden, aux, chunk_size=chunk_size)


def differentiate(function, *arguments):
    return jax.jit(jax.value_and_grad(function, (0, 1), has_aux=True))(*arguments)


def assert_close(got, want, rtol=2e-6):
    """Leaf by leaf, relative to the leaf's norm."""

    def close(path, a, b):
        assert a.dtype == b.dtype and a.shape == b.shape
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        off = np.linalg.norm(a - b) / np.linalg.norm(b)
        assert off <= rtol, (jax.tree_util.keystr(path), off)

    jax.tree_util.tree_map_with_path(close, got, want)


@pytest.mark.parametrize("chunk_size", [2, 4, 8, 11, TOKENS + 1, 500])
def test_value_metrics_and_gradients_are_the_dense_ones(chunk_size):
    """Also with one new token a chunk, with a rest, and with more room than tokens."""
    arguments = problem()
    want = differentiate(dense, *arguments)
    got = differentiate(functools.partial(in_chunks, chunk_size=chunk_size), *arguments)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(want))
    assert_close(got, want)


@pytest.mark.parametrize(("chunk_size", "rows"), [(6, 1), (9, 4), (500, 3)])
def test_chunks_within_chunks(chunk_size, rows):
    """Logits of a chunk are the tokens of an inner one; each has its own overlap."""
    arguments = problem(10)
    run = functools.partial(in_chunks, chunk_size=chunk_size, rows=rows)
    assert_close(differentiate(run, *arguments), differentiate(dense, *arguments))
    assert_close(jax.jit(run)(*arguments), jax.jit(dense)(*arguments))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
def test_tokens_that_weigh_nothing_are_left_out(share):
    """Chunks of four of them are not computed; their tokens' gradient is zero."""
    rng = np.random.default_rng(12)
    head, hidden = (
        jnp.asarray(rng.normal(size=D)),
        jnp.asarray(rng.normal(size=(B, T, D))),
    )
    weights = jnp.asarray(rng.uniform(0.5, 1, (B, T)))
    where = jnp.asarray(rng.random((B, T)) < share)

    def fn(head, hidden, aux):
        weights, where = aux
        return jnp.sum(weights * where * jnp.square(hidden @ head)), jnp.ones(())

    def left_out(head, hidden):
        aux = weights, where
        return chunked(fn, head, hidden, aux, chunk_size=4, overlap=0, where=where)

    def all_at_once(head, hidden):
        return fn(head, hidden, (weights, where))

    (value, chunks), gradients = differentiate(left_out, head, hidden)
    (want, _), want_gradients = differentiate(all_at_once, head, hidden)
    np.testing.assert_allclose(value, want, rtol=2e-6)
    for got, expected in zip(gradients, want_gradients, strict=True):
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-6)
    assert chunks == -(-int(where.sum()) // 4) == jax.jit(left_out)(head, hidden)[1]


@pytest.mark.parametrize("overlap", [1, 2, 3])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 7, 10])
def test_what_is_read_and_where_its_gradient_goes(tokens, overlap):
    """Products of tokens up to `overlap` apart; also of fewer tokens than that."""
    rng = np.random.default_rng(11)
    x = jnp.asarray(rng.normal(size=(tokens, 1)), jnp.float32)
    weights = jnp.asarray(rng.uniform(0.5, 1, (tokens,)), jnp.float32)

    def loss(shared, x, weights, overlap):
        count = x.shape[0]
        padded = jnp.pad(x, ((0, overlap), (0, 0)))
        products = sum(x * padded[i : i + count] ** 2 for i in range(1, overlap + 1))
        own = jnp.arange(count) < count - overlap
        return jnp.sum(jnp.where(own, weights * products[:, 0], 0)), ()

    def whole(shared, x, weights):
        pad = ((0, overlap),)
        return loss(shared, jnp.pad(x, (*pad, (0, 0))), jnp.pad(weights, pad), overlap)

    for chunk_size in range(2 * overlap, 2 * overlap + 3):

        def run(shared, x, weights, chunk_size=chunk_size):
            fn = functools.partial(loss, overlap=overlap)
            sizes = dict(chunk_size=chunk_size, overlap=overlap)
            return chunked(fn, shared, x, weights, **sizes)

        got = differentiate(run, jnp.ones(()), x, weights)
        (value, _), (_, gradient) = differentiate(whole, jnp.ones(()), x, weights)
        np.testing.assert_allclose(got[0][0], value, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(got[1][1], gradient, rtol=1e-6, atol=1e-7)


def test_rows_are_read_one_after_the_other():
    trained, hidden, teacher_head, aux = problem()
    rows = jax.tree.map(lambda x: x.reshape(B, T, *x.shape[1:]), (hidden, aux))
    run = functools.partial(in_chunks, chunk_size=6)
    want = differentiate(run, trained, hidden, teacher_head, aux)
    (value, metrics), (d_trained, d_hidden) = differentiate(
        run, trained, rows[0], teacher_head, rows[1]
    )
    assert d_hidden.shape == (B, T, D)
    got = (value, metrics), (d_trained, d_hidden.reshape(TOKENS, D))
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_no_pair_across_a_border_is_lost():
    """One new token a chunk: every pair of neighbours lies across a border."""
    trained, hidden, teacher_head, aux = problem(1)
    aux |= {
        "where": jnp.ones(TOKENS, bool),
        "weights": jnp.tile(jnp.eye(3)[2], (21, 1)),
    }
    count = np.sum(losses.span_pairs(aux["span_ids"]))
    assert count == TOKENS - 1 - 4
    want = differentiate(dense, trained, hidden, teacher_head, aux)
    run = functools.partial(in_chunks, chunk_size=2)
    (value, metrics), gradients = differentiate(run, trained, hidden, teacher_head, aux)
    np.testing.assert_allclose(value, want[0][0], rtol=1e-6)
    np.testing.assert_allclose(gradients[1], want[1][1], rtol=1e-4, atol=1e-7)
    assert metrics["sft"].count == TOKENS


def test_without_an_overlap():
    trained, hidden, teacher_head, aux = problem(2)

    def loss(head, hidden, aux):
        logits = unembed(head, hidden)
        values = losses.cross_entropy(logits, aux["labels"], where=aux["where"])
        return jnp.sum(aux["weights"][:, 0] * values), ()

    run = functools.partial(chunked, loss, chunk_size=4, overlap=0)
    got = differentiate(run, trained["head"], hidden, aux)
    assert_close(got, differentiate(loss, trained["head"], hidden, aux))


def test_gradients_are_scaled_by_what_becomes_of_the_sum():
    arguments = problem(3)
    run = functools.partial(in_chunks, chunk_size=6)

    def of_loss(function):
        def scaled(*arguments):
            value, metrics = function(*arguments)
            return jnp.sin(value / 9), metrics

        return differentiate(scaled, *arguments)

    assert_close(of_loss(run), of_loss(dense), rtol=1e-5)


def test_metrics_have_no_gradient():
    def metric(*arguments):
        return in_chunks(*arguments, chunk_size=6)[1]["sft"].total

    gradients = jax.jit(jax.grad(metric, (0, 1)))(*problem())
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradients))


def test_nothing_differentiated_the_value_is_the_same():
    arguments = problem(4)
    run = jax.jit(functools.partial(in_chunks, chunk_size=6))
    assert_close(run(*arguments), jax.jit(dense)(*arguments))


def test_remat_and_scan_agree():
    trained, hidden, teacher_head, aux = problem(5)
    run = functools.partial(in_chunks, chunk_size=6)
    want = differentiate(run, trained, hidden, teacher_head, aux)
    remat = jax.checkpoint(run)
    assert_close(differentiate(remat, trained, hidden, teacher_head, aux), want)

    def two_micro_batches(trained, hidden):
        def one(total, _):
            value, _ = run(trained, hidden, teacher_head, aux)
            return total + value, None

        return jax.lax.scan(one, jnp.zeros(()), length=2)[0], ()

    (value, _), gradients = differentiate(two_micro_batches, trained, hidden)
    double = jax.tree.map(lambda x: 2 * x, (want[0][0], want[1]))
    assert_close((value, gradients), double)


def test_half_precision_is_added_up_in_float32():
    """512 ones: in bfloat16 a sum of ones ends at 256."""

    def loss(head, hidden, aux):
        return jnp.sum(hidden @ head), ()

    ones = jnp.ones((512, 1), jnp.bfloat16)
    run = functools.partial(chunked, loss, chunk_size=1, overlap=0)
    (value, _), (gradient, of_hidden) = differentiate(
        run, jnp.ones(1, jnp.bfloat16), ones, ()
    )
    assert value == 512 and value.dtype == jnp.float32
    assert gradient == 512 and gradient.dtype == of_hidden.dtype == jnp.bfloat16


def test_a_projection_is_added_up_block_by_block(monkeypatch):
    """Blocks of 16 rows: the last begins earlier, and counts no row twice."""
    monkeypatch.setattr(losses._projection, "_BLOCK", 4 * D * 16)
    arguments = problem(7)
    got = differentiate(functools.partial(in_chunks, chunk_size=6), *arguments)
    assert_close(got, differentiate(dense, *arguments))


def test_a_projection_is_multiplied_once_and_with_every_token():
    kernel, hidden = jnp.ones((V, D)), jnp.ones((6, D))

    def twice(shared, hidden, aux):
        return jnp.sum(project(hidden, shared) - project(hidden, shared)), ()

    def of_some(shared, hidden, aux):
        return jnp.sum(project(hidden[:2], shared)), ()

    for fn, message in ((twice, "again"), (of_some, r"\(2, 5\), first")):
        with pytest.raises(ValueError, match=message):
            jax.grad(
                lambda kernel, fn=fn: chunked(
                    fn, Projection(kernel), hidden, (), chunk_size=3, overlap=0
                )[0]
            )(kernel)


def test_a_projection_is_cast_and_nothing_else():
    """What is done to the kernel besides, its tape would not see."""
    kernel, hidden = jnp.ones((V, D)), jnp.ones((6, D))

    def gradient(change):
        def fn(shared, hidden, aux):
            head = jax.tree.map(change, shared)
            return jnp.sum(jnp.square(project(hidden, head["kernel"]))), ()

        def loss(kernel):
            shared = {"kernel": Projection(kernel)}
            return chunked(fn, shared, hidden, (), chunk_size=3, overlap=0)[0]

        return jax.grad(loss)(kernel)

    cast = gradient(lambda p: p.astype(jnp.bfloat16))
    np.testing.assert_array_equal(cast, gradient(lambda p: p))
    for change in (lambda p: 2 * p, lambda p: p + jnp.sum(p), lambda p: p.kernel):
        with pytest.raises((TypeError, AttributeError), match="Taped"):
            gradient(change)


def test_in_the_callers_own_shard_map():
    """Its loss is a device's own; what is shared gets the sum of all gradients."""
    trained, hidden, teacher_head, aux = problem(9, tokens=24)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    P = jax.sharding.PartitionSpec
    # Six tokens a device: no pair lies across two of them.
    aux["span_ids"] = jnp.arange(24, dtype=jnp.int32) // 3

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P(), P("data"), P(), P("data")),
        out_specs=(P(), P()),
    )
    def run(*arguments):
        value = in_chunks(*arguments, chunk_size=4)
        return jax.lax.psum(value, "data")

    assert_close(
        differentiate(run, trained, hidden, teacher_head, aux),
        differentiate(dense, trained, hidden, teacher_head, aux),
    )


def test_a_projection_in_half_precision_is_multiplied_in_it():
    """bfloat16 factors, float32 sums; the gradient has the parameter's dtype."""
    trained, hidden, teacher_head, aux = problem(8)

    def cast(function):
        def run(head, hidden):
            half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), head)
            return function(trained | {"head": half}, hidden, teacher_head, aux)

        half = hidden.astype(jnp.bfloat16)
        (value, _), gradients = differentiate(run, trained["head"], half)
        return value, gradients

    got = cast(functools.partial(in_chunks, chunk_size=6))
    assert_close(got, cast(dense), rtol=1e-2)


def test_a_batch_without_a_scored_token_is_zero():
    trained, hidden, teacher_head, aux = problem(6)
    aux["where"] = jnp.zeros(TOKENS, bool)
    run = functools.partial(in_chunks, chunk_size=6)
    (value, _), gradients = differentiate(run, trained, hidden, teacher_head, aux)
    assert value == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradients))


def test_what_is_closed_over_cannot_be_differentiated():
    _, hidden, _, _ = problem()

    def loss(head):
        def fn(shared, tokens, aux):
            return jnp.sum(tokens @ head), ()

        return chunked(fn, (), hidden, (), chunk_size=4)[0]

    with pytest.raises(TypeError, match="[Tt]racer"):
        jax.grad(loss)(jnp.ones((D, V)))


@pytest.mark.parametrize(("chunk_size", "overlap"), [(1, 1), (4, 3), (4, -1), (0, 0)])
def test_a_chunk_has_room_for_more_than_its_overlap(chunk_size, overlap):
    with pytest.raises(ValueError, match=f"chunk_size={chunk_size}, overlap={overlap}"):
        chunked(
            all_losses, (), jnp.ones((4, 2)), (), chunk_size=chunk_size, overlap=overlap
        )


def test_aux_is_cut_and_nothing_else_stands_there():
    hidden, head = jnp.ones((4, 2)), jnp.ones((9, 2))
    with pytest.raises(
        ValueError, match=r"aux\['head'\] \(9, 2\).*belongs into shared"
    ):
        chunked(all_losses, (), hidden, {"head": head}, chunk_size=2)


@functools.cache
def compiled(tokens, chunk_size, **how):
    run = functools.partial(in_chunks, chunk_size=chunk_size, **how)
    gradient = jax.value_and_grad(run, (0, 1), has_aux=True)
    return jax.jit(gradient).lower(*problem(tokens=tokens)).compile()


def plan(*sizes, **how):
    return compiled(*sizes, **how).memory_analysis().temp_size_in_bytes


def rows_of_logits(text):
    """How many logits of all V columns the largest array has."""
    return max(int(np.prod(dims)) // V for dims in hlo.sizes(text) if V in dims[1:])


def test_no_array_has_the_logits_of_all_tokens():
    tokens, chunk_size = 64, 9
    assert rows_of_logits(compiled(tokens, chunk_size).as_text()) <= 3 * chunk_size
    text = jax.jit(jax.grad(lambda *x: dense(*x)[0])).lower(*problem(tokens=tokens))
    assert rows_of_logits(text.compile().as_text()) >= tokens


def test_no_matmul_with_the_head_is_done_twice():
    """Student and teacher forward, the head's gradient, the hidden states'."""
    text = compiled(64, 9).as_text()
    results = re.findall(r"f32\[(\d+),(\d+)\]\S* dot\(", text)
    counted = collections.Counter(tuple(map(int, dims)) for dims in results)
    logits = {(9, V), (V, 9)}  # as columns, where they are few
    assert sum(counted[dims] for dims in logits) == 2
    assert counted[V, D] == counted[9, D] == 1
    assert not any(V in dims for dims in counted.keys() - {*logits, (V, D)})


def test_memory_does_not_grow_with_the_tokens():
    """Nothing of them is copied: each chunk adds a value and four sums to a list."""
    few, chunks = 64, 8
    grown = plan(17 * few, 9) - plan(few, 9)
    assert grown <= 16 * chunks * 5 * 4 + 1024
    assert 16 * few * D * 4 > 2 * (16 * chunks * 5 * 4 + 1024)  # no room for states


def test_logits_read_in_parts_are_two_arrays():
    """The student's, in whose place is their gradient, and the teacher's."""

    def plain(head, hidden):
        return project(hidden, head["kernel"])

    def arrays(**how):
        many, few = (plan(256, size, unembed=plain, **how) for size in (129, 65))
        return (many - few) / (64 * V * 4)

    assert arrays(rows=4) <= 2.2
    assert arrays() >= 5
