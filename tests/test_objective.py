"""The three means of a step against float64 numpy, and what must not change them."""

import dataclasses
import functools
import inspect
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from losses import hlo
from tiny import LLAMA

from mgsr_jax import losses, models, sharding
from mgsr_jax.objective import (
    DIVERGENCES,
    SETTINGS,
    Chunk,
    Objective,
    at_bound,
    logits_loss,
    micro_batch_loss,
    position_weights,
)
from mgsr_jax.rows import from_lists, next_token_view, with_width
from mgsr_jax.train_step import init_state, make_train_step

VOCAB, COLUMNS, WIDTH, K = 11, 13, 10, 6
# (prompt, response) lengths; the last two rows have nothing to score.
LENGTHS = ((2, 5), (1, 9), (3, 1), (4, 6), (5, 3), (1, 2), (1, 0), (10, 0))
NOT_TRUE = (1, 4)  # rows that the student wrote


@dataclasses.dataclass(frozen=True)
class Table:
    """A model whose logits are its parameters: `logits[id]` of the row's first token.

    So a row's logits travel with it, into whatever micro-batch it goes.
    """

    name: str = "table"

    @property
    def config(self):
        return types.SimpleNamespace(vocab_size=COLUMNS)

    def forward(self, params, tokens, *, positions=None, cache=None):
        return params["logits"][tokens[:, 0]], None

    def head_params(self, params):
        return {}

    def unembed(self, head, hidden):
        return hidden

    def init_cache(self, batch, length, dtype):
        raise NotImplementedError

    def decode_params(self, params, dtype):
        raise NotImplementedError


class NeverAsked(Table):
    """A teacher that must not be evaluated."""

    def forward(self, params, tokens, *, positions=None, cache=None):
        raise AssertionError("the teacher was evaluated")


def make_rows():
    """Eight ragged rows, row i beginning with token i."""
    rng = np.random.default_rng(3)
    rows = from_lists(
        [
            [i, *rng.integers(0, VOCAB, p - 1).tolist()]
            for i, (p, _) in enumerate(LENGTHS)
        ],
        [rng.integers(0, VOCAB, r).tolist() for _, r in LENGTHS],
        width=WIDTH,
        span_ids=[np.sort(rng.integers(-1, 3, r)).tolist() for _, r in LENGTHS],
    )
    rows.ground_truth[list(NOT_TRUE)] = False
    return jax.tree.map(jnp.asarray, rows)


def logits(seed):
    rng = np.random.default_rng(seed)
    table = rng.normal(0, 2, (len(LENGTHS), WIDTH - 1, COLUMNS))
    return {"logits": jnp.asarray(table, jnp.float32)}


ROWS, STUDENT, TEACHER = make_rows(), logits(0), logits(1)
CLIP = losses.init_clip_network(jax.random.key(0), num_candidates=K, hidden=8)
# Zero weights in the last layer would hide the network from its own gradient.
CLIP["output"]["kernel"] = jnp.asarray(
    np.random.default_rng(2).normal(0, 0.3, (8, 2)), jnp.float32
)
PARAMS = {"student": STUDENT, "clip_network": CLIP}
MGSR = Objective(num_candidates=K)


def weighted_sum(params, teacher_params, rows, objective, teacher, dtype=jnp.float32):
    """Loss and metrics of a step of one micro-batch."""
    return micro_batch_loss(
        params,
        teacher_params,
        rows,
        position_weights(rows, objective),
        student=Table(),
        teacher=teacher,
        objective=objective,
        vocab_size=VOCAB,
        dtype=dtype,
    )


STATIC = ("objective", "teacher", "dtype")
values = jax.jit(weighted_sum, static_argnames=STATIC)
with_gradients = jax.jit(
    jax.value_and_grad(weighted_sum, (0, 1), has_aux=True), static_argnames=STATIC
)


def evaluate(objective=MGSR, *, rows=ROWS, student=STUDENT, teacher=TEACHER):
    """(loss, metrics)"""
    params = {"student": student, "clip_network": CLIP}
    return values(params, teacher, rows, objective, Table("teacher"))


