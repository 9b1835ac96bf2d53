"""A micro-batch's objective, whatever its chunks, micro-batches and devices."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from losses import hlo
from tables import (
    CLIP,
    COLUMNS,
    LENGTHS,
    MGSR,
    PARAMS,
    ROWS,
    STUDENT,
    TEACHER,
    VOCAB,
    K,
    NeverRun,
    Table,
    assert_close,
    differentiate,
    evaluate,
    pairs,
    values,
    with_gradients,
)
from tiny import LLAMA

from mgsr_jax import losses, models, sharding
from mgsr_jax.loss_targets import make_targets
from mgsr_jax.objective import Objective, position_weights
from mgsr_jax.rows import (
    NO_SPAN,
    UNTRAINED,
    from_lists,
    next_token_view,
    with_width,
)
from mgsr_jax.step_loss import StepLoss, micro_batch_loss
from mgsr_jax.train_step import init_state, make_train_step
from mgsr_jax.weighted_sum import weighted_sum


def top_k(k):
    return losses.top_k_teacher(TEACHER["logits"], k, vocab_size=VOCAB)


def loss_with_outputs(objective, teacher_outputs, teacher_params=None):
    """Loss and gradient with teacher outputs in place of running the teacher."""
    spec = StepLoss(Table(), NeverRun(), objective, VOCAB, chunk_size=9)

    def loss(params):
        return micro_batch_loss(
            params,
            teacher_params,
            ROWS,
            position_weights(ROWS, objective),
            spec=spec,
            teacher_outputs=teacher_outputs,
        )

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(PARAMS)


@pytest.mark.slow
@pytest.mark.parametrize("divergence", ["forward_kl", "dac_kl", "dac_kl_fixed"])
def test_a_cached_teacher_of_all_classes_equals_the_teacher(divergence):
    objective = Objective(span=0.0, divergence=divergence, num_candidates=K)
    (loss, metrics), grads = loss_with_outputs(objective, top_k(VOCAB))
    want, want_metrics, want_grads, _ = differentiate(objective)
    np.testing.assert_allclose(loss, want, rtol=2e-6)
    assert metrics.keys() == want_metrics.keys()
    assert_close(grads["student"], want_grads["student"], rtol=3e-6)


@pytest.mark.slow
def test_a_cached_teacher_scores_only_the_data_s_rows_of_a_pair():
    rows = jax.tree.map(lambda x: x, ROWS)
    paired = Objective(
        span=0.0, divergence="forward_kl", sample_divergence="reverse_kl"
    )
    step = make_train_step(Table(), Table("teacher"), optax.sgd(1.0), paired)
    data, samples = (
        dataclasses.replace(rows, ground_truth=jnp.full(len(LENGTHS), truth))
        for truth in (True, False)
    )
    outputs = losses.top_k_teacher(TEACHER["logits"], TEACHER["logits"].shape[-1])
    found = []
    for of_data in (None, outputs):
        state = init_state(jax.tree.map(jnp.array, PARAMS), optax.sgd(1.0), seed=0)
        new, metrics = step(state, TEACHER, (data, samples), (of_data, None))
        found.append((jax.device_get(new.params), jax.device_get(metrics)))
    assert_close(found[0], found[1], rtol=3e-6)
    assert found[0][1]["reverse_kl"].count == found[0][1]["forward_kl"].count == 26


def test_losses_that_need_more_than_a_cached_teacher_are_errors():
    with pytest.raises(ValueError, match="objective.span compares whole"):
        loss_with_outputs(MGSR, top_k(K))
    with pytest.raises(ValueError, match="'reverse_kl' needs the teacher's whole"):
        loss_with_outputs(Objective(span=0.0, divergence="reverse_kl"), top_k(K))
    with pytest.raises(ValueError, match="temperature=2.0, but a cached teacher"):
        hot = Objective(span=0.0, divergence="forward_kl", temperature=2.0)
        loss_with_outputs(hot, top_k(K))
    for weights in ("teacher_entropy", "acceptance", "discrepancy"):
        settings = dict(span=0.0, divergence="forward_kl", token_weights=weights)
        with pytest.raises(ValueError, match=f"{weights}.* needs the teacher's whole"):
            loss_with_outputs(Objective(**settings), top_k(K))


@pytest.mark.slow
def test_given_hidden_states_equal_running_the_teacher():
    """They have one position more than there are labels."""
    hidden = jnp.pad(TEACHER["logits"], ((0, 0), (0, 1), (0, 0)))
    (loss, metrics), grads = loss_with_outputs(MGSR, hidden, TEACHER)
    want, want_metrics, want_grads, _ = differentiate(MGSR)
    np.testing.assert_allclose(loss, want, rtol=2e-6)
    assert metrics.keys() == want_metrics.keys()
    assert_close(grads["student"], want_grads["student"], rtol=3e-6)


@pytest.mark.parametrize("chunk_size", [2, 7, 72])
def test_chunks_do_not_change_the_loss(chunk_size):
    """Pairs across two chunks count, pairs across two rows do not."""

    spec = StepLoss(Table(), Table("teacher"), MGSR, VOCAB, chunk_size=chunk_size)

    def loss(params):
        weights = position_weights(ROWS, MGSR)
        return micro_batch_loss(params, TEACHER, ROWS, weights, spec=spec)

    (loss, metrics), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(PARAMS)
    want, want_metrics, want_grads, _ = differentiate()
    np.testing.assert_allclose(loss, want, rtol=2e-6)
    assert_close(jax.device_get(grads), jax.device_get(want_grads), rtol=3e-6)
    assert_close(jax.device_get(metrics), jax.device_get(want_metrics), rtol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"divergence": "entropy_gated_kl"},
        {"divergence": "per_class_kl"},
        {"divergence": "logit_difference", "alpha": 0.5},
        {"divergence": "reverse_kl_top_k", "top_k": 3, "support": "union"},
        {"divergence": "sampled_reverse_kl"},
        {"divergence": "reverse_kl", "token_weights": "acceptance"},
        {
            "divergence": "skewed_forward_kl",
            "sample_divergence": "skewed_reverse_kl",
        },
    ],
    ids=lambda settings: settings["divergence"],
)
def test_chunks_do_not_change_a_gradient(settings):
    """The dense form is the sum itself, once, on all logits."""
    objective = Objective(sft=0.0, span=0.0, **settings)
    weights = position_weights(ROWS, objective)
    spec = StepLoss(Table(), Table("teacher"), objective, VOCAB, chunk_size=7)

    def in_chunks(params):
        return micro_batch_loss(params, TEACHER, ROWS, weights, spec=spec)

    def dense(params):
        logits = params["student"]["logits"], TEACHER["logits"]
        targets = make_targets(ROWS, weights, objective)
        return weighted_sum(None, *logits, targets, objective, vocab_size=VOCAB)

    (got, grads), (want, want_grads) = (
        jax.jit(jax.value_and_grad(f, has_aux=True))(PARAMS) for f in (in_chunks, dense)
    )
    assert_close(jax.device_get(got), jax.device_get(want), rtol=2e-6)
    assert np.any(want_grads["student"]["logits"])
    assert_close(grads["student"], want_grads["student"], rtol=3e-6)


DRIFTING = Objective(
    span=0.0, divergence="forward_kl", token_weights="discrepancy", weight_gain=2.0
)


@pytest.mark.slow
@pytest.mark.parametrize("chunk_size", [2, 30])
def test_chunks_do_not_change_weights_that_read_a_whole_row(chunk_size):
    """Logits of less than a position of all rows, and of three with a shifted last."""
    spec = StepLoss(Table(), Table("teacher"), DRIFTING, VOCAB, chunk_size=chunk_size)

    def loss(params):
        weights = position_weights(ROWS, DRIFTING)
        return micro_batch_loss(params, TEACHER, ROWS, weights, spec=spec)[0]

    got, grads = jax.jit(jax.value_and_grad(loss))(PARAMS)
    want, _, want_grads, _ = differentiate(DRIFTING)
    np.testing.assert_allclose(got, want, rtol=2e-6)
    assert_close(grads["student"], want_grads["student"], rtol=3e-6)
    uniform, _ = evaluate(dataclasses.replace(DRIFTING, token_weights="uniform"))
    assert want > uniform + 0.1


@dataclasses.dataclass(frozen=True)
class Headed(Table):
    """Hidden states are the table's; the head has a matrix and a bias."""

    def head_params(self, params):
        return {"kernel": params["kernel"], "bias": params["bias"]}

    def unembed(self, head, hidden):
        logits = losses.project(hidden, head["kernel"])
        return logits + jnp.broadcast_to(head["bias"], logits.shape)


