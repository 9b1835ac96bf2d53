"""One update: what it computes, what it leaves alone, how often it compiles."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from tiny import LLAMA

from mgsr_jax import losses, models, sharding
from mgsr_jax.objective import Objective
from mgsr_jax.train_step import init_state, make_train_step, make_validation_step
from mgsr_jax.training.optimizer import (
    OptimizerConfig,
    make_optimizer,
)

SFT = Objective(token=0.0, span=0.0)
CONFIG = OptimizerConfig(
    learning_rate=1e-2, final_learning_rate=1e-4, weight_decay=0.1, clip_norm=0.5
)
STEPS = 5
K = 6

QWEN3 = LLAMA | {"model_type": "qwen3", "head_dim": 4}
QWEN2 = LLAMA | {"model_type": "qwen2"}

MODEL = models.from_config(LLAMA)
ROWS = tiny.complete(width=12)


@pytest.fixture(scope="module")
def initial():
    return jax.device_get(jax.jit(MODEL.init)(jax.random.key(0)))


@pytest.fixture(scope="module")
def sft_step():
    """Compiled once for all tests of this file."""
    return make_train_step(MODEL, None, make_optimizer(CONFIG, STEPS), SFT)


def fresh(initial, optimizer=None):
    """A state whose buffers the step may take."""
    params = {"student": jax.tree.map(jnp.array, initial)}
    return init_state(params, optimizer or make_optimizer(CONFIG, STEPS), seed=0)


def mean_cross_entropy(params):
    """Written out again, from the lengths."""
    rows = jax.device_get(ROWS)
    hidden, _ = MODEL.forward(params, jnp.asarray(rows.tokens[:, :-1]))
    log_q = jax.nn.log_softmax(MODEL.unembed(MODEL.head_params(params), hidden))
    spans = zip(rows.prompt_lengths, rows.lengths, strict=True)
    at = [(b, t) for b, (p, n) in enumerate(spans) for t in range(p - 1, n - 1)]
    b, t = np.array(at).T
    return -jnp.mean(log_q[b, t, rows.tokens[b, t + 1]])


@pytest.mark.slow
def test_updates_equal_a_hand_written_loop(initial, sft_step):
    """Clipping, cosine, Adam with bias correction and decoupled decay, in numpy."""
    gradient = jax.jit(jax.grad(mean_cross_entropy))
    state, params = fresh(initial), initial
    mean = square = jax.tree.map(np.zeros_like, initial)
    for i in range(3):
        state, metrics = sft_step(state, None, (ROWS,))
        grads = jax.device_get(gradient(params))
        norm = math.sqrt(sum(np.sum(g * g) for g in jax.tree.leaves(grads)))
        assert norm > CONFIG.clip_norm
        np.testing.assert_allclose(metrics["gradient_norm"].total, norm, rtol=1e-4)
        scale = CONFIG.clip_norm / norm
        grads = jax.tree.map(lambda g, scale=scale: g * scale, grads)
        mean = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, mean, grads)
        square = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, square, grads)
        cosine = (1 + math.cos(math.pi * i / STEPS)) / 2
        rate = 1e-4 + (1e-2 - 1e-4) * cosine

        def move(path, p, m, v, i=i, rate=rate):
            decay = 0.1 * p if path[-1].key in ("kernel", "embedding") else 0.0
            m, v = m / (1 - 0.9 ** (i + 1)), v / (1 - 0.999 ** (i + 1))
            return p - rate * (m / (np.sqrt(v) + 1e-8) + decay)

        params = jax.tree_util.tree_map_with_path(move, params, mean, square)
        assert int(state.step) == i + 1
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5),
        jax.device_get(state.params["student"]),
        params,
    )


def test_the_loss_falls_and_is_reported_as_a_sum_and_a_count(initial, sft_step):
    state, seen = fresh(initial), []
    for _ in range(STEPS):
        state, metrics = sft_step(state, None, (ROWS,))
        loss, count = metrics["sft"]
        assert count == 21 and metrics["finite"] == (1, 1)
        np.testing.assert_allclose(metrics["loss"].total, loss / count, rtol=1e-6)
        seen.append(float(loss))
    assert seen == sorted(seen, reverse=True) and seen[-1] < seen[0] - 1


@pytest.mark.slow
def test_the_schedule_counts_updates_and_not_micro_batches(initial, sft_step):
    """The same rows in one part and in four give the same updates."""
    whole, parts = fresh(initial), fresh(initial)
    four = tuple(jax.tree.map(lambda x, i=i: x[i : i + 1], ROWS) for i in range(4))
    for _ in range(2):
        whole, _ = sft_step(whole, None, (ROWS,))
        parts, _ = sft_step(parts, None, four)
    for state in (whole, parts):
        counts = optax.tree.get_all_with_path(state.opt_state, "count")
        assert counts and {int(count) for _, count in counts} == {2}
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        whole.params,
        parts.params,
    )


def test_a_gradient_that_is_not_finite_changes_nothing_but_the_step(initial, sft_step):
    broken = jax.tree.map(np.copy, initial)
    broken["layers"]["mlp"]["up"]["kernel"][0, 0, 0] = np.nan
    state = fresh(broken)
    before = jax.device_get((state.params, state.opt_state))
    state, metrics = sft_step(state, None, (ROWS,))
    assert metrics["finite"] == (0, 1) and not np.isfinite(metrics["loss"].total)
    assert int(state.step) == 1
    after = jax.device_get((state.params, state.opt_state))
    jax.tree.map(np.testing.assert_array_equal, after, before)


def test_the_state_is_donated_and_the_key_goes_on(initial, sft_step):
    state = fresh(initial)
    key = jax.random.key_data(state.key).tolist()
    old = jax.tree.leaves((state.params, state.opt_state))
    state, _ = sft_step(state, None, (ROWS,))
    assert all(leaf.is_deleted() for leaf in old)
    assert jax.random.key_data(state.key).tolist() == key


def test_other_rows_of_the_same_shape_do_not_compile_again(initial):
    step = make_train_step(MODEL, None, make_optimizer(CONFIG, STEPS), SFT)
    state = fresh(initial)
    for seed, lengths in enumerate([((2, 5), (1, 9), (3, 1), (4, 6)), ((1, 1),) * 4]):
        rows = tiny.complete(lengths, width=12, seed=seed)
        truth = jnp.array([True, seed == 0, True, False])
        state, _ = step(state, None, (dataclasses.replace(rows, ground_truth=truth),))
    assert step._cache_size() == 1


def test_a_step_with_nothing_to_score_is_finite(initial, sft_step):
    """Only weight decay is left."""
    empty = dataclasses.replace(ROWS, lengths=ROWS.prompt_lengths)
    state, metrics = sft_step(fresh(initial), None, (empty,))
    assert metrics["finite"] == (1, 1) and metrics["loss"] == (0, 1)
    assert metrics["gradient_norm"].total == 0 and metrics["sft"] == (0, 0)
    scale = state.params["student"]["final_norm"]["scale"]
    np.testing.assert_array_equal(scale, initial["final_norm"]["scale"])


@pytest.mark.slow
def test_half_precision_computes_and_float32_stays(initial):
    """The whole method, with a clip network and a bfloat16 teacher."""
    optimizer = make_optimizer(CONFIG, STEPS)
    objective = Objective(num_candidates=K)
    step = make_train_step(
        MODEL, MODEL, optimizer, objective, vocab_size=29, dtype=jnp.bfloat16
    )
    clip = losses.init_clip_network(jax.random.key(0), num_candidates=K, hidden=8)
    params = {"student": jax.tree.map(jnp.array, initial), "clip_network": clip}
    before = jax.device_get(params)
    teacher = jax.tree.map(lambda p: jnp.asarray(p[..., ::-1], jnp.bfloat16), initial)
    state, metrics = step(init_state(params, optimizer, 0), teacher, (ROWS,))
    assert metrics["finite"] == (1, 1)
    for leaf in jax.tree.leaves((state.params, metrics)):
        assert leaf.dtype == jnp.float32
    moments = jax.tree.leaves(optax.tree.get_all_with_path(state.opt_state, "mu"))
    assert {m.dtype for m in moments if isinstance(m, jax.Array)} == {
        jnp.dtype("float32")
    }
    moved = jax.tree.map(lambda a, b: np.any(a != b), state.params, before)
    assert all(jax.tree.leaves(moved["student"]))
    assert moved["clip_network"]["output"]["bias"]


def test_a_step_with_dac_kl_is_the_same_on_one_device_and_on_eight(initial):
    """The clip network is differentiated inside a shard_map."""
    rows = jax.tree.map(np.asarray, tiny.complete([(2, 5), (1, 9), (3, 1), (4, 6)] * 2))
    clip = losses.init_clip_network(jax.random.key(0), num_candidates=K, hidden=8)
    clip["output"]["kernel"] += 0.1  # zeros would stop the hidden layer's gradient
    params = jax.device_get({"student": initial, "clip_network": clip})
    teacher = jax.tree.map(lambda p: p[..., ::-1].copy(), initial)
    optimizer = make_optimizer(CONFIG, STEPS)
    step = make_train_step(
        MODEL, MODEL, optimizer, Objective(num_candidates=K), vocab_size=29
    )

    def gradient_and_metrics(devices):
        mesh = sharding.make_mesh(devices, devices=jax.devices()[:devices])
        with jax.set_mesh(mesh):
            state = init_state(jax.tree.map(jnp.array, params), optimizer, seed=0)
            whole = jax.device_put((state, teacher), sharding.replicated(mesh))
            state, metrics = step(*whole, (sharding.put_batch(mesh, rows),))
        # Adam's first mean is a tenth of the clipped gradient.
        mean = optax.tree.get_all_with_path(state.opt_state, "mu")
        return jax.device_get(([leaf for _, leaf in mean], metrics))

    one, eight = gradient_and_metrics(1), gradient_and_metrics(8)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), one, eight
    )
    assert all(np.any(leaf) for leaf in jax.tree.leaves(eight[0]))


def test_validation_reports_every_part_and_always_the_cross_entropy(initial):
    objective = Objective(sft=0.0, divergence="forward_kl")
    validate = make_validation_step(MODEL, MODEL, objective, vocab_size=29)
    metrics = validate({"student": initial}, initial, ROWS)
    assert set(metrics) == {"sft", "forward_kl", "span", "teacher_sft"}
    np.testing.assert_allclose(metrics["teacher_sft"], metrics["sft"], rtol=1e-6)
    assert metrics["sft"].count == metrics["forward_kl"].count == 21
    # A student that is its teacher has no divergence.
    assert abs(metrics["forward_kl"].total) < 1e-4 and metrics["span"].total == 0


def test_settings_of_the_objective_are_checked():
    objective = Objective()
    # Types are checked under pytest and nowhere else, so the typo is put there late.
    object.__setattr__(objective, "normalization", "techer")
    with pytest.raises(ValueError, match="objective.normalization='techer'; expected"):
        make_train_step(MODEL, MODEL, make_optimizer(CONFIG, STEPS), objective)
    with pytest.raises(ValueError, match="objective.width must be above 0, got 0.0"):
        make_validation_step(MODEL, MODEL, Objective(width=0.0))