def differentiate(objective=MGSR, *, rows=ROWS, student=STUDENT, teacher=TEACHER):
    """(loss, metrics, gradient, gradient of the teacher)"""
    params = {"student": student, "clip_network": CLIP}
    (loss, metrics), grads = with_gradients(
        params, teacher, rows, objective, Table("teacher")
    )
    return loss, metrics, *grads


def log_softmax(table):
    """float64, over the real vocabulary."""
    x = np.asarray(table, np.float64)[..., :VOCAB]
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def scored(rows=ROWS):
    """(row, t) of every label that belongs to a response, from the lengths."""
    lengths = zip(rows.prompt_lengths.tolist(), rows.lengths.tolist(), strict=True)
    return [(b, t) for b, (p, n) in enumerate(lengths) for t in range(p - 1, n - 1)]


def pairs():
    """(row, t) where the labels of t and t + 1 stand in one phrase."""
    span_ids, at = np.asarray(ROWS.span_ids), scored()
    return [
        (b, t)
        for b, t in at
        if (b, t + 1) in at and span_ids[b, t + 1] == span_ids[b, t + 2] != -1
    ]


def mean_cross_entropy(at):
    log_q, tokens = log_softmax(STUDENT["logits"]), np.asarray(ROWS.tokens)
    return -np.mean([log_q[b, t, tokens[b, t + 1]] for b, t in at])


def mean_forward_kl(temperature=1.0):
    log_p, log_q = (
        log_softmax(np.asarray(table["logits"], np.float64) / temperature)
        for table in (TEACHER, STUDENT)
    )
    kl = np.sum(np.exp(log_p) * (log_p - log_q), -1)
    return np.mean([kl[b, t] for b, t in scored()])


def mean_span():
    p, q = (np.exp(log_softmax(table["logits"])) for table in (TEACHER, STUDENT))
    return np.mean(
        [
            np.linalg.norm(p[b, t] * p[b, t + 1] - q[b, t] * q[b, t + 1])
            for b, t in pairs()
        ]
    )


def mean_dac_kl(per_position):
    """Its values are tested in tests/losses; the mean over the response is ours."""
    values = np.asarray(
        per_position(STUDENT["logits"], TEACHER["logits"], vocab_size=VOCAB).loss
    ).astype(np.float64)
    return np.mean([values[b, t] for b, t in scored()])


def labelled():
    return [(b, t) for b, t in scored() if b not in NOT_TRUE]


def test_the_rows_of_this_file_tell_the_three_counts_apart():
    assert len(scored()) == 26 and len(labelled()) == 14
    assert 4 < len(pairs()) < len(labelled())


def test_the_loss_is_the_sum_of_three_means_over_their_own_counts():
    loss, metrics = evaluate()
    sft, span = mean_cross_entropy(labelled()), mean_span()
    dac_kl = mean_dac_kl(functools.partial(losses.dac_kl, CLIP))
    np.testing.assert_allclose(loss, sft + dac_kl + span, rtol=2e-6)
    for name, mean, count in (
        ("sft", sft, len(labelled())),
        ("dac_kl", dac_kl, len(scored())),
        ("span", span, len(pairs())),
    ):
        assert metrics[name].count == count
        np.testing.assert_allclose(metrics[name].total, mean * count, rtol=2e-6)
    assert metrics["kept_mass"].count == len(scored())


def test_the_weights_count_three_times():
    objective = dataclasses.replace(MGSR, sft=0.5, token=2.0, span=3.0)
    want = (
        0.5 * mean_cross_entropy(labelled())
        + 2.0 * mean_dac_kl(functools.partial(losses.dac_kl, CLIP))
        + 3.0 * mean_span()
    )
    np.testing.assert_allclose(evaluate(objective)[0], want, rtol=2e-6)