@pytest.mark.slow
@pytest.mark.parametrize("chunk_size", [3, 8])
def test_chunks_of_a_model_with_a_biased_head_equal_the_dense_form(chunk_size):
    """The dense form is the objective itself, once, on all logits."""
    rng = np.random.default_rng(5)
    kernel = jnp.asarray(rng.normal(0, 0.3, (COLUMNS, COLUMNS)), jnp.float32)
    params = {
        "student": STUDENT | {"kernel": kernel, "bias": jnp.linspace(-1, 1, COLUMNS)},
        "clip_network": CLIP,
    }
    weights = position_weights(ROWS, MGSR)
    spec = StepLoss(Headed(), Table("teacher"), MGSR, VOCAB, chunk_size=chunk_size)

    def in_chunks(params):
        return micro_batch_loss(params, TEACHER, ROWS, weights, spec=spec)

    def dense(params):
        view = next_token_view(ROWS)
        hidden, _ = Headed().forward(params["student"], view.inputs)
        logits = Headed().unembed(Headed().head_params(params["student"]), hidden)
        teacher_logits, _ = Table().forward(TEACHER, view.inputs)
        return weighted_sum(
            params["clip_network"],
            logits,
            teacher_logits,
            make_targets(ROWS, weights, MGSR),
            MGSR,
            vocab_size=VOCAB,
        )

    def run(function):
        return jax.jit(jax.value_and_grad(function, has_aux=True))(params)

    (loss, _), grads = run(in_chunks)
    (want, _), want_grads = run(dense)
    np.testing.assert_allclose(loss, want, rtol=2e-6)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(want_grads))
    assert_close(jax.device_get(grads), jax.device_get(want_grads), rtol=3e-6)


