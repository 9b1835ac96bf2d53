"""The three means of a step against float64 numpy, and what must not change them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tables import (
    CLIP,
    COLUMNS,
    MGSR,
    ROWS,
    SAMPLED,
    STUDENT,
    TEACHER,
    VOCAB,
    WIDTH,
    K,
    differentiate,
    evaluate,
    log_softmax,
    pairs,
    scored,
)

from mgsr_jax import losses
from mgsr_jax.losses import at_bound
from mgsr_jax.objective import Objective
from mgsr_jax.rows import next_token_view


def mean_cross_entropy(at):
    log_q, tokens = log_softmax(STUDENT["logits"]), np.asarray(ROWS.tokens)
    return -np.mean([log_q[b, t, tokens[b, t + 1]] for b, t in at])


def mean_forward_kl(temperature=1.0, teacher_temperature=None):
    tables = (TEACHER, teacher_temperature or temperature), (STUDENT, temperature)
    log_p, log_q = (
        log_softmax(np.asarray(table["logits"], np.float64) / own)
        for table, own in tables
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
    """Per-position values are tested in tests/losses; here the mean."""
    values = np.asarray(
        per_position(STUDENT["logits"], TEACHER["logits"], vocab_size=VOCAB).loss
    ).astype(np.float64)
    return np.mean([values[b, t] for b, t in scored()])


def labelled():
    return [(b, t) for b, t in scored() if b not in SAMPLED]


def test_the_rows_have_three_different_counts():
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


def test_each_weight_scales_its_own_mean():
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
                    losses.dac_kl,
                    CLIP,
                    normalization="none",
                    signal=losses.ClipPrior(3.0),
                )
            ),
        ),
        (
            {"clip_signal": "fidelity", "fidelity_weight": 3.0},
            lambda: mean_dac_kl(
                functools.partial(losses.dac_kl, CLIP, signal=losses.ClipFidelity(3.0))
            ),
        ),
        (
            {"clip_signal": "unnormalised"},
            lambda: mean_dac_kl(
                functools.partial(losses.dac_kl, CLIP, signal=losses.ClipUnnormalised())
            ),
        ),
        (
            {"divergence": "forward_kl", "teacher_temperature": 0.7},
            functools.partial(mean_forward_kl, teacher_temperature=0.7),
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
        ("entropy_gated_kl", {"threshold": 1.5}),
        ("per_class_kl", {"temperature": 2.0}),
        ("logit_difference", {"alpha": 0.3}),
        ("reverse_kl_top_k", {"top_k": 2, "support": "union"}),
    ],
)
def test_the_token_level_can_be_any_divergence(divergence, settings):
    objective = Objective(sft=0.0, span=0.0, divergence=divergence, **settings)
    tables = STUDENT["logits"], TEACHER["logits"]
    per_token = getattr(losses, divergence)(*tables, vocab_size=VOCAB, **settings)
    want = np.mean([np.asarray(per_token)[b, t] for b, t in scored()])
    loss, metrics = evaluate(objective)
    np.testing.assert_allclose(loss, want, rtol=2e-6)
    assert metrics[divergence].count == len(scored())


def test_the_sampled_divergence_reads_the_labels_of_sampled_rows_only():
    objective = Objective(
        sft=0.0, span=0.0, divergence="sampled_reverse_kl", baseline=0.5
    )
    log_q, log_p = (log_softmax(table["logits"]) for table in (STUDENT, TEACHER))
    tokens = np.asarray(ROWS.tokens)
    at = [(b, t) for b, t in scored() if b in SAMPLED]
    gaps = (log_q - log_p)[tuple(np.array([(b, t, tokens[b, t + 1]) for b, t in at]).T)]
    loss, metrics = evaluate(objective)
    np.testing.assert_allclose(loss, np.mean(gaps), rtol=2e-6)
    assert metrics["sampled_reverse_kl"].count == len(at)
    grads = np.asarray(differentiate(objective)[2]["student"]["logits"])
    moved = {tuple(index) for index in np.argwhere(np.any(grads != 0, -1)).tolist()}
    assert moved == set(at)


def paired_by_hand(alpha):
    """DistiLLM-2: KL(p || a p + (1-a) q) on the data's rows, its mirror on samples."""
    p, q = (np.exp(log_softmax(table["logits"])) for table in (TEACHER, STUDENT))
    forward = np.sum(p * np.log(p / (alpha * p + (1 - alpha) * q)), -1)
    reverse = np.sum(q * np.log(q / ((1 - alpha) * p + alpha * q)), -1)
    return forward, reverse