@pytest.mark.parametrize(
    ("changes", "token"),
    [
        ({"divergence": "forward_kl"}, mean_forward_kl),
        (
            {"divergence": "forward_kl", "temperature": 2.5},
            functools.partial(mean_forward_kl, 2.5),
        ),
        (
            {"divergence": "dac_kl_fixed", "lower": 0.2, "upper": 0.9, "width": 0.05},
            lambda: mean_dac_kl(
                functools.partial(
                    losses.dac_kl_fixed, (0.2, 0.9), num_candidates=K, width=0.05
                )
            ),
        ),
        (
            {"normalization": "none", "prior_weight": 3.0},
            lambda: mean_dac_kl(
                functools.partial(
                    losses.dac_kl, CLIP, normalization="none", prior_weight=3.0
                )
            ),
        ),
    ],
)
def test_every_divergence_is_averaged_over_all_responses(changes, token):
    objective = dataclasses.replace(MGSR, sft=0.0, span=0.0, **changes)
    loss, metrics = evaluate(objective)
    np.testing.assert_allclose(loss, token(), rtol=2e-6)
    assert {"sft", "span"}.isdisjoint(metrics)
    assert metrics[objective.divergence].count == len(scored())


@pytest.mark.parametrize(
    ("divergence", "settings"),
    [
        ("reverse_kl", {}),
        ("symmetric_kl", {"temperature": 2.0}),
        ("total_variation", {}),
        ("jensen_shannon", {"beta": 0.1}),
        ("skewed_forward_kl", {"alpha": 0.3}),
        ("skewed_reverse_kl", {"alpha": 0.3, "temperature": 2.0}),
        ("adaptive_kl", {"head_mass": 0.7}),
        ("alpha_beta_divergence", {"alpha": 0.4, "beta": 0.5}),
        ("taid", {"mix": 0.3}),
    ],
)
def test_any_divergence_may_stand_in_the_token_level(divergence, settings):
    objective = Objective(sft=0.0, span=0.0, divergence=divergence, **settings)
    tables = STUDENT["logits"], TEACHER["logits"]
    per_token = getattr(losses, divergence)(*tables, vocab_size=VOCAB, **settings)
    want = np.mean([np.asarray(per_token)[b, t] for b, t in scored()])
    loss, metrics = evaluate(objective)
    np.testing.assert_allclose(loss, want, rtol=2e-6)
    assert metrics[divergence].count == len(scored())


def test_every_divergence_of_the_library_can_be_chosen():
    own = {"dac_kl", "dac_kl_fixed"}
    assert set(SETTINGS) < set(DIVERGENCES) - own
    for name in DIVERGENCES:
        read = set(inspect.signature(getattr(losses, name)).parameters)
        shared = {"student_logits", "teacher_logits", "where", "vocab_size"}
        given = {*SETTINGS.get(name, ()), "temperature"}
        assert name in own or read == shared | given | {"vocab_axis"}


def top_k(k):
    return losses.top_k_teacher(TEACHER["logits"], k, vocab_size=VOCAB)


def cached_loss(objective, said, teacher_params=None):
    """Loss and gradient where what it said stands for running the teacher."""

    def loss(params):
        return micro_batch_loss(
            params,
            teacher_params,
            ROWS,
            position_weights(ROWS, objective),
            student=Table(),
            teacher=NeverAsked(),
            objective=objective,
            vocab_size=VOCAB,
            cached=said,
            chunk_size=9,
        )

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(PARAMS)


@pytest.mark.parametrize("divergence", ["forward_kl", "dac_kl", "dac_kl_fixed"])
def test_a_cached_teacher_of_all_classes_is_the_teacher(divergence):
    objective = Objective(span=0.0, divergence=divergence, num_candidates=K)
    (loss, metrics), grads = cached_loss(objective, top_k(VOCAB))
    want, want_metrics, want_grads, _ = differentiate(objective)
    np.testing.assert_allclose(loss, want, rtol=2e-6)
    assert metrics.keys() == want_metrics.keys()
    assert_close(grads["student"], want_grads["student"], rtol=3e-6)


def test_of_a_cached_teacher_only_what_it_can_tell_is_asked():
    with pytest.raises(ValueError, match="objective.span compares whole"):
        cached_loss(MGSR, top_k(K))
    with pytest.raises(ValueError, match="'reverse_kl' needs the teacher's whole"):
        cached_loss(Objective(span=0.0, divergence="reverse_kl"), top_k(K))
    with pytest.raises(ValueError, match="temperature=2.0; a cached teacher"):
        hot = Objective(span=0.0, divergence="forward_kl", temperature=2.0)
        cached_loss(hot, top_k(K))