@pytest.fixture(scope="module")
def compare_host_rows():
    """Compares loss and gradient of tiny models on several batches of host rows."""
    (student, params), (teacher, teacher_params) = tiny.llama(0), tiny.llama(1)
    objective = dataclasses.replace(MGSR, divergence="forward_kl")

    @jax.jit
    @jax.value_and_grad
    def loss_of(params, rows):
        return micro_batch_loss(
            {"student": params},
            teacher_params,
            rows,
            position_weights(rows, objective),
            spec=StepLoss(student, teacher, objective),
        )[0]

    def compare(*batches):
        found = [loss_of(params, jax.tree.map(jnp.asarray, batch)) for batch in batches]
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), *found
        )

    return compare


@pytest.mark.slow
def test_padding_changes_neither_loss_nor_gradient(compare_host_rows):
    """Rows of 10 tokens at most, without padding and with twice their width."""
    host = jax.tree.map(np.asarray, tiny.complete())
    compare_host_rows(with_width(host, 10), with_width(host, 20))


@pytest.mark.slow
def test_a_row_with_two_responses_equals_two_rows(compare_host_rows):
    """Loss and gradient of all responses of a conversation, with their phrases."""
    first, second, third = [4, 5, 6], [7, 8], [9, 10, 11, 12]
    question, answer = first + second + [3, 13], [14, 15, 16]
    phrases = [[0, 0], [0, 1, 1, 1], [2, 2, NO_SPAN]]
    outside = [UNTRAINED] * 2
    whole = from_lists(
        [question + third + [17, 18]],
        [answer],
        width=20,
        span_ids=[phrases[2]],
        earlier_span_ids=[
            [UNTRAINED] * 3 + phrases[0] + outside + phrases[1] + outside
        ],
    )
    rows = from_lists(
        [first, question, question + third + [17, 18]],
        [second, third, answer],
        width=20,
        span_ids=phrases,
    )
    compare_host_rows(whole, rows)


def test_the_teacher_does_not_run_where_nothing_compares_with_it():
    sft = Objective(token=0.0, span=0.0)
    loss, _ = values(PARAMS, TEACHER, ROWS, sft, NeverRun())
    np.testing.assert_allclose(loss, evaluate(sft)[0], rtol=2e-6)
    with pytest.raises(AssertionError, match="the teacher ran"):
        values(PARAMS, TEACHER, ROWS, MGSR, NeverRun())


def test_a_missing_teacher_is_an_error_and_not_plain_fine_tuning():
    with pytest.raises(ValueError, match="compare with a teacher.*None"):
        values(PARAMS, None, ROWS, MGSR, None)


@pytest.mark.slow
def test_bfloat16_computation_gives_float32_losses_and_gradients():
    (loss, metrics), (grads, _) = with_gradients(
        PARAMS, TEACHER, ROWS, MGSR, Table("teacher"), jnp.bfloat16
    )
    leaves = jax.tree.leaves((loss, metrics, grads))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}
    np.testing.assert_allclose(loss, evaluate()[0], rtol=1e-2)