PAIRED = Objective(
    sft=0.0,
    span=0.0,
    divergence="skewed_forward_kl",
    sample_divergence="skewed_reverse_kl",
    alpha=0.2,
)


def test_the_student_s_rows_may_have_another_divergence():
    forward, reverse = paired_by_hand(0.2)
    data = [forward[b, t] for b, t in scored() if b not in SAMPLED]
    samples = [reverse[b, t] for b, t in scored() if b in SAMPLED]
    loss, metrics = evaluate(PAIRED)
    np.testing.assert_allclose(loss, np.mean(data + samples), rtol=2e-6)
    for name, values in (
        ("skewed_forward_kl", data),
        ("skewed_reverse_kl", samples),
    ):
        assert metrics[name].count == len(values)
        np.testing.assert_allclose(metrics[name].total, np.sum(values), rtol=2e-6)


@pytest.mark.slow
def test_the_gradient_of_a_paired_divergence_is_each_row_s_own():
    grads = differentiate(PAIRED)[2]["student"]["logits"]
    for changes, rows in (
        ({"sample_divergence": None}, set(range(len(grads))) - set(SAMPLED)),
        ({"divergence": "skewed_reverse_kl", "sample_divergence": None}, SAMPLED),
    ):
        same = dataclasses.replace(PAIRED, **changes)
        want = differentiate(same)[2]["student"]["logits"]
        for b in rows:
            np.testing.assert_allclose(grads[b], want[b], rtol=1e-6, atol=1e-9)


def test_one_divergence_may_be_named_twice():
    twice = dataclasses.replace(PAIRED, sample_divergence="skewed_forward_kl")
    once = dataclasses.replace(PAIRED, sample_divergence=None)
    assert twice.divergences == once.divergences
    assert evaluate(twice)[0] == evaluate(once)[0]


def entropies(table):
    log_probs = log_softmax(table["logits"])
    return -np.sum(np.exp(log_probs) * log_probs, -1)


def discrepancy_weights_by_hand(gain):
    """Row by row, from the labels' log-probabilities."""
    log_q, log_p = (log_softmax(table["logits"]) for table in (STUDENT, TEACHER))
    tokens, weights = np.asarray(ROWS.tokens), np.zeros(log_q.shape[:2])
    for row in range(len(tokens)):
        at = [t for b, t in scored() if b == row]
        gaps = [abs((log_p - log_q)[row, t, tokens[row, t + 1]]) for t in at]
        for i, t in enumerate(at):
            weights[row, t] = 1 + gain * (1 - sum(gaps[:i]) / sum(gaps))
    return weights


TOKEN_WEIGHTS = [
    (
        {"token_weights": "student_entropy", "weight_threshold": 1.2},
        lambda: entropies(STUDENT) > 1.2,
    ),
    (
        {"token_weights": "teacher_entropy", "weight_floor": 0.25},
        lambda: np.where(entropies(TEACHER) <= 0.8, 1, 0.25),
    ),
    (
        {"token_weights": "acceptance", "weight_top_k": 4, "weight_floor": 0.0},
        lambda: losses.acceptance_weights(
            STUDENT["logits"], TEACHER["logits"], top_k=4, floor=0, vocab_size=VOCAB
        ),
    ),
    (
        {"token_weights": "discrepancy", "weight_gain": 0.7},
        lambda: discrepancy_weights_by_hand(0.7),
    ),
]


@pytest.mark.parametrize(("settings", "weights"), TOKEN_WEIGHTS)
def test_token_weights_multiply_the_divergence_and_not_its_count(settings, weights):
    objective = Objective(sft=0.0, span=0.0, divergence="forward_kl", **settings)
    kl = losses.forward_kl(STUDENT["logits"], TEACHER["logits"], vocab_size=VOCAB)
    kl, weights = np.asarray(kl), np.float64(weights())
    parts = np.array([weights[b, t] * kl[b, t] for b, t in scored()])
    assert 0 < np.mean(parts) != np.mean([kl[b, t] for b, t in scored()])
    loss, metrics = evaluate(objective)
    np.testing.assert_allclose(loss, np.sum(parts) / len(scored()), rtol=2e-6)
    assert metrics["forward_kl"].count == len(scored())
    if "token_weight" in metrics:
        mean = np.mean([weights[b, t] for b, t in scored()])
        np.testing.assert_allclose(
            metrics["token_weight"].total, mean * len(scored()), rtol=1e-6
        )