def test_hidden_states_that_the_teacher_left_stand_for_running_it():
    """They have one position more than is predicted."""
    heard = jnp.pad(TEACHER["logits"], ((0, 0), (0, 1), (0, 0)))
    (loss, metrics), grads = cached_loss(MGSR, heard, TEACHER)
    want, want_metrics, want_grads, _ = differentiate(MGSR)
    np.testing.assert_allclose(loss, want, rtol=2e-6)
    assert metrics.keys() == want_metrics.keys()
    assert_close(grads["student"], want_grads["student"], rtol=3e-6)


@pytest.mark.parametrize("chunk_size", [2, 7, 72])
def test_the_chunks_do_not_change_the_loss(chunk_size):
    """Pairs across the border of chunks count, those across rows do not."""

    def loss(params):
        weights = position_weights(ROWS, MGSR)
        models = dict(student=Table(), teacher=Table("teacher"), objective=MGSR)
        return micro_batch_loss(
            params,
            TEACHER,
            ROWS,
            weights,
            vocab_size=VOCAB,
            chunk_size=chunk_size,
            **models,
        )

    (loss, metrics), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(PARAMS)
    want, want_metrics, want_grads, _ = differentiate()
    np.testing.assert_allclose(loss, want, rtol=2e-6)
    assert_close(jax.device_get(grads), jax.device_get(want_grads), rtol=3e-6)
    assert_close(jax.device_get(metrics), jax.device_get(want_metrics), rtol=2e-6)


@dataclasses.dataclass(frozen=True)
class Headed(Table):
    """Hidden states are the table's; the head has a matrix and a bias."""

    def head_params(self, params):
        return {"kernel": params["kernel"], "bias": params["bias"]}

    def unembed(self, head, hidden):
        logits = losses.project(hidden, head["kernel"])
        return logits + jnp.broadcast_to(head["bias"], logits.shape)


@pytest.mark.parametrize("chunk_size", [3, 8])
def test_chunks_of_a_model_with_a_biased_head_are_the_dense_form(chunk_size):
    """The dense form is the function of a chunk's logits, once, on all of them."""
    rng = np.random.default_rng(5)
    kernel = jnp.asarray(rng.normal(0, 0.3, (COLUMNS, COLUMNS)), jnp.float32)
    params = {
        "student": STUDENT | {"kernel": kernel, "bias": jnp.linspace(-1, 1, COLUMNS)},
        "clip_network": CLIP,
    }
    weights, settings = (
        position_weights(ROWS, MGSR),
        dict(
            student=Headed(), teacher=Table("teacher"), objective=MGSR, vocab_size=VOCAB
        ),
    )

    def in_chunks(params):
        return micro_batch_loss(
            params, TEACHER, ROWS, weights, chunk_size=chunk_size, **settings
        )

    def dense(params):
        view = next_token_view(ROWS)
        hidden, _ = Headed().forward(params["student"], view.inputs)
        logits = Headed().unembed(Headed().head_params(params["student"]), hidden)
        said, _ = Table().forward(TEACHER, view.inputs)
        labelled = view.where & ROWS.ground_truth[:, None]
        pairs = losses.span_pairs(view.span_ids, view.where)
        masks = (view.where, view.where, labelled, pairs)
        chunk = Chunk(view.labels, view.span_ids, *masks, weights, said)

        def in_a_row(x):  # with a gap: no pair lies across two rows
            x = jnp.pad(x, ((0, 0), (0, 1)) + ((0, 0),) * (x.ndim - 2))
            return x.reshape(-1, *x.shape[2:])

        logits, chunk = jax.tree.map(in_a_row, (logits, chunk))
        dense = dict(vocab_size=VOCAB, overlap=0, score_teacher=False)
        clip = params["clip_network"]
        return logits_loss(clip, logits, chunk, objective=MGSR, **dense)

    def run(function):
        return jax.jit(jax.value_and_grad(function, has_aux=True))(params)

    (loss, _), grads = run(in_chunks)
    (want, _), want_grads = run(dense)
    np.testing.assert_allclose(loss, want, rtol=2e-6)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(want_grads))
    assert_close(jax.device_get(grads), jax.device_get(want_grads), rtol=3e-6)