def recorder():
    """An optimizer that changes nothing and keeps the gradient as its state."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda grads, state, params=None: (jax.tree.map(jnp.zeros_like, grads), grads),
    )


def gradient_of(
    split, *, student, teacher, params, teacher_params, vocab_size, objective=MGSR
):
    """(loss, gradient, metrics) of one train step over the micro-batches `split`."""
    # The step donates its state, and the caller's parameters are used again.
    state = init_state(jax.tree.map(jnp.array, params), recorder(), 0)
    step = make_train_step(
        student, teacher, recorder(), objective, vocab_size=vocab_size
    )
    state, metrics = step(state, teacher_params, split)
    loss = metrics.pop("loss").total
    return jax.device_get((loss, state.opt_state, metrics))


def split(rows, parts):
    """Micro-batches of consecutive rows; the last one is all masked."""
    size = rows.lengths.shape[0] // parts
    return tuple(
        jax.tree.map(lambda x, i=i: x[i * size : (i + 1) * size], rows)
        for i in range(parts)
    )


TABLES = dict(
    student=Table(),
    teacher=Table("teacher"),
    params=PARAMS,
    teacher_params=TEACHER,
    vocab_size=VOCAB,
)


@pytest.mark.parametrize(
    "parts", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 4, 8))]
)
def test_micro_batches_do_not_change_the_gradient(parts):
    """One of 4 parts, and two of 8, have no scored position."""
    loss, grads, metrics = gradient_of(split(ROWS, parts), **TABLES)
    whole, _, want, _ = differentiate()
    np.testing.assert_allclose(loss, whole, rtol=1e-6)
    assert_close(grads, jax.device_get(want))
    for name, count in (("sft", 14), ("dac_kl", 26), ("span", len(pairs()))):
        assert metrics[name].count == count


def on_mesh(mesh, rows, parts):
    """The micro-batches of `rows`, placed on a mesh as the trainer does."""
    return tuple(
        sharding.put_batch(mesh, jax.tree.map(np.asarray, part))
        for part in split(rows, parts)
    )


@pytest.mark.slow
def test_eight_devices_do_not_change_the_gradient():
    """One row per device; some devices have no scored position or no label."""
    mesh = sharding.make_mesh(8)
    with jax.set_mesh(mesh):
        everywhere = jax.device_put((PARAMS, TEACHER), sharding.replicated(mesh))
        settings = TABLES | dict(params=everywhere[0], teacher_params=everywhere[1])
        loss, grads, _ = gradient_of(on_mesh(mesh, ROWS, 1), **settings)
    whole, _, want, _ = differentiate()
    np.testing.assert_allclose(loss, whole, rtol=1e-6)
    assert_close(grads, jax.device_get(want))


@pytest.mark.slow
def test_a_step_never_holds_the_logits_of_all_tokens():
    """No other dimension of these models and rows is 83."""
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


# In the last mesh, four tensor shards share each of two key-value heads.
@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param((2, 4, 1), marks=pytest.mark.exhaustive),
        (2, 2, 2),
        pytest.param((1, 1, 8), marks=pytest.mark.exhaustive),
        (1, 2, 4),
    ],
)
@pytest.mark.usefixtures("full_compiler")
def test_sharded_transformers_do_not_change_the_gradient(sizes):
    """Every kind of sharding with two micro-batches, against one device."""
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


@pytest.mark.exhaustive
def test_sharding_does_not_change_weights_that_read_a_whole_row():
    """Rows over two axes and the vocabulary over the third, against one device."""
    model = dataclasses.replace(models.from_config(LLAMA), tensor=2)
    params = jax.jit(model.init)(jax.random.key(0))
    teacher_params = jax.tree.map(lambda p: p[..., ::-1], params)
    settings = dict(student=model, teacher=model, vocab_size=tiny.VOCAB)
    settings["objective"] = DRIFTING
    rows = tiny.complete(LENGTHS, width=12)
    trees = {"params": {"student": params}, "teacher_params": teacher_params}
    whole = gradient_of(split(rows, 1), **settings, **trees)

    mesh = sharding.make_mesh(2, 2, 2)
    places = sharding.shardings(mesh, model.partition_rules, params)
    trees["params"] = {"student": jax.device_put(params, places)}
    trees["teacher_params"] = jax.device_put(teacher_params, places)
    with jax.set_mesh(mesh):
        loss, grads, _ = gradient_of(on_mesh(mesh, rows, 2), **settings, **trees)
    np.testing.assert_allclose(loss, whole[0], rtol=1e-6)
    assert_close(grads, whole[1], rtol=16 * np.finfo(np.float32).eps)