def test_an_unknown_divergence_is_an_error():
    with pytest.raises(ValueError, match="divergence='reverse'.*'dac_kl_fixed'"):
        # Types are checked under pytest and nowhere else.
        objective = dataclasses.replace(MGSR)
        object.__setattr__(objective, "divergence", "reverse")
        evaluate(objective)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["sft", "token", "span"])
def test_a_part_of_weight_zero_is_not_computed(part):
    whole, parts = evaluate()[0], {}
    for name in ("sft", "token", "span"):
        only = dataclasses.replace(MGSR, sft=0.0, token=0.0, span=0.0)
        parts[name] = evaluate(dataclasses.replace(only, **{name: 1.0}))[0]
    loss, metrics = evaluate(dataclasses.replace(MGSR, **{part: 0.0}))
    np.testing.assert_allclose(loss, sum(parts.values()) - parts[part], rtol=2e-6)
    assert loss < whole
    assert ("dac_kl" if part == "token" else part) not in metrics


def test_student_equal_to_teacher_has_no_forward_kl_and_no_span_loss():
    objective = Objective(sft=0.0, divergence="forward_kl")
    loss, _, grads, _ = differentiate(objective, teacher=STUDENT)
    assert abs(loss) < 1e-7
    assert jnp.abs(grads["student"]["logits"]).max() < 1e-7


@pytest.mark.slow
def test_the_clip_network_learns_and_the_teacher_does_not():
    _, _, grads, teacher_grads = differentiate()
    assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(grads["clip_network"]))
    assert not jnp.any(teacher_grads["logits"])


def test_exactly_the_scored_positions_have_a_gradient():
    """Columns beyond the vocabulary have none."""
    grads = np.asarray(differentiate()[2]["student"]["logits"])
    moved = {tuple(index) for index in np.argwhere(np.any(grads != 0, -1)).tolist()}
    assert moved == set(scored())
    assert not grads[..., VOCAB:].any()


def test_logits_at_unscored_positions_change_nothing():
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


def test_logits_at_scored_positions_change_the_loss():
    before = evaluate()[0]
    for b, t in scored():
        table = np.array(STUDENT["logits"])
        table[b, t, :VOCAB] = table[b, t, VOCAB - 1 :: -1]
        assert evaluate(student={"logits": jnp.asarray(table)})[0] != before, (b, t)


def test_a_perfect_student_of_the_labels_has_no_cross_entropy():
    """Labels are the next tokens."""
    labels = np.asarray(ROWS.tokens)[:, 1:]
    perfect = {"logits": 50.0 * jax.nn.one_hot(labels, COLUMNS)}
    assert evaluate(Objective(token=0.0, span=0.0), student=perfect)[0] < 1e-6


def test_a_step_without_scored_positions_is_zero_and_has_no_gradient():
    empty = dataclasses.replace(ROWS, lengths=ROWS.prompt_lengths)
    loss, metrics, grads, _ = differentiate(rows=empty)
    assert loss == 0
    assert not any(jnp.any(leaf != 0) for leaf in jax.tree.leaves(grads))
    assert all(s.total == 0 and s.count == 0 for s in metrics.values())


def test_without_ground_truth_rows_there_is_no_cross_entropy():
    written = dataclasses.replace(ROWS, ground_truth=jnp.zeros(8, bool))
    loss, metrics = evaluate(rows=written)
    without, _ = evaluate(dataclasses.replace(MGSR, sft=0.0))
    np.testing.assert_allclose(loss, without, rtol=1e-6)
    assert metrics["sft"] == (0, 0)


def test_at_bound_marks_limits_near_the_end_of_their_range():
    lower = jnp.array([0.001, 0.1, 0.499, 0.1, 0.1])
    upper = jnp.array([0.98, 0.98, 0.98, 0.501, 0.999])
    assert at_bound(lower, upper).tolist() == [1, 0, 1, 1, 1]