def test_an_unknown_divergence_is_refused():
    with pytest.raises(ValueError, match="divergence='reverse'.*'dac_kl_fixed'"):
        # Types are checked under pytest and nowhere else.
        objective = dataclasses.replace(MGSR)
        object.__setattr__(objective, "divergence", "reverse")
        evaluate(objective)


@pytest.mark.parametrize("part", ["sft", "token", "span"])
def test_a_part_of_weight_zero_is_not_there(part):
    whole, parts = evaluate()[0], {}
    for name in ("sft", "token", "span"):
        only = dataclasses.replace(MGSR, sft=0.0, token=0.0, span=0.0)
        parts[name] = evaluate(dataclasses.replace(only, **{name: 1.0}))[0]
    loss, metrics = evaluate(dataclasses.replace(MGSR, **{part: 0.0}))
    np.testing.assert_allclose(loss, sum(parts.values()) - parts[part], rtol=2e-6)
    assert loss < whole
    assert ("dac_kl" if part == "token" else part) not in metrics


def test_padding_changes_neither_loss_nor_gradient():
    """Rows of 10 tokens at most, without padding and with twice their width."""
    (student, params), (teacher, teacher_params) = tiny.llama(0), tiny.llama(1)
    host = jax.tree.map(np.asarray, tiny.complete())
    objective = dataclasses.replace(MGSR, divergence="forward_kl")

    @jax.value_and_grad
    def loss_of(params, rows):
        return micro_batch_loss(
            {"student": params},
            teacher_params,
            rows,
            position_weights(rows, objective),
            student=student,
            teacher=teacher,
            objective=objective,
            vocab_size=None,
        )[0]

    found = [
        jax.jit(loss_of)(params, jax.tree.map(jnp.asarray, with_width(host, width)))
        for width in (10, 20)
    ]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), *found
    )


def test_the_teacher_is_not_asked_where_nothing_compares_with_it():
    sft = Objective(token=0.0, span=0.0)
    loss, _ = values(PARAMS, TEACHER, ROWS, sft, NeverAsked())
    np.testing.assert_allclose(loss, mean_cross_entropy(labelled()), rtol=2e-6)
    with pytest.raises(AssertionError, match="the teacher was evaluated"):
        values(PARAMS, TEACHER, ROWS, MGSR, NeverAsked())


def test_a_missing_teacher_is_an_error_and_not_plain_fine_tuning():
    with pytest.raises(ValueError, match="compare with a teacher.*None"):
        values(PARAMS, None, ROWS, MGSR, None)


def test_student_equal_to_teacher_has_no_forward_kl_and_no_span_loss():
    objective = Objective(sft=0.0, divergence="forward_kl")
    loss, _, grads, _ = differentiate(objective, teacher=STUDENT)
    assert abs(loss) < 1e-7
    assert jnp.abs(grads["student"]["logits"]).max() < 1e-7


def test_the_clip_network_learns_and_the_teacher_does_not():
    _, _, grads, teacher_grads = differentiate()
    assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(grads["clip_network"]))
    assert not jnp.any(teacher_grads["logits"])


def test_only_scored_positions_have_a_gradient():
    """Also none of them lacks one; the columns beyond the vocabulary have none."""
    grads = np.asarray(differentiate()[2]["student"]["logits"])
    moved = {tuple(index) for index in np.argwhere(np.any(grads != 0, -1)).tolist()}
    assert moved == set(scored())
    assert not grads[..., VOCAB:].any()


def test_what_stands_at_unscored_positions_changes_nothing():
    where = np.asarray(next_token_view(ROWS).where)[..., None]
    rng = np.random.default_rng(7)

    def spoil(table):
        noise = rng.choice([np.nan, np.inf, -np.inf, 1e30], table["logits"].shape)
        return {"logits": jnp.where(where, table["logits"], jnp.float32(noise))}

    beyond = np.arange(WIDTH) >= np.asarray(ROWS.lengths)[:, None]
    tokens = jnp.where(beyond, rng.integers(0, VOCAB, beyond.shape), ROWS.tokens)
    spoilt = differentiate(
        rows=dataclasses.replace(ROWS, tokens=tokens.astype(jnp.int32)),
        student=spoil(STUDENT),
        teacher=spoil(TEACHER),
    )
    jax.tree.map(np.testing.assert_array_equal, spoilt, differentiate())


def test_what_stands_at_scored_positions_changes_the_loss():
    before = evaluate()[0]
    for b, t in scored():
        table = np.array(STUDENT["logits"])
        table[b, t, :VOCAB] = table[b, t, VOCAB - 1 :: -1]
        assert evaluate(student={"logits": jnp.asarray(table)})[0] != before, (b, t)


def test_a_perfect_student_of_the_labels_has_no_cross_entropy():
    """Labels are the next tokens: a student that predicts them loses nothing."""
    labels = np.asarray(ROWS.tokens)[:, 1:]
    perfect = {"logits": 50.0 * jax.nn.one_hot(labels, COLUMNS)}
    assert evaluate(Objective(token=0.0, span=0.0), student=perfect)[0] < 1e-6


def test_a_step_with_nothing_to_score_is_finite_and_moves_nothing():
    empty = dataclasses.replace(ROWS, lengths=ROWS.prompt_lengths)
    loss, metrics, grads, _ = differentiate(rows=empty)
    assert loss == 0
    assert not any(jnp.any(leaf != 0) for leaf in jax.tree.leaves(grads))
    assert all(s.total == 0 and s.count == 0 for s in metrics.values())


def test_no_ground_truth_leaves_the_labels_out():
    written = dataclasses.replace(ROWS, ground_truth=jnp.zeros(8, bool))
    loss, metrics = evaluate(rows=written)
    without, _ = evaluate(dataclasses.replace(MGSR, sft=0.0))
    np.testing.assert_allclose(loss, without, rtol=1e-6)
    assert metrics["sft"] == (0, 0)


def test_half_precision_gives_float32_losses_and_gradients():
    (loss, metrics), (grads, _) = with_gradients(
        PARAMS, TEACHER, ROWS, MGSR, Table("teacher"), jnp.bfloat16
    )
    leaves = jax.tree.leaves((loss, metrics, grads))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}
    np.testing.assert_allclose(loss, evaluate()[0], rtol=1e-2)


def test_at_bound_marks_limits_that_ran_to_an_end():
    lower = jnp.array([0.001, 0.1, 0.499, 0.1, 0.1])
    upper = jnp.array([0.98, 0.98, 0.98, 0.501, 0.999])
    assert at_bound(lower, upper).tolist() == [1, 0, 1, 1, 1]


def recorder():
    """An optimizer that moves nothing and keeps the gradient as its state."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda grads, state, params=None: (jax.tree.map(jnp.zeros_like, grads), grads),
    )


def gradient_of(split, *, student, teacher, params, teacher_params, vocab_size):
    """(loss, gradient, metrics) of one train step over the micro-batches `split`."""
    # The step donates its state, and the caller's parameters are used again.
    state = init_state(jax.tree.map(jnp.array, params), recorder(), 0)
    step = make_train_step(student, teacher, recorder(), MGSR, vocab_size=vocab_size)
    state, metrics = step(state, teacher_params, split)
    loss = metrics.pop("loss").total
    return jax.device_get((loss, state.opt_state, metrics))


def split(rows, parts):
    """Micro-batches that take turns with the rows, so that the last is all masked."""
    size = rows.lengths.shape[0] // parts
    return tuple(
        jax.tree.map(lambda x, i=i: x[i * size : (i + 1) * size], rows)
        for i in range(parts)
    )


def assert_close(got, want, rtol=1e-6):
    """Leaf by leaf, relative to the leaf's norm."""

    def close(path, a, b):
        scale = np.linalg.norm(b)
        assert np.linalg.norm(a - b) <= rtol * scale, jax.tree_util.keystr(path)

    jax.tree_util.tree_map_with_path(close, got, want)


TABLES = dict(
    student=Table(),
    teacher=Table("teacher"),
    params=PARAMS,
    teacher_params=TEACHER,
    vocab_size=VOCAB,
)


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_micro_batches_do_not_change_the_gradient(parts):
    """Ragged rows; of 4 parts one and of 8 two have nothing to score."""
    loss, grads, metrics = gradient_of(split(ROWS, parts), **TABLES)
    whole, _, want, _ = differentiate()
    np.testing.assert_allclose(loss, whole, rtol=1e-6)
    assert_close(grads, jax.device_get(want))
    for name, count in (("sft", 14), ("dac_kl", 26), ("span", len(pairs()))):
        assert metrics[name].count == count


def on_mesh(mesh, rows, parts):
    """The micro-batches of `rows` as the trainer puts them onto a mesh."""
    return tuple(
        sharding.put_batch(mesh, jax.tree.map(np.asarray, part))
        for part in split(rows, parts)
    )


def test_eight_devices_do_not_change_the_gradient():
    """A row a device: two have nothing to score, others no label."""
    mesh = sharding.make_mesh(8)
    with jax.set_mesh(mesh):
        everywhere = jax.device_put((PARAMS, TEACHER), sharding.replicated(mesh))
        settings = TABLES | dict(params=everywhere[0], teacher_params=everywhere[1])
        loss, grads, _ = gradient_of(on_mesh(mesh, ROWS, 1), **settings)
    whole, _, want, _ = differentiate()
    np.testing.assert_allclose(loss, whole, rtol=1e-6)
    assert_close(grads, jax.device_get(want))


def test_a_step_never_has_the_logits_of_all_tokens():
    """83 columns: the size of nothing else in these models and rows."""
    model = models.from_config(LLAMA | {"vocab_size": 83})
    params = {"student": model.init(jax.random.key(0)), "clip_network": CLIP}
    rows = tiny.complete([*LENGTHS[:4]], width=12)

    def logits_at_once(chunk_size):
        step = make_train_step(
            model, model, recorder(), MGSR, vocab_size=VOCAB, chunk_size=chunk_size
        )
        state = init_state(jax.tree.map(jnp.array, params), recorder(), 0)
        text = step.lower(state, params["student"], (rows,)).compile().as_text()
        shapes = [dims for dims in hlo.sizes(text) if 83 in dims[1:]]
        return max(math.prod(dims) // 83 for dims in shapes)

    tokens = 4 * 11
    assert logits_at_once(7) < 2 * 7 < tokens <= logits_at_once(tokens + 1)


# Of the last, four tensor parts share each of two key and value heads.
@pytest.mark.parametrize("sizes", [(2, 4, 1), (2, 2, 2), (1, 1, 8), (1, 2, 4)])
def test_sharded_transformers_do_not_change_the_gradient(sizes):
    """Copies that are split in every way, in two micro-batches; one device."""
    model = models.from_config(LLAMA | {"num_attention_heads": 8})
    model = dataclasses.replace(model, tensor=sizes[2])
    params = jax.jit(model.init)(jax.random.key(0))
    teacher_params = jax.tree.map(lambda p: p[..., ::-1], params)
    rows = tiny.complete([*LENGTHS, *[(3, 4)] * 8], width=12)
    truth = jnp.arange(16) % 2 == 0
    rows = dataclasses.replace(rows, ground_truth=truth)
    settings = dict(student=model, teacher=model, vocab_size=tiny.VOCAB)
    settings["params"] = {"student": params, "clip_network": CLIP}
    settings["teacher_params"] = teacher_params
    whole = gradient_of(split(rows, 1), **settings)

    mesh = sharding.make_mesh(*sizes)
    places = sharding.shardings(mesh, model.partition_rules, params)
    settings["params"] = {
        "student": jax.device_put(params, places),
        "clip_network": jax.device_put(CLIP, sharding.replicated(mesh)),
    }
    settings["teacher_params"] = jax.device_put(teacher_params, places)
    with jax.set_mesh(mesh):
        loss, grads, metrics = gradient_of(on_mesh(mesh, rows, 2), **settings)
    np.testing.assert_allclose(loss, whole[0], rtol=1e-6)
    # Two orders of summation through two layers in float32: 16 units of rounding.
    assert_close(grads, whole[1], rtol=16 * np.finfo(np.float32).eps)
    for name in ("sft", "dac_kl", "span", "kept_mass"):
        assert metrics[name].count == whole[2][name].count
        np.testing.assert_allclose(metrics[name].total, whole[2][name].total, rtol=1e-6)
